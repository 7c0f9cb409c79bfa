"""The gradients of one shard's rows: at once, or in micro-batches to save memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import tensorflow as tf

from trainer.distribution.weight_statistics import WeightStatistics, collected

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices
# (rows, slice) -> summed loss, its weight, and the state at the rows' ends if rows have `carried`.
# Rows are tokens, lengths, labels, weights; the number of the slice seeds random draws.
MicroBatchLoss = Callable[[dict[str, tf.Tensor], int | tf.Tensor], tuple[tf.Tensor, ...]]


class ShardGradients(NamedTuple):
    """What a shard's rows give.

    Attributes:
        loss, weight: The summed loss, and its weight.
        gradients: Of the loss, in the variables; what they have through `statistics` is left out.
        carried: The state that rows carry on: [rows, ...] or none.
        statistics: The statistics of the weights that the loss reads.
        of_statistics: The gradients of the loss in these.
    """

    loss: tf.Tensor
    weight: tf.Tensor
    gradients: list[Gradient]
    carried: list[tf.Tensor]
    statistics: WeightStatistics | None = None
    of_statistics: list[tf.Tensor] = []  # noqa: RUF012 (never changed)

    def through_statistics(self, upstream: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
        """Returns the gradients in the variables through the statistics; None: there is none.

        Args:
            upstream: `of_statistics`, or their sum over all shards.
        """
        if self.statistics is None:
            return [None] * len(self.gradients)
        return self.statistics.gradients(upstream)


def loss_and_gradients(
    loss_sum: MicroBatchLoss,
    variables: Sequence[tf.Variable],
    rows: dict[str, tf.Tensor],
    shard: int | tf.Tensor,
    parts: int = 1,
) -> ShardGradients:
    """Returns the summed loss of `rows`, its weight and its gradients, inside a step.

    Args:
        rows: Tensors whose first axis is the examples.
        parts: Number of micro-batches. The result is that of one batch up to rounding, except for
            random draws. With several, no statistics are kept apart: a loop computes them.
    """
    if parts > 1:
        return _in_parts(loss_sum, variables, rows, shard, parts)
    # What is frozen is not watched, so that layers keep no activations for it.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(variables)
        with collected(variables, tape) as statistics:
            loss, weight, *carried = loss_sum(rows, shard)
    gradients, found = tape.gradient(loss, [list(variables), statistics.leaves])
    for variable, gradient in zip(variables, gradients, strict=True):
        if isinstance(gradient, tf.Tensor):
            # TensorFlow's loops of an LSTM leave some sizes open; what travels needs them.
            gradient.set_shape(variable.shape)
    of_statistics = [
        tf.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(statistics.leaves, found, strict=True)
    ]
    return ShardGradients(loss, weight, gradients, carried, statistics, of_statistics)


def _in_parts(
    loss_sum: MicroBatchLoss,
    variables: Sequence[tf.Variable],
    rows: dict[str, tf.Tensor],
    shard: int | tf.Tensor,
    parts: int,
) -> ShardGradients:
    """Adds up the gradients of micro-batches; the indices of sparse ones are kept."""
    count = tf.shape(rows["lengths"])[0]
    sparse: list[bool] = []

    def add_part(
        part: tf.Tensor,
        loss: tf.Tensor,
        weight: tf.Tensor,
        sums: list[tf.Tensor],
        touched: list[tf.TensorArray],
        carried: list[tf.TensorArray],
    ) -> tuple[Any, ...]:
        start, stop = count * part // parts, count * (part + 1) // parts
        some = {name: tensor[start:stop] for name, tensor in rows.items()}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            part_loss, part_weight, *handed_on = loss_sum(some, shard * parts + part)
        gradients = tape.gradient(part_loss, variables)
        sparse[:] = [isinstance(gradient, tf.IndexedSlices) for gradient in gradients]
        sums = [total + dense(gradient) for total, gradient in zip(sums, gradients, strict=True)]
        touched = [
            array.write(part, tf.cast(gradient.indices, tf.int64)) if is_sparse else array
            for array, gradient, is_sparse in zip(touched, gradients, sparse, strict=True)
        ]
        carried = [a.write(part, rows) for a, rows in zip(carried, handed_on, strict=True)]
        return part + 1, loss + part_loss, weight + part_weight, sums, touched, carried

    def arrays(dtype: tf.DType, shape: list[int | None]) -> tf.TensorArray:
        return tf.TensorArray(dtype, parts, infer_shape=False, element_shape=shape)

    zero = tf.zeros([], variables[0].dtype)
    start = rows.get("carried")
    carried = [] if start is None else [arrays(start.dtype, [None, *start.shape[1:]])]
    touched = [arrays(tf.int64, [None]) for _ in variables]
    _, loss, weight, sums, touched, carried = tf.while_loop(
        lambda part, *_: part < parts,
        add_part,
        (0, zero, zero, [tf.zeros_like(v) for v in variables], touched, carried),
        parallel_iterations=1,
    )
    gradients = [
        only_rows(total, array.concat()) if is_sparse else total
        for total, array, is_sparse in zip(sums, touched, sparse, strict=True)
    ]
    return ShardGradients(loss, weight, gradients, [array.concat() for array in carried])


def dense(gradient: Gradient) -> tf.Tensor:
    """Returns the gradient as one tensor; rows of the same index are added up."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows = int(tf.get_static_value(gradient.dense_shape)[0])
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows)


def added(gradients: Sequence[Gradient], others: Sequence[tf.Tensor | None]) -> list[Gradient]:
    """Returns the sums of gradients and dense ones, if there are."""
    return [
        gradient if other is None else dense(gradient) + other
        for gradient, other in zip(gradients, others, strict=True)
    ]


def distinct_rows(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """Returns the same gradient with each index once, in order of appearance."""
    indices, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, positions, tf.size(indices))
    return tf.IndexedSlices(values, indices, gradient.dense_shape)


def only_rows(gradient: tf.Tensor, indices: tf.Tensor) -> tf.IndexedSlices:
    """Returns the rows of `gradient` at `indices`, which may repeat; all others must be zero."""
    indices = tf.unique(indices)[0]
    shape = tf.shape(gradient, tf.int64)
    return tf.IndexedSlices(tf.gather(gradient, indices), indices, shape)


def divided(gradient: Gradient, divisor: tf.Tensor) -> Gradient:
    """Returns `gradient` / `divisor`."""
    divisor = tf.cast(divisor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / divisor, gradient.indices, gradient.dense_shape)
    return gradient / divisor


def norms_of(gradients: Sequence[Gradient]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the global norm of the gradients, a scalar, and the norm of each, [gradients]."""
    # The sums of tf.linalg.global_norm, which does not return the norm of each.
    halves = tf.stack(
        [tf.nn.l2_loss(g.values if isinstance(g, tf.IndexedSlices) else g) for g in gradients]
    )
    return tf.sqrt(2 * tf.reduce_sum(halves)), tf.sqrt(2 * halves)
