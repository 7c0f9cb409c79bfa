import numpy as np
import pytest

from trainer.training.logistic_regression import fit, sigmoid


def loss(features: np.ndarray, labels: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> float:
    logits = features @ kernel + bias
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    normaliser = np.log(np.exp(logits).sum(axis=1))
    nats = normaliser - logits[np.arange(len(labels)), labels]
    return nats.sum() + 0.05 * (np.sum(kernel**2) + np.sum(bias**2))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_no_small_step_in_any_direction_is_better(num_classes: int) -> None:
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(40, 5)), random.integers(0, num_classes, 40)
    kernel, bias = fit(features, labels, num_classes, penalty=0.1)
    assert kernel.shape == (5, 1 if num_classes == 2 else 3) and bias.shape == kernel.shape[1:]
    best = loss(features, labels, kernel, bias)
    for _ in range(50):
        step = 1e-3 * random.normal(size=kernel.shape), 1e-3 * random.normal(size=bias.shape)
        assert loss(features, labels, kernel + step[0], bias + step[1]) > best


def test_separable_classes_end_with_finite_weights_and_right_answers() -> None:
    features = np.array([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-0.8, 0.3]])
    kernel, bias = fit(features, np.array([1, 1, 0, 0]), 2, penalty=0.1)
    found = sigmoid(features @ kernel + bias)[:, 0]
    assert np.isfinite(kernel).all() and (found > 0.5).tolist() == [True, True, False, False]


def test_a_set_of_labels_is_a_regression_a_class() -> None:
    random = np.random.default_rng(1)
    features, labels = random.normal(size=(30, 4)), random.integers(0, 2, (30, 2)).astype(np.uint8)
    kernel, bias = fit(features, labels, 2, penalty=0.1)
    for place in range(2):
        alone, its_bias = fit(features, labels[:, place].astype(np.int64), 2, penalty=0.1)
        np.testing.assert_allclose(kernel[:, [place]], alone, atol=1e-4)
        np.testing.assert_allclose(bias[[place]], its_bias, atol=1e-4)
