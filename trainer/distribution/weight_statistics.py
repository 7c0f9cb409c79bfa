"""Small tensors that depend on weights alone, such as the mean of all embeddings.

A table's gradient through such a tensor is dense. Summed over shards it would be as large as the
table at every step. But it follows from the gradient of the small tensor, which is a few kilobytes:
shards sum that one, and each then computes the table's. What rows of the batch give the table
travels as rows.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

# Each replica of a MirroredStrategy runs in a separate thread.
_collecting = threading.local()


class WeightStatistics:
    """The statistics of the weights that a loss computes in the context `collected`.

    Args:
        weights: What is trained.
        tape: It records the loss.

    Attributes:
        leaves: The statistics, as the tape sees them: they depend on nothing.
    """

    def __init__(self, weights: Sequence[tf.Variable], tape: tf.GradientTape):
        self._weights = list(weights)
        self._tape = tape
        self._parts: list[tuple[tf.GradientTape, list[tf.Tensor]]] = []
        self.leaves: list[tf.Tensor] = []

    def add(self, function: Callable[[], Sequence[tf.Tensor]]) -> list[tf.Tensor]:
        """Returns `function`'s tensors, which depend on weights alone."""
        with tf.GradientTape(watch_accessed_variables=False) as own:
            own.watch(self._weights)
            values = list(function())
        leaves = [tf.stop_gradient(value) for value in values]
        self._tape.watch(leaves)
        self._parts.append((own, values))
        self.leaves += leaves
        return leaves

    def gradients(self, upstream: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
        """Returns the gradient of each weight through the statistics, dense; None: there is none.

        Args:
            upstream: The gradients of `leaves`.
        """
        sums: list[tf.Tensor | None] = [None] * len(self._weights)
        given = iter(upstream)
        for tape, values in self._parts:
            of_part = tape.gradient(values, self._weights, [next(given) for _ in values])
            for i, gradient in enumerate(of_part):
                if gradient is not None:
                    dense = tf.convert_to_tensor(gradient)
                    sums[i] = dense if sums[i] is None else sums[i] + dense
        return sums


@contextlib.contextmanager
def collected(weights: Sequence[tf.Variable], tape: tf.GradientTape) -> Iterator[WeightStatistics]:
    """Returns a context in which `of_weights` hands its tensors to a WeightStatistics."""
    before = getattr(_collecting, "now", None)
    _collecting.now = WeightStatistics(weights, tape)
    try:
        yield _collecting.now
    finally:
        _collecting.now = before


def of_weights(function: Callable[[], Sequence[tf.Tensor]]) -> list[tf.Tensor]:
    """Returns `function`'s tensors, which must depend on weights alone, and not on the batch."""
    now = getattr(_collecting, "now", None)
    return list(function()) if now is None else now.add(function)
