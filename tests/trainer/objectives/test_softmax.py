import numpy as np
import tensorflow as tf

from trainer.objectives import softmax


def problem(tokens: int = 37, units: int = 5, vocab_size: int = 50, seed: int = 0) -> tuple:
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(tokens, units)).astype(np.float32),
        random.integers(0, vocab_size, tokens).astype(np.int32),
        random.normal(size=(vocab_size, units)).astype(np.float32),
        random.normal(size=vocab_size).astype(np.float32),
    )


def exact(hidden: np.ndarray, targets: np.ndarray, kernel: np.ndarray, bias: np.ndarray):
    logits = hidden.astype(np.float64) @ kernel.T + bias
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(targets)), targets]


def test_exact_cross_entropy_is_numpys(monkeypatch) -> None:
    for chunk in (8, 37, 1024):  # uneven, exact, larger than all
        monkeypatch.setattr(softmax, "CHUNK_TOKENS", chunk)
        losses = softmax.cross_entropy(*map(tf.constant, problem()))
        np.testing.assert_allclose(losses, exact(*problem()), rtol=1e-5)


def test_no_tokens_have_no_loss() -> None:
    hidden, targets, kernel, bias = problem()
    assert softmax.cross_entropy(hidden[:0], targets[:0], kernel, bias).shape == (0,)


def test_candidates_follow_their_distribution() -> None:
    drawn = softmax.log_uniform_candidates(20, 200_000, tf.constant([1, 2])).numpy()
    assert drawn.min() >= 0 and drawn.max() < 20
    frequencies = np.bincount(drawn, minlength=20) / len(drawn)
    expected = np.exp(softmax.log_expected_count(tf.range(20), 20, 1).numpy())
    np.testing.assert_allclose(expected.sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(frequencies, expected, atol=0.005)


def test_candidates_are_a_function_of_the_seed() -> None:
    first, again, other = (
        softmax.log_uniform_candidates(1000, 64, tf.constant([1, s])).numpy() for s in (2, 2, 3)
    )
    assert (first == again).all() and (first != other).any()


def test_sampled_loss_is_numpys_over_target_and_candidates() -> None:
    hidden, targets, kernel, bias = problem()
    seed = tf.constant([4, 5])
    candidates = softmax.log_uniform_candidates(50, 16, seed).numpy()

    def log_count(ids: np.ndarray) -> np.ndarray:
        return np.log(np.log1p(1 / (ids + 1)) / np.log(51) * 16)

    expected = []
    for h, t in zip(hidden, targets, strict=True):
        others = candidates[candidates != t]
        logits = [h @ kernel[t] + bias[t]]
        logits += list(kernel[others] @ h + bias[others] - log_count(others))
        expected.append(np.log(np.exp(logits).sum()) - logits[0])
    losses = softmax.sampled_cross_entropy(hidden, targets, kernel, bias, 16, seed)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_sampled_gradient_estimates_the_exact_one() -> None:
    hidden, targets, kernel, bias = map(tf.constant, problem(tokens=400))

    def gradient(loss) -> np.ndarray:
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            total = tf.reduce_sum(loss())
        return tape.gradient(total, hidden).numpy()

    truth = gradient(lambda: softmax.cross_entropy(hidden, targets, kernel, bias))
    errors = []
    for count in (10, 40, 16_000):
        estimate = gradient(
            lambda n=count: softmax.sampled_cross_entropy(
                hidden, targets, kernel, bias, n, tf.constant([0, 1])
            )
        )
        errors.append(np.linalg.norm(estimate - truth) / np.linalg.norm(truth))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05
