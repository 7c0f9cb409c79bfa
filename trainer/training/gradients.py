"""The gradients of one shard's rows: all at once, or in parts to save memory."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices
# rows (tokens, lengths, labels, weights), slice -> the summed loss and its weight; the slice is a
# number that random draws depend on. Where rows have `carried`, it returns that of each row too, as
# it is at the row's end.
LossSum = Callable[[dict[str, tf.Tensor], int | tf.Tensor], tuple[tf.Tensor, ...]]


def loss_and_gradients(
    loss_sum: LossSum,
    variables: Sequence[tf.Variable],
    rows: dict[str, tf.Tensor],
    shard: int | tf.Tensor,
    parts: int = 1,
) -> tuple[tf.Tensor, tf.Tensor, list[Gradient], list[tf.Tensor]]:
    """Returns the summed loss of `rows`, its weight, and the loss's gradients, inside a step.

    The last result is what rows carry on, [rows, ...]; a list of none where they carry nothing.

    Args:
      rows: tensors of which the first axis is the examples.
      parts: how many slices of the rows are worked through, one after the other. The result is
        that of one slice, up to rounding, but for random draws.
    """

    def of_slice(
        some: dict[str, tf.Tensor], number: int | tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[Gradient], list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            loss, weight, *carried = loss_sum(some, number)
        return loss, weight, tape.gradient(loss, variables), carried

    if parts == 1:
        return of_slice(rows, shard)

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
        part_loss, part_weight, gradients, handed_on = of_slice(some, shard * parts + part)
        sparse[:] = [isinstance(gradient, tf.IndexedSlices) for gradient in gradients]
        sums = [total + dense(gradient) for total, gradient in zip(sums, gradients, strict=True)]
        touched = [
            array.write(part, tf.cast(gradient.indices, tf.int64)) if is_sparse else array
            for array, gradient, is_sparse in zip(touched, gradients, sparse, strict=True)
        ]
        carried = [a.write(part, rows) for a, rows in zip(carried, handed_on, strict=True)]
        return part + 1, loss + part_loss, weight + part_weight, sums, touched, carried

    dtype = variables[0].dtype
    touched = [
        tf.TensorArray(tf.int64, parts, infer_shape=False, element_shape=[None]) for _ in variables
    ]
    carried = []
    if (start := rows.get("carried")) is not None:
        shape = [None, *start.shape[1:]]
        carried = [tf.TensorArray(start.dtype, parts, infer_shape=False, element_shape=shape)]
    _, loss, weight, sums, touched, carried = tf.while_loop(
        lambda part, *_: part < parts,
        add_part,
        (
            0,
            tf.zeros([], dtype),
            tf.zeros([], dtype),
            [tf.zeros_like(v) for v in variables],
            touched,
            carried,
        ),
        parallel_iterations=1,
    )
    return (
        loss,
        weight,
        [
            only_rows(total, array.concat()) if is_sparse else total
            for total, array, is_sparse in zip(sums, touched, sparse, strict=True)
        ],
        [array.concat() for array in carried],
    )


def dense(gradient: Gradient) -> tf.Tensor:
    """Returns the gradient as one tensor; rows of the same index are added up."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows = int(tf.get_static_value(gradient.dense_shape)[0])
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows)


def distinct_rows(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """Returns the same gradient with each index once, in order of appearance."""
    indices, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, positions, tf.size(indices))
    return tf.IndexedSlices(values, indices, gradient.dense_shape)


def only_rows(gradient: tf.Tensor, indices: tf.Tensor) -> tf.IndexedSlices:
    """Returns the rows of `gradient` that `indices`, with repetitions, name; the rest is zero."""
    indices = tf.unique(indices)[0]
    shape = tf.shape(gradient, tf.int64)
    return tf.IndexedSlices(tf.gather(gradient, indices), indices, shape)


def divided(gradient: Gradient, divisor: tf.Tensor) -> Gradient:
    """Returns `gradient` / `divisor`."""
    divisor = tf.cast(divisor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / divisor, gradient.indices, gradient.dense_shape)
    return gradient / divisor
