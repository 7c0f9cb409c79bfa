"""Makes a `tf.data` pipeline of this process's slice of each global batch.

An element is a dict of:

  tokens      int32 [rows, time], right-padded with 0
  lengths     int32 [rows]
  labels      int32 [rows], -1 for unlabelled examples and packed rows
  contexts    int32 [rows], -1 for unknown ones; if the view has contexts and rows are examples
  weights     float32 [rows], 1 for an example and 0 for padding
  row_starts  int32 [num_local_shards + 1]: shard i's rows are row_starts[i:i + 2]
  carries     float32 [rows], 1 if the row continues the example of the same row of the step before,
              0 if it begins with a new example; with a `carried` plan, whose rows without tokens at
              an epoch's end are padding
  step        int64 []
"""

import numpy as np
import tensorflow as tf

from data_pipelines.batches.batch_plan import BatchPlan, PackedPlan, shard_rows
from data_pipelines.reserved_ids import END_ID, PADDING_ID
from data_pipelines.store.manifest import NO_CONTEXT, NO_LABEL
from data_pipelines.store.split_view import SplitView

# Batches pad to a multiple of this, so that compiled kernels see few different shapes.
TIME_MULTIPLE = 8
# Copying holds Python's lock: a second call only hides the first one's waits.
PARALLEL_BATCHES = 2
REMOTE_BATCHES = 16  # that are read at once where tokens are at an address: they wait for answers
TYPES = {
    "tokens": tf.int32,
    "lengths": tf.int32,
    "labels": tf.int32,
    "weights": tf.float32,
    "row_starts": tf.int32,
}


def make_dataset(
    view: SplitView,
    plan: BatchPlan | PackedPlan,
    *,
    start_step: int,
    stop_step: int,
    first_shard: int,
    num_local_shards: int,
    num_shards: int,
    prefetch_batches: int = 4,
) -> tf.data.Dataset:
    """Returns a dataset with one element a step, from `start_step` to `stop_step` - 1.

    A global batch is cut into `num_shards` slices; an element holds the `num_local_shards` slices
    from `first_shard` on. A shard whose slice is empty gets one padding row, [END_ID, 0, ...] of
    length 1, label 0 and weight 0, so that every shard runs the same computation. Every process
    has the same `time`: the longest row of the global batch, rounded up to a multiple of 8.

    Args:
        plan: made of `view`. Its `max_tokens` is the width: of a longer example a `BatchPlan`
            keeps the LAST tokens, a `PackedPlan` all, in several rows.
        start_step: a global step, anywhere in an epoch.
        first_shard: this process's first one of `num_shards`.
        prefetch_batches: batches prepared ahead.

    Raises:
        ValueError: the plan is of another view, or the shards do not exist.
    """
    _check(view, plan, first_shard, num_local_shards, num_shards)
    shards = range(first_shard, first_shard + num_local_shards)
    types = _types(view, plan)

    def read(step: np.int64) -> list[np.ndarray]:
        if isinstance(plan, PackedPlan):
            arrays = read_packed(view, plan, int(step), shards, num_shards)
        else:
            arrays = read_bucketed(view, plan, int(step), shards, num_shards)
        return [arrays[name] for name in types]

    @tf.autograph.experimental.do_not_convert
    def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
        arrays = tf.numpy_function(read, [step], list(types.values()), stateful=False)
        element = dict(zip(types, arrays, strict=True))
        for name in types:
            element[name].set_shape([None, None] if name == "tokens" else [None])
        element["row_starts"].set_shape([num_local_shards + 1])
        return {**element, "step": step}

    return (
        tf.data.Dataset.range(start_step, stop_step)
        .map(load, num_parallel_calls=REMOTE_BATCHES if view.is_remote else PARALLEL_BATCHES)
        .prefetch(prefetch_batches)
        .with_options(_options(view.is_remote))
    )


def _check(
    view: SplitView,
    plan: BatchPlan | PackedPlan,
    first_shard: int,
    num_local_shards: int,
    num_shards: int,
) -> None:
    if plan.num_examples != len(view):
        raise ValueError(f"a plan of {plan.num_examples} examples for a view of {len(view)}")
    if num_local_shards < 1 or not 0 <= first_shard <= num_shards - num_local_shards:
        raise ValueError(
            f"shards {first_shard} .. {first_shard + num_local_shards - 1} of {num_shards}"
        )


def _types(view: SplitView, plan: BatchPlan | PackedPlan) -> dict[str, tf.DType]:
    """Returns the types of an element's arrays by name."""
    if isinstance(plan, PackedPlan):
        return TYPES | ({"carries": tf.float32} if plan.carried else {})
    return TYPES | ({"contexts": tf.int32} if view.has_contexts else {})


def _options(is_remote: bool) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    # The tuning thread can miss the end of its iterator: dropping the iterator then takes up to a
    # minute. Nothing here needs tuning.
    options.autotune.enabled = False
    if is_remote:  # a step's operations must not wait for threads that wait for answers
        options.threading.private_threadpool_size = REMOTE_BATCHES
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options


def most_shapes(plan: BatchPlan | PackedPlan) -> int | None:
    """Returns how many shapes a slice's tokens have at most; None where rows vary without bound."""
    if isinstance(plan, PackedPlan):
        return 2  # an epoch's last batch has another
    return None if plan.rows_vary else 2 * padded(plan.max_tokens) // TIME_MULTIPLE


def read_bucketed(
    view: SplitView, plan: BatchPlan, step: int, shards: range, num_shards: int
) -> dict[str, np.ndarray]:
    """Returns one element of a `BatchPlan` in NumPy; the module describes the arrays.

    Args:
        plan: made of `view`.
        shards: the requested ones, of `num_shards` of all processes.
    """
    indices = plan.indices(step)
    rows, row_starts = _rows_of(len(indices), shards, num_shards)
    real = rows >= 0
    time = padded(int(plan.lengths(step).max()))
    own = view.located(indices[rows[real]])
    tokens, lengths = view.gather_located(own, plan.max_tokens, time)
    if real.all():
        arrays = {"tokens": tokens, "lengths": lengths, "labels": view.numbers("labels", own)}
        arrays |= {"weights": np.ones(len(rows), np.float32), "row_starts": row_starts}
    else:
        arrays = _padding_rows(len(rows), time, row_starts)
        arrays["tokens"][real], arrays["lengths"][real] = tokens, lengths
        arrays["labels"][real] = view.numbers("labels", own)
        arrays["weights"][real] = 1
    if view.has_contexts:
        arrays["contexts"] = np.full(len(rows), NO_CONTEXT, np.int32)
        arrays["contexts"][real] = view.numbers("contexts", own)
    return arrays


def read_packed(
    view: SplitView, plan: PackedPlan, step: int, shards: range, num_shards: int
) -> dict[str, np.ndarray]:
    """Returns one element of a `PackedPlan` in NumPy; arguments as for `read_bucketed`."""
    starts, stops = plan.ranges(step)
    rows, row_starts = _rows_of(len(starts), shards, num_shards)
    time = padded(int((stops - starts).max()))
    arrays = _padding_rows(len(rows), time, row_starts)
    real = (rows >= 0) & (starts[rows] < stops[rows])
    starts, stops = starts[rows[real]], stops[rows[real]]
    parts = plan.parts(plan.epoch_of(step), starts, stops)
    inside = np.arange(time) < (stops - starts)[:, None]
    tokens = np.full(inside.shape, PADDING_ID, np.int32)
    tokens[inside] = view.gather_parts(parts.example, parts.start, parts.stop)
    arrays["tokens"][real] = tokens
    arrays["lengths"][real] = stops - starts
    arrays["labels"][real] = NO_LABEL
    arrays["weights"][real] = 1
    inside_example = parts.start[np.searchsorted(parts.row, np.arange(len(starts)))] > 0
    arrays["carries"] = np.zeros(len(rows), np.float32)
    arrays["carries"][real] = inside_example & plan.continues(step)
    return arrays


def _rows_of(num_rows: int, shards: range, num_shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shards' rows of a global batch, -1 for padding, and row_starts."""
    slices = [np.arange(*shard_rows(num_rows, shard, num_shards)) for shard in shards]
    slices = [rows if len(rows) else np.array([-1]) for rows in slices]
    return np.concatenate(slices), np.cumsum([0, *map(len, slices)], dtype=np.int32)


def _padding_rows(num_rows: int, time: int, row_starts: np.ndarray) -> dict[str, np.ndarray]:
    tokens = np.full((num_rows, time), PADDING_ID, np.int32)
    tokens[:, 0] = END_ID
    return {
        "tokens": tokens,
        "lengths": np.ones(num_rows, np.int32),
        "labels": np.zeros(num_rows, np.int32),
        "weights": np.zeros(num_rows, np.float32),
        "row_starts": row_starts,
    }


def padded(time: int) -> int:
    """Returns the width of a batch whose longest row has `time` tokens."""
    return -(-time // TIME_MULTIPLE) * TIME_MULTIPLE
