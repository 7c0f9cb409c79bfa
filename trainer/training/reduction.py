"""Sums the gradients of all shards, sending few bytes.

The gradient of an embedding table is zero except for the rows of the batch's words. Either these
rows travel (every worker gets every other's: bytes grow with workers and words), or the whole table
is summed like any dense gradient (bytes grow with the vocabulary). `choose_rows` takes the smaller,
measured on the run's first batch. A resumed run measures the same batch, so it adds in the same
order.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from trainer.distribution.distributor import Distributor
from trainer.training.gradients import Gradient, dense, distinct_rows

COMPRESSED = {"none": None, "fp16": tf.float16, "bf16": tf.bfloat16}


def rows_to_send(
    distributor: Distributor,
    gradients: Sequence[Gradient],
    as_rows: Sequence[bool],
    dtype: tf.DType,
) -> tuple[list[Gradient], tf.Tensor]:
    """Returns, inside a step, the gradients with distinct rows where they travel as rows.

    Also returns the numbers of these rows, to be summed over all shards: [shards, tables], `dtype`.
    They depend on indices only, so they are known before the backward pass.
    """
    gradients = [
        distinct_rows(gradient) if rows else gradient
        for gradient, rows in zip(gradients, as_rows, strict=True)
    ]
    return gradients, distributor.row_counts(_chosen(gradients, as_rows), dtype)


def reduce_gradients(
    distributor: Distributor,
    gradients: Sequence[Gradient],
    as_rows: Sequence[bool],
    counts: tf.Tensor,
    compress: str = "none",
    stay_rows: Sequence[bool] | None = None,
) -> list[Gradient]:
    """Returns, inside a step, each gradient summed over all shards: dense, except `stay_rows`.

    There are two collectives: the rows of all tables, and all dense gradients. Between two shards
    there is one, as a gather then moves as many bytes as a sum.

    Args:
        gradients: This shard's, from `rows_to_send`.
        as_rows: Which ones travel as rows, from `choose_rows`.
        counts: The sum of all shards' counts from `rows_to_send`.
        compress: "none", "fp16" or "bf16": type in which dense gradients are sent and added.
        stay_rows: Which ones are returned as tf.IndexedSlices of distinct rows.
    """
    stay_rows = stay_rows or [False] * len(gradients)
    if distributor.num_shards == 1:
        return [
            distinct_rows(gradient) if stay else dense(gradient)
            for gradient, stay in zip(gradients, stay_rows, strict=True)
        ]
    tables = _chosen(gradients, as_rows)
    narrow = COMPRESSED[compress]
    whole = [dense(gradient) for gradient in _chosen(gradients, [not sent for sent in as_rows])]
    sent = [tf.cast(gradient, narrow) if narrow else gradient for gradient in whole]
    if distributor.num_shards == 2 and tables and sent and not narrow:
        rows, sums = _gathered_and_added(distributor, tables, counts, sent)
    else:
        rows = iter(distributor.all_gather_rows(tables, counts) if tables else [])
        sums = iter(distributor.all_reduce_sum(sent) if sent else [])
    return [
        (distinct_rows if stay else dense)(next(rows))
        if travels_as_rows
        else tf.cast(next(sums), gradient.dtype)
        for gradient, travels_as_rows, stay in zip(gradients, as_rows, stay_rows, strict=True)
    ]


def _gathered_and_added(
    distributor: Distributor,
    tables: Sequence[tf.IndexedSlices],
    counts: tf.Tensor,
    whole: Sequence[tf.Tensor],
) -> tuple[Iterator[tf.IndexedSlices], Iterator[tf.Tensor]]:
    """Returns the rows of both shards, and the sums of dense gradients, which travel as a row."""
    flat = tf.concat([tf.reshape(gradient, [1, -1]) for gradient in whole], 1)
    counts = tf.pad(counts, [[0, 0], [0, 1]], constant_values=1)
    row = tf.IndexedSlices(flat, tf.constant([0]))
    *rows, both = distributor.all_gather_rows([*tables, row], counts)
    parts = tf.split(tf.reduce_sum(both.values, 0), [tf.size(gradient) for gradient in whole])
    sums = [tf.reshape(part, each.shape) for part, each in zip(parts, whole, strict=True)]
    return iter(rows), iter(sums)


def choose_rows(
    distributor: Distributor,
    policy: str,
    is_sparse: Sequence[bool],
    count_rows: Callable[[dict[str, tf.Tensor]], Sequence[tf.Tensor]],
    batches: tf.data.Dataset,
    sizes: Sequence[tuple[int, int]],
) -> list[bool]:
    """Returns which gradients travel as rows; a collective, outside of a step.

    Args:
        policy: "dense", "rows" or "auto".
        is_sparse: Which gradients have a few rows; others cannot travel as rows.
        count_rows: Batch -> number of distinct rows of each gradient on this shard.
        batches: The run's first global batch.
        sizes: Bytes of each gradient, whole, and of one of its rows with its index.
    """
    if distributor.num_shards == 1 or policy == "dense":
        return [False] * len(sizes)
    if policy == "rows":
        return list(is_sparse)
    counts = [float(n) for n in count_rows(next(iter(batches)))]
    # Counts are of the first local shard, so this is a mean over processes.
    (total,) = distributor.sum_over_processes([np.array(counts, np.float32)])
    rows = total / distributor.size
    return [
        sparse and bool(row_bytes(mean, width, distributor) < dense_bytes(size, distributor))
        for sparse, mean, (size, width) in zip(is_sparse, rows, sizes, strict=True)
    ]


def dense_bytes(size: float, distributor: Distributor) -> float:
    """Returns the bytes that each shard sends to sum `size` bytes in a ring."""
    shards = distributor.num_shards
    return 2 * (shards - 1) / shards * size


def row_bytes(rows: float, width: float, distributor: Distributor) -> float:
    """Returns the bytes that each shard sends so that all have its `rows` rows of `width` bytes."""
    return (distributor.num_shards - 1) * rows * width


def _chosen(gradients: Sequence[Gradient], chosen: Sequence[bool]) -> list[Gradient]:
    return list(itertools.compress(gradients, chosen))
