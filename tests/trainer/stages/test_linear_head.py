import numpy as np

from trainer.stages.linear_head import MIN_AXES, PENALTY, fitted
from trainer.training import logistic_regression


def test_the_head_reads_features_as_they_are_and_answers_as_the_regression_of_scaled_ones() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 60).astype(np.int32)
    features = 7 + 0.01 * (random.normal(size=(60, 4)) + labels[:, None])  # far from 0, and small
    kernel, bias = fitted(features.astype(np.float32), labels, 2)
    assert kernel.dtype == bias.dtype == np.float32
    centred = features - features.mean(axis=0)
    scaled = centred / np.sqrt(np.square(centred).sum(axis=1).mean())
    expected = logistic_regression.fit(scaled, labels, 2, PENALTY)
    np.testing.assert_allclose(
        features @ kernel + bias, scaled @ expected[0] + expected[1], atol=2e-3
    )
    assert np.mean((features @ kernel + bias > 0)[:, 0] == labels) > 0.75


def test_features_that_say_nothing_leave_the_head_at_the_share_of_each_class() -> None:
    labels = np.array([1] * 30 + [0] * 10, np.int32)
    kernel, bias = fitted(np.ones((40, 3), np.float32), labels, 2)
    assert np.isfinite(kernel).all()
    logits = np.ones((1, 3)) @ kernel + bias
    assert 0.7 < 1 / (1 + np.exp(-logits[0, 0])) < 0.76


def test_a_head_on_the_code_reads_outputs_and_answers_as_the_regression_of_codes() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, 60).astype(np.int32)
    code = random.normal(size=(40, 30))
    code[0] = 0  # what the code leaves out
    code[1, :MIN_AXES] = 0  # and what only its last axes have, which 60 labels are too few for
    features = random.normal(size=(60, 40)) + np.outer(labels, [9] + [1] * 39)
    kernel, bias = fitted(features, labels, 2, code)
    assert kernel[0] == kernel[1] == 0
    codes = features @ code[:, :MIN_AXES]
    centred = codes - codes.mean(axis=0)
    scaled = centred / np.sqrt(np.square(centred).sum(axis=1).mean())
    expected = logistic_regression.fit(scaled, labels, 2, PENALTY)
    np.testing.assert_allclose(
        features @ kernel + bias, scaled @ expected[0] + expected[1], atol=1e-3
    )
