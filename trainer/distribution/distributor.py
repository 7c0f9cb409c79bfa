"""The interface between the training code and its workers.

A *process* has a rank. A *shard* is one replica of the model: a process drives one or more of them
(one a GPU), and each takes its slice of every global batch.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.distribution.watchdog import Watchdog

SMALL_NUMBERS = 1 << 16  # of a sum whose cost is its hops, not its bytes
_INTEGERS = {tf.float32: tf.int32, tf.float64: tf.int64}  # of the same number of bits


class Distributor:
    """The workers of a run, as the training code sees them.

    `run`, `sum_over_processes`, `barrier`, `gather_objects` and `broadcast_arrays` are collectives:
    every process calls them, in the same order.

    Attributes:
        rank: Index of this process; 0 is the chief.
        size: Number of processes.
        num_local_shards: Model replicas in this process.
        watchdog: Finds hung workers.
    """

    def __init__(
        self, rank: int, size: int, num_local_shards: int = 1, watchdog: Watchdog | None = None
    ):
        self.rank = rank
        self.size = size
        self.num_local_shards = num_local_shards
        self.watchdog = watchdog or Watchdog(rank, size)
        self._sums: dict[type, Callable[[np.ndarray], tf.Tensor]] = {
            dtype: tf.function(
                self._sum, input_signature=[tf.TensorSpec([None], dtype)], autograph=False
            )
            for dtype in (np.float32, np.float64)
        }

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which models and optimizers must be made."""
        raise NotImplementedError

    def run(self, step: Callable[..., Any], *args: Any) -> Any:
        """Runs `step(*args)` once on each local shard, inside a tf.function.

        Returns:
            The first shard's result.
        """
        self.watchdog.tracing()
        return self._run(step, *args)

    def local_shard(self) -> int | tf.Tensor:
        """Returns, inside `step`, the index of the shard among this process's shards."""
        raise NotImplementedError

    def shard(self) -> int | tf.Tensor:
        """Returns, inside `step`, the index of the shard among those of all processes."""
        return self.local_shard() + self.rank * self.num_local_shards

    def all_reduce_sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns, inside `step`, each tensor summed over all shards of all processes.

        Tensors of one type are one collective.
        """
        if self.num_shards == 1:
            return list(tensors)
        return self.watchdog.counted(self._all_reduce_sum, tensors, self._is_first_shard())

    def row_counts(self, slices: Sequence[tf.IndexedSlices], dtype: tf.DType) -> tf.Tensor:
        """Returns, inside `step`, [shards, slices]: this shard's numbers of rows, 0 for the others.

        Their sum over all shards is what `all_gather_rows` needs. It travels with other sums.
        """
        counts = tf.cast([tf.size(each.indices) for each in slices], dtype)
        return tf.one_hot(self.shard(), self.num_shards, dtype=dtype)[:, None] * counts

    def all_gather_rows(
        self, slices: Sequence[tf.IndexedSlices], counts: tf.Tensor
    ) -> list[tf.IndexedSlices]:
        """Returns, inside `step`, the rows of all shards, ordered by shard; in one collective.

        Shards may have different numbers of rows, or none. Values and indices arrive as they are,
        bit by bit.

        Args:
            slices: With values [rows, ...] of the same type, float32 or float64.
            counts: [shards, slices], the sum of all shards' `row_counts`.
        """
        if self.num_shards == 1:
            return list(slices)
        counts = tf.cast(counts, tf.int32)
        capacities = tf.unstack(_rounded_up(tf.reduce_max(counts, axis=0)), num=len(slices))
        parts = [_with_indices(each) for each in slices]
        padded = [
            tf.reshape(tf.pad(part, [[0, capacity - tf.shape(part)[0]], [0, 0]]), [-1])
            for part, capacity in zip(parts, capacities, strict=True)
        ]
        gathered = self.watchdog.counted(
            lambda flat: self._all_gather(flat[0]), [tf.concat(padded, 0)], self._is_first_shard()
        )
        received = tf.split(gathered, [tf.size(part) for part in padded], axis=1)
        found = []
        for i, each in enumerate(slices):
            rows = tf.reshape(received[i], [self.num_shards, capacities[i], parts[i].shape[1]])
            rows = tf.boolean_mask(rows, tf.sequence_mask(counts[:, i], capacities[i]))
            values = tf.reshape(rows[:, :-1], [-1, *each.values.shape[1:]])
            indices = tf.cast(tf.bitcast(rows[:, -1], _INTEGERS[rows.dtype]), each.indices.dtype)
            found.append(tf.IndexedSlices(values, indices, each.dense_shape))
        return found

    def _run(self, step: Callable[..., Any], *args: Any) -> Any:
        raise NotImplementedError

    def _all_reduce_sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        # One buffer per type fixes the order of additions.
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        sums: list[tf.Tensor] = [None] * len(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = tf.concat([tf.reshape(tensors[i], [-1]) for i in chosen], axis=0)
            parts = tf.split(self._summed(flat), [tf.size(tensors[i]) for i in chosen])
            for i, part in zip(chosen, parts, strict=True):
                sums[i] = tf.ensure_shape(tf.reshape(part, tf.shape(tensors[i])), tensors[i].shape)
        return sums

    def _summed(self, flat: tf.Tensor) -> tf.Tensor:
        size = flat.shape[0]
        if self.size == self.num_shards == 2 and size is not None and size <= SMALL_NUMBERS:
            # One hop instead of two, as many bytes, and one order of additions.
            return tf.reduce_sum(self._all_gather(flat), axis=0)
        return self._all_reduce(flat)

    def _all_reduce(self, flat: tf.Tensor) -> tf.Tensor:
        """Returns, inside `step`, the sum of all shards' vectors of one size."""
        raise NotImplementedError

    def _all_gather(self, flat: tf.Tensor) -> tf.Tensor:
        """Returns, inside `step`, [shards, size]: the vectors, of one size, of all shards."""
        raise NotImplementedError

    @property
    def is_chief(self) -> bool:
        """True in the one process that reads and writes files and prints."""
        return self.rank == 0

    @property
    def num_shards(self) -> int:
        """Model replicas over all processes."""
        return self.size * self.num_local_shards

    def sum_over_processes(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns each float array summed over all processes; call it outside of `step`."""
        if self.size == 1:
            return [np.asarray(array) for array in arrays]
        found: dict[int, np.ndarray] = {}
        for dtype, summed in self._sums.items():
            chosen = [i for i, array in enumerate(arrays) if array.dtype == dtype]
            if not chosen:
                continue
            # One flat array, so that all shapes share a graph.
            flat = summed(np.concatenate([arrays[i].ravel() for i in chosen])).numpy()
            stops = np.cumsum([arrays[i].size for i in chosen])
            for i, part in zip(chosen, np.split(flat, stops[:-1]), strict=True):
                found[i] = part.reshape(arrays[i].shape)
        return [found[i] for i in range(len(arrays))]

    def _sum(self, flat: tf.Tensor) -> tf.Tensor:
        def step(flat: tf.Tensor) -> tf.Tensor:
            # Only one shard of a process contributes, so that each process counts once.
            return self.all_reduce_sum([flat * tf.cast(self._is_first_shard(), flat.dtype)])[0]

        return self.run(step, flat)

    def _is_first_shard(self) -> tf.Tensor:
        """Returns, inside `step`, whether the shard is the first of this process."""
        return tf.equal(self.local_shard(), 0)

    def barrier(self) -> None:
        """Waits until every process has called it."""
        self.sum_over_processes([np.zeros(1, np.float32)])

    def gather_objects(self, value: Any) -> list[Any]:
        """Returns every process's `value` (anything that JSON can hold), by rank."""
        payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = np.zeros(self.size, np.float32)
        lengths[self.rank] = len(payload)
        (lengths,) = self.sum_over_processes([lengths])
        # Bytes travel as float32, which holds them exactly and which every backend can sum.
        rows = np.zeros((self.size, int(lengths.max())), np.float32)
        rows[self.rank, : len(payload)] = payload
        (rows,) = self.sum_over_processes([rows])
        return [
            json.loads(row[: int(length)].astype(np.uint8).tobytes())
            for row, length in zip(rows, lengths, strict=True)
        ]

    def broadcast_arrays(self, arrays: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Returns the chief's arrays, in every process; integers must be within 2**53.

        Args:
            arrays: The chief's; ignored in other processes, which may pass None.
        """
        if arrays is not None and self.size == 1:
            return dict(arrays)
        held = arrays if self.is_chief else None
        known = None if held is None else {k: [str(v.dtype), [*v.shape]] for k, v in held.items()}
        spec = self.gather_objects(known)[0]
        # Adding zeros is exact for every value but -0.0, which becomes 0.0 in all processes alike.
        mine = [
            (np.zeros(shape) if held is None else held[name]).astype(_travelling_dtype(dtype))
            for name, (dtype, shape) in spec.items()
        ]
        received = self.sum_over_processes(mine)
        return {
            name: array.astype(dtype)
            for (name, (dtype, _)), array in zip(spec.items(), received, strict=True)
        }


def _rounded_up(counts: tf.Tensor) -> tf.Tensor:
    """Returns numbers of rows, at least 1, rounded up to four binary digits.

    Both backends remember what they agreed for a size, so steps should share sizes. TensorFlow's
    ring crashes on empty tensors.
    """
    bits = tf.bitcast(tf.cast(tf.maximum(counts, 1), tf.float32), tf.int32)
    last = 1 << 20  # the third digit after the leading one, of 23
    bits = tf.bitwise.bitwise_and(bits + (last - 1), -last)
    return tf.cast(tf.bitcast(bits, tf.float32), tf.int32)


def _with_indices(slices: tf.IndexedSlices) -> tf.Tensor:
    """Returns the values, and in one more column the bits of the indices: [rows, width + 1]."""
    values = tf.reshape(slices.values, [-1, math.prod(slices.values.shape[1:])])
    indices = tf.bitcast(tf.cast(slices.indices, _INTEGERS[values.dtype]), values.dtype)
    return tf.concat([values, indices[:, None]], axis=1)


def _travelling_dtype(dtype: str) -> np.dtype:
    """Returns a float type that holds every value of `dtype`; some backends cannot sum integers."""
    return np.dtype(dtype) if np.issubdtype(np.dtype(dtype), np.floating) else np.dtype("float64")


def update_each_copy(
    variable: keras.Variable, update: Callable[..., Any], *args: tf.Tensor
) -> None:
    """Runs, inside a step, `update(copy, *args)` for each shard's copy of `variable`.

    `update` may assign to that copy, and to variables that are placed with it.
    """

    def each(strategy: tf.distribute.Strategy, *args: Any) -> None:
        strategy.extended.update(variable.value, update, args=args, group=False)

    tf.distribute.get_replica_context().merge_call(each, args=args)
