import numpy as np
import pytest
import tensorflow as tf

from trainer.training.gradients import ShardGradients, dense
from trainer.training.lazy_rows import trace_gradients
from trainer.training.reduction import (
    choose_rows,
    dense_bytes,
    reduce_gradients,
    row_bytes,
    rows_to_send,
)

WIDTH = 2


def gradients_of(distributor: object, vocab_size: int) -> tuple:
    """Returns a table's gradient, other rows on each shard and one row on both; a whole one."""
    first = 2 * distributor.local_shard()
    indices = tf.cast(tf.stack([first, first + 1, first + 1, vocab_size - 1]), tf.int64)
    values = tf.reshape(tf.range(4.0 * WIDTH), [4, WIDTH]) + tf.cast(first, tf.float32)
    table = tf.IndexedSlices(values, indices, tf.constant([vocab_size, WIDTH], tf.int64))
    return table, tf.fill([3], 1.0 + tf.cast(first, tf.float32))


def reduced_by(
    distributor: object, gradients: tuple, as_rows: list[bool], compress: str
) -> list[tf.Tensor]:
    gradients, counts = rows_to_send(distributor, gradients, as_rows, tf.float32)
    (counts,) = distributor.all_reduce_sum([counts])
    return reduce_gradients(distributor, gradients, as_rows, counts, compress)


@pytest.mark.parametrize("compress", ["none", "fp16", "bf16"])
@pytest.mark.parametrize("as_rows", [False, True])
def test_shards_are_summed_whichever_way(two_shards: object, as_rows: bool, compress: str) -> None:
    def reduced() -> list[tf.Tensor]:
        return reduced_by(two_shards, gradients_of(two_shards, 10), [as_rows, False], compress)

    table, whole = tf.function(lambda: two_shards.run(reduced))()
    expected = np.zeros((10, WIDTH), np.float32)
    for first in (0, 2):
        values = np.arange(4.0 * WIDTH).reshape(4, WIDTH) + first
        for row, index in zip(values, [first, first + 1, first + 1, 9], strict=True):
            expected[index] += row
    np.testing.assert_array_equal(table, expected)  # small whole numbers: exact in every type
    np.testing.assert_array_equal(whole, [4, 4, 4])


@pytest.mark.parametrize(("vocab_size", "rows"), [(4, False), (1000, True)])
def test_auto_takes_the_fewer_bytes(two_shards: object, vocab_size: int, rows: bool) -> None:
    batches = tf.data.Dataset.from_tensors(0)
    sizes = [(4 * WIDTH * vocab_size, 4 * (WIDTH + 1)), (12, 8)]

    def shard(_: tf.Tensor) -> ShardGradients:
        zero = tf.zeros([])
        return ShardGradients(zero, zero, list(gradients_of(two_shards, vocab_size)), [])

    traced = trace_gradients(two_shards, [], shard, batches.element_spec)

    def chosen(policy: str) -> list[bool]:
        return choose_rows(two_shards, policy, traced.is_sparse, traced.count_rows, batches, sizes)

    assert chosen("auto") == [rows, False]
    assert chosen("rows") == [True, False]
    assert chosen("dense") == [False, False]
    # Three distinct rows a shard, of two shards.
    assert row_bytes(3, 4 * (WIDTH + 1), two_shards) == 3 * 12
    assert dense_bytes(100, two_shards) == 100


def test_auto_counts_the_mean_of_two_processes_and_sends_a_tie_whole() -> None:
    class Two:
        num_shards = size = 2

        def sum_over_processes(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
            return [2 * array for array in arrays]

    sizes = [(101, 10), (100, 10), (99, 10)]  # ten rows of ten bytes, or the whole
    chosen = choose_rows(Two(), "auto", [True] * 3, lambda batch: [10] * 3, [{}], sizes)
    assert chosen == [True, False, False]


def test_one_shard_sends_nothing() -> None:
    from trainer.distribution.tf_distribute import one_device

    distributor = one_device()
    table, whole = gradients_of(distributor, 10)
    reduced = distributor.run(
        lambda: reduced_by(distributor, (table, whole), [False, False], "fp16")
    )
    np.testing.assert_array_equal(reduced[0], dense(table))
    np.testing.assert_array_equal(reduced[1], whole)
