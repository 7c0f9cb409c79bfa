import numpy as np

from trainer.reporting.predictions import Predictions, probabilities


def test_probabilities_of_one_logit_and_of_several() -> None:
    one = probabilities(np.array([[0.0], [np.log(3)], [800.0]]))
    np.testing.assert_allclose(one, [[0.5, 0.5], [0.25, 0.75], [0, 1]])
    several = probabilities(np.log([[1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(several, [[0.125, 0.25, 0.625]])


def test_a_tie_goes_to_the_first_class_and_the_smallest_logit_decides() -> None:
    found = Predictions({"logits": np.array([[0.0], [1e-30], [-1e-30]], np.float32)})
    assert found.predicted.tolist() == [0, 1, 0]
