import numpy as np

from trainer.stages.linear_head import MIN_AXES, PENALTY, fitted, self_trained, surest
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


def test_the_surest_documents_of_each_class_are_as_many_as_its_share() -> None:
    logits = np.array([[3.0], [-1.0], [2.0], [-2.0], [0.5], [-0.1]])
    assert surest(logits, np.array([1 / 3, 1 / 6])).tolist() == [1, 0, -1, 0, -1, -1]
    assert surest(logits, np.array([1 / 6, 1 / 2])).tolist() == [1, -1, 1, 0, 1, -1]
    # So likely of the second class that it is also the second likeliest of the first.
    of_three = np.array([[0.0, 9.0, 0.0], [5.0, 0.0, 0.0], [-9.0, 0.0, 0.0], [-9.0, -9.0, 9.0]])
    shares = np.array([0.5, 0.25, 0.25])
    assert surest(of_three, shares).tolist() == [-1, 0, -1, 2]
    assert surest(of_three, np.zeros(3)).tolist() == [-1] * 4


def test_a_head_that_labels_documents_itself_finds_what_few_labels_do_not_show() -> None:
    random = np.random.default_rng(2)

    def documents(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        centres = 3 * np.eye(classes, 40)
        noise = random.normal(size=(count, 40))
        return (centres[labels] + noise).astype(np.float32), labels.astype(np.int32)

    def wrong(
        head: tuple[np.ndarray, np.ndarray], features: np.ndarray, labels: np.ndarray
    ) -> float:
        logits = features @ head[0] + head[1]
        guessed = logits.argmax(axis=1) if logits.shape[1] > 1 else logits[:, 0] > 0
        return float(np.mean(guessed != labels))

    for classes in (2, 3):
        few, others, tested = (
            documents(6, classes),
            documents(1_000, classes),
            documents(999, classes),
        )
        before = wrong(fitted(*few, classes), *tested)
        after = wrong(self_trained(*few, classes, None, others[0]), *tested)
        best = wrong(fitted(*others, classes), *tested)
        assert after < 0.5 * before and after < best + 0.02
