"""Times the softmax over a vocabulary, forward and backward: exact, sampled, and TensorFlow's own.

    python -m benchmarks.softmax

The exact ones are checked against each other first.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.machine import facts_with_gpu
from benchmarks.processes import in_turn, min_and_median, write_results
from trainer.losses import softmax

TOKENS, UNITS, VOCAB, SAMPLED = 4096, 512, 30_000, 1024
Loss = Callable[[tf.Tensor, tf.Variable, tf.Variable], tf.Tensor]


def losses(targets: tf.Tensor) -> dict[str, Loss]:
    """Returns the losses of [TOKENS] targets, by name; each is given hidden, kernel, bias."""
    seed = tf.constant([1, 2])

    def dense(hidden: tf.Tensor, kernel: tf.Variable, bias: tf.Variable) -> tf.Tensor:
        logits = tf.matmul(hidden, kernel, transpose_b=True) + bias
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)

    def tensorflow_sampled(hidden: tf.Tensor, kernel: tf.Variable, bias: tf.Variable) -> tf.Tensor:
        labels = tf.cast(targets, tf.int64)[:, None]
        return tf.nn.sampled_softmax_loss(kernel, bias, labels, hidden, SAMPLED, VOCAB, seed=1)

    return {
        "exact, all logits at once": dense,
        "exact, warmstate": lambda h, k, b: softmax.cross_entropy_sum(h, targets, k, b) / TOKENS,
        f"sampled, {SAMPLED}, tf.nn.sampled_softmax_loss": tensorflow_sampled,
        f"sampled, {SAMPLED}, warmstate": lambda h, k, b: softmax.sampled_cross_entropy(
            h, targets, k, b, SAMPLED, seed
        ),
    }


def step_of(
    loss: Loss, hidden: tf.Tensor, kernel: tf.Variable, bias: tf.Variable
) -> Callable[[], list]:
    """Returns a compiled step: the mean loss, and the gradients."""

    @tf.function
    def step() -> list:
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            mean = tf.reduce_mean(loss(hidden, kernel, bias))
        return [mean, *tape.gradient(mean, [hidden, kernel, bias])]

    return step


def seconds(step: Callable[[], list]) -> float:
    """Returns the wall time of one call, in seconds."""
    began = time.perf_counter()
    for tensor in step():
        (tensor.values if isinstance(tensor, tf.IndexedSlices) else tensor).numpy()
    return time.perf_counter() - began


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    lines = ["| softmax, forward and backward | min (median) ms |", "|---|---|"]
    lines += [
        f"| {r['name']} | {r['ms']['min']:,.0f} ({r['ms']['median']:,.0f}) |" for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="softmax", help="name of the JSON")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    hidden = tf.constant(rng.normal(size=(TOKENS, UNITS)), tf.float32)
    kernel = tf.Variable(rng.normal(0, 0.05, (VOCAB, UNITS)).astype(np.float32))
    bias = tf.Variable(np.zeros(VOCAB, np.float32))
    targets = tf.constant(np.minimum(rng.zipf(1.2, TOKENS), VOCAB - 1).astype(np.int32))
    steps = {n: step_of(loss, hidden, kernel, bias) for n, loss in losses(targets).items()}
    exact = [tf.convert_to_tensor(t) for name in list(steps)[:2] for t in steps[name]()]
    for one, other in zip(exact[:4], exact[4:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    timed = {name: lambda s=step: seconds(s) for name, step in steps.items()}
    in_turn(timed, 1)
    times = in_turn(timed, args.repeats)
    results = [
        {"name": name, "ms": min_and_median([1e3 * t for t in values])}
        for name, values in times.items()
    ]
    print(f"{TOKENS} tokens, {UNITS} units, {VOCAB} words\n{table(results)}")
    write_results(args.out, facts_with_gpu(), results)


if __name__ == "__main__":
    main()
