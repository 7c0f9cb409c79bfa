"""Thresholds against all that are possible."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from trainer.reporting import thresholds


def test_no_other_threshold_has_a_higher_f1() -> None:
    random = np.random.default_rng(0)
    probabilities = random.uniform(0.01, 0.99, (40, 5)).round(2)  # with ties
    labels = (probabilities + random.normal(0, 0.3, (40, 5)) > 0.6).astype(np.uint8)
    labels[:, 3], labels[:, 4] = 0, 1
    found = thresholds.best(probabilities, labels)
    assert found[3] == 0.5 and 0 < found[4] < probabilities[:, 4].min()
    for place in range(3):
        of_class, truth = probabilities[:, place], labels[:, place]
        every = [f1_score(truth, of_class >= edge) for edge in np.unique(of_class)]
        assert f1_score(truth, of_class >= found[place]) == pytest.approx(max(every))
        assert found[place] not in of_class  # halfway between two


def test_extreme_probabilities_leave_a_threshold_inside() -> None:
    found = thresholds.best(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[1, 1], [0, 1]]))
    assert all(0 < edge < 1 for edge in found)
