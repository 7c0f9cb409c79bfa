import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests import forked
from trainer.losses import softmax

REPOSITORY = Path(__file__).resolve().parents[3]


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
    for tokens in (8, 37, 1024):  # uneven, exact, larger than all
        monkeypatch.setattr(softmax, "CHUNK_LOGITS", 50 * tokens)
        losses = softmax.cross_entropy(*map(tf.constant, problem()))
        np.testing.assert_allclose(losses, exact(*problem()), rtol=1e-5)


def test_no_tokens_have_no_loss() -> None:
    hidden, targets, kernel, bias = map(tf.constant, problem())
    with tf.GradientTape() as tape:
        tape.watch([hidden, kernel, bias])
        losses = softmax.cross_entropy(hidden[:0], targets[:0], kernel, bias)
    assert losses.shape == (0,)
    for gradient in tape.gradient(losses, [hidden, kernel, bias]):
        assert not gradient.numpy().any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kept", [0, 37])
def test_a_sum_has_the_gradients_of_its_losses(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, kept: int
) -> None:
    hidden, targets, kernel, bias = problem()
    tensors = [tf.constant(x) for x in (hidden[:kept], kernel, bias)]

    def results(loss: Callable) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            h, k, b = tensors
            total = 3 * loss(h, targets[:kept], k, b)
        return [total, *tape.gradient(total, tensors)]

    expected = results(lambda *operands: tf.reduce_sum(plain_cross_entropy(*operands)))
    run = tf.function(results) if compiled else results
    for tokens in (8, 100):
        monkeypatch.setattr(softmax, "CHUNK_LOGITS", 50 * tokens)
        for found, wanted in zip(run(softmax.cross_entropy_sum), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        run = tf.function(results) if compiled else results


def test_a_sum_without_a_tape_computes_no_gradients() -> None:
    def products(training: bool) -> int:
        def run(*tensors: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                if training:
                    tape.watch(tensors)
                softmax.cross_entropy_sum(tensors[0], targets, *tensors[1:])

        graph = tf.function(run).get_concrete_function(hidden, kernel, bias).graph
        inner = [graph, *(f.graph for f in graph._functions.values())]
        return sum(o.type == "MatMul" for g in inner for o in g.get_operations())

    hidden, targets, kernel, bias = map(tf.constant, problem())
    assert (products(False), products(True)) == (1, 3)


def plain_cross_entropy(hidden, targets, kernel, bias) -> tf.Tensor:
    logits = tf.matmul(hidden, kernel, transpose_b=True) + bias
    return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-13)])
@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_have_the_loss_and_the_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float, compiled: bool
) -> None:
    hidden, targets, kernel, bias = problem()
    tensors = [tf.cast(x, dtype) for x in (hidden, kernel, bias)]
    upstream = tf.cast(np.random.default_rng(1).normal(size=len(targets)), dtype)

    def results(loss) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            h, k, b = tensors
            losses = loss(h, targets, k, b)
        return [losses, *tape.gradient(losses, tensors, output_gradients=upstream)]

    expected = results(plain_cross_entropy)
    for tokens in (1, 8, 37, 100):
        monkeypatch.setattr(softmax, "CHUNK_LOGITS", 50 * tokens)
        run = tf.function(results) if compiled else results
        for found, wanted in zip(run(softmax.cross_entropy), expected, strict=True):
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * scale)


def test_a_table_that_is_read_and_compared_with_gets_both_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(softmax, "CHUNK_LOGITS", 50 * 8)
    _, targets, table, bias = map(tf.constant, problem())

    def gradient(loss) -> np.ndarray:
        with tf.GradientTape() as tape:
            tape.watch(table)
            hidden = tf.tanh(tf.nn.embedding_lookup(table, targets[::-1]))
            losses = loss(hidden, targets, table, bias)
        return tf.convert_to_tensor(tape.gradient(losses, table)).numpy()

    expected = gradient(plain_cross_entropy)
    np.testing.assert_allclose(gradient(softmax.cross_entropy), expected, rtol=1e-5, atol=1e-6)


PEAK_MEMORY = """
import json
from benchmarks.processes import peak_megabytes
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly()
import tensorflow as tf
from trainer.losses import softmax
from tests.trainer.losses.test_softmax import plain_cross_entropy

def step(loss, tokens):
    tensors = [tf.random.normal(s) for s in ([tokens, 32], [30_000, 32], [30_000])]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        losses = loss(tensors[0], tf.zeros([tokens], tf.int32), *tensors[1:])
    return tape.gradient(losses, tensors)

run = tf.function(step)
for loss in (softmax.cross_entropy, plain_cross_entropy):
    run(loss, 8)
peaks = [peak_megabytes()]
for loss in (softmax.cross_entropy, plain_cross_entropy):
    run(loss, 3200)
    peaks.append(peak_megabytes())
print(json.dumps(peaks))
"""


def test_chunks_take_a_fraction_of_the_memory() -> None:
    # The logits of a batch of 64 x 50 words, out of 30,000, are 366 MiB.
    done = forked.run([sys.executable, "-c", PEAK_MEMORY], cwd=REPOSITORY, text=True,
                      capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, chunked, plain = json.loads(done.stdout.splitlines()[-1])
    print(f"peak above {before:.0f} MiB: {chunked - before:.0f} MiB, plain {plain - before:.0f}")
    assert plain - before > 366
    assert chunked - before < 220


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


def plainly_sampled(
    hidden: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
    """The sampled loss of 16 candidates as TensorFlow differentiates it."""
    candidates = softmax.log_uniform_candidates(50, 16, seed)
    logits = tf.matmul(hidden, tf.gather(kernel, candidates), transpose_b=True)
    logits += tf.gather(bias, candidates) - softmax.log_expected_count(candidates, 50, 16)
    logits = tf.where(targets[:, None] == candidates, -1e30, logits)
    of_target = tf.reduce_sum(hidden * tf.gather(kernel, targets), 1) + tf.gather(bias, targets)
    return tf.reduce_logsumexp(tf.concat([of_target[:, None], logits], 1), 1) - of_target


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.bfloat16
def test_sampled_gradients_are_those_of_the_loss(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "CHUNK_SAMPLED_LOGITS", 16 * chunk)
    hidden, targets, kernel, bias = map(tf.constant, problem())
    seed, weights = tf.constant([4, 5]), tf.range(len(hidden), dtype=tf.float32)

    def gradients(loss: Callable[..., tf.Tensor], *more: Any, **options: Any) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            tape.watch([hidden, kernel, bias])
            total = tf.reduce_sum(loss(hidden, targets, kernel, bias, *more, **options) * weights)
        found = tape.gradient(total, [hidden, kernel, bias])
        return [total, *map(tf.convert_to_tensor, found)]

    ours = gradients(softmax.sampled_cross_entropy, 16, seed)
    for found, expected in zip(ours, gradients(plainly_sampled, seed), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    half = gradients(softmax.sampled_cross_entropy, 16, seed, products=tf.bfloat16)
    for found, expected in zip(half, ours, strict=True):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert 0 < error < 0.01


def test_sampled_loss_of_no_tokens() -> None:
    hidden, targets, kernel, bias = map(tf.constant, problem())
    losses = softmax.sampled_cross_entropy(
        hidden[:0], targets[:0], kernel, bias, 16, tf.constant([4, 5])
    )
    assert losses.shape == (0,)


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
