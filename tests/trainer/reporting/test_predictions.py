import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from trainer.reporting.predictions import Predictions, probabilities


def test_probabilities_of_one_logit_and_of_several() -> None:
    one = probabilities(np.array([[0.0], [np.log(3)], [800.0]]))
    np.testing.assert_allclose(one, [[0.5, 0.5], [0.25, 0.75], [0, 1]])
    several = probabilities(np.log([[1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(several, [[0.125, 0.25, 0.625]])


def test_a_tie_goes_to_the_first_class_and_the_smallest_logit_decides() -> None:
    found = Predictions({"logits": np.array([[0.0], [1e-30], [-1e-30]], np.float32)})
    assert found.predicted.tolist() == [0, 1, 0]


def test_metrics_of_sets_are_scikit_learn_s() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, (50, 4)).astype(np.uint8)
    labels[:, 3] = 0  # no document has it, and none gets it
    logits = random.normal(labels, 1).astype(np.float32)
    logits[:, 3] = -9
    tensors = {"label": np.zeros(50, np.int32), "labels": labels, "logits": logits}
    tensors["loss"] = np.ones(50, np.float32)
    edges = np.array([0.3, 0.5, 0.7, 0.5])
    found = Predictions(tensors, {"thresholds": edges.tolist()})
    predicted = 1 / (1 + np.exp(-logits.astype(np.float64))) >= edges
    np.testing.assert_array_equal(found.predicted, predicted)
    metrics = found.metrics()
    assert metrics["f1_micro"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    real = f1_score(labels[:, :3], predicted[:, :3], average="macro")
    assert metrics["f1_macro"] == pytest.approx(real)
    areas = [roc_auc_score(labels[:, i], logits[:, i]) for i in range(3)]
    assert metrics["roc_auc"] == pytest.approx(np.mean(areas))
    exact = 100 * (predicted != labels).any(axis=1).mean()
    assert metrics["error_percent"] == pytest.approx(exact)
