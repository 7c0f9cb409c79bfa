"""Plan + store -> `tf.data`: this process's slice of each global batch."""

import numpy as np
import tensorflow as tf

from data_pipelines.batch_plan import BatchPlan, shard_rows
from data_pipelines.reserved_ids import END_ID
from data_pipelines.token_store import SplitView

# Batches pad to a multiple of this, so that compiled kernels see few different shapes.
TIME_MULTIPLE = 8
# The work is copying under Python's lock: a second call only hides the first one's waits.
PARALLEL_BATCHES = 2


def make_dataset(
    view: SplitView,
    plan: BatchPlan,
    *,
    start_step: int,
    stop_step: int,
    first_shard: int,
    num_local_shards: int,
    num_shards: int,
    max_tokens: int,
    prefetch_batches: int = 4,
) -> tf.data.Dataset:
    """Returns one element a step, from `start_step` up to but without `stop_step`.

    A global batch is cut into `num_shards` slices; this process gets `num_local_shards` of them
    from `first_shard`, one after the other in one element. A shard whose slice is empty gets one
    filler row, [END_ID, 0, ...] of length 1, label 0 and weight 0, so that every shard runs the
    same computation. Every process sees the same `time`: the longest example of the global batch
    (cut to `max_tokens`), rounded up to a multiple of 8.

    Args:
        view: the examples.
        plan: made from the lengths of these examples.
        start_step: the first global step; it need not be an epoch's first.
        stop_step: the global step to stop before.
        first_shard: this process's first shard.
        num_local_shards: how many shards this process has.
        num_shards: shards over all processes.
        max_tokens: the LAST `max_tokens` tokens of a longer example are kept.
        prefetch_batches: batches prepared ahead.

    Returns:
        Elements that are dicts of:
        `tokens` int32 [rows, time], right-padded with 0;
        `lengths` int32 [rows];
        `labels` int32 [rows], -1 where an example has none;
        `weights` float32 [rows], 1 for an example and 0 for filler;
        `row_starts` int32 [num_local_shards + 1]: shard i's rows are row_starts[i:i + 2];
        `step` int64 [].

    Raises:
        ValueError: the plan is not of this view, or there are no such shards.
    """
    if plan.num_examples != len(view):
        raise ValueError(f"a plan of {plan.num_examples} examples for a view of {len(view)}")
    if num_local_shards < 1 or not 0 <= first_shard <= num_shards - num_local_shards:
        raise ValueError(
            f"shards {first_shard} .. {first_shard + num_local_shards - 1} of {num_shards}"
        )
    shards = range(first_shard, first_shard + num_local_shards)

    def read(step: np.int64) -> tuple[np.ndarray, ...]:
        return read_batch(view, plan.indices(int(step)), shards, num_shards, max_tokens)

    def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens, lengths, labels, weights, row_starts = tf.numpy_function(
            read, [step], [tf.int32, tf.int32, tf.int32, tf.float32, tf.int32], stateful=False
        )
        return {
            "tokens": tf.ensure_shape(tokens, [None, None]),
            "lengths": tf.ensure_shape(lengths, [None]),
            "labels": tf.ensure_shape(labels, [None]),
            "weights": tf.ensure_shape(weights, [None]),
            "row_starts": tf.ensure_shape(row_starts, [num_local_shards + 1]),
            "step": step,
        }

    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return (
        tf.data.Dataset.range(start_step, stop_step)
        .map(load, num_parallel_calls=PARALLEL_BATCHES)
        .prefetch(prefetch_batches)
        .with_options(options)
    )


def read_batch(
    view: SplitView, indices: np.ndarray, shards: range, num_shards: int, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, lengths, labels, weights and row_starts of one element, in NumPy.

    Args:
        view: the examples.
        indices: the global batch, int64 [examples].
        shards: the shards wanted.
        num_shards: shards over all processes.
        max_tokens: see `make_dataset`, which describes the arrays too.
    """
    longest = min(int(view.lengths[indices].max()), max_tokens)
    time = -(-longest // TIME_MULTIPLE) * TIME_MULTIPLE
    slices = [indices[slice(*shard_rows(len(indices), s, num_shards))] for s in shards]
    filler = np.array([-1])
    rows_of = [rows if len(rows) else filler for rows in slices]
    rows = np.concatenate(rows_of)  # [rows], -1 for filler
    row_starts = np.cumsum([0] + [len(r) for r in rows_of], dtype=np.int32)
    real = rows >= 0
    if real.all():
        tokens, lengths = view.gather(rows, max_tokens, pad_to=time)
        return tokens, lengths, view.labels[rows], np.ones(len(rows), np.float32), row_starts
    tokens = np.zeros((len(rows), time), np.int32)
    lengths = np.ones(len(rows), np.int32)
    labels = np.zeros(len(rows), np.int32)
    tokens[:, 0] = END_ID
    tokens[real], lengths[real] = view.gather(rows[real], max_tokens, pad_to=time)
    labels[real] = view.labels[rows[real]]
    return tokens, lengths, labels, real.astype(np.float32), row_starts
