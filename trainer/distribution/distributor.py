"""The one seam between the training code and the way in which workers are run.

Two words. A *process* has a rank; a *shard* is one replica of the model: a process drives one
or more of them (one a GPU), and each takes its slice of every global batch.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from trainer.distribution.cluster import Cluster, distributor_faults


class Distributor(Protocol):
    """What the training code may ask of the workers.

    Attributes:
      rank: index of this process; 0 is the chief.
      size: number of processes.
      num_local_shards: model replicas in this process.
    """

    rank: int
    size: int
    num_local_shards: int

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which models and optimizers must be made."""

    def run(self, step: Callable[..., Any], *args: Any) -> Any:
        """Runs `step(*args)` once on each local shard (inside a tf.function); returns the first
        shard's result."""

    def local_shard(self) -> int | tf.Tensor:
        """Returns, inside `step`, the index of the shard among this process's shards."""

    def all_reduce_sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns, inside `step`, each tensor summed over all shards of all processes."""

    def all_gather_rows(self, values: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns, inside `step`, all shards' values [rows, width] and indices [rows], by shard.

        Each shard may have another number of rows, none as well."""

    def sum_over_processes(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns each float array summed over all processes; outside of `step`."""


def sum_flat(
    arrays: Sequence[np.ndarray], sums: Mapping[type, Callable[[np.ndarray], tf.Tensor]]
) -> list[np.ndarray]:
    """Returns each array summed over all processes, by one call a type.

    Args:
      sums: for float32 and float64, a function that sums one flat array over the processes.
    """
    found: dict[int, np.ndarray] = {}
    for dtype, summed in sums.items():
        chosen = [i for i, array in enumerate(arrays) if array.dtype == dtype]
        if not chosen:
            continue
        # One flat array, so that arrays of other shapes need no other graph.
        flat = summed(np.concatenate([arrays[i].ravel() for i in chosen])).numpy()
        stops = np.cumsum([arrays[i].size for i in chosen])
        for i, part in zip(chosen, np.split(flat, stops[:-1]), strict=True):
            found[i] = part.reshape(arrays[i].shape)
    return [found[i] for i in range(len(arrays))]


def is_chief(distributor: Distributor) -> bool:
    """Returns True in the one process that reads, writes and speaks."""
    return distributor.rank == 0


def num_shards(distributor: Distributor) -> int:
    """Returns the number of model replicas over all processes."""
    return distributor.size * distributor.num_local_shards


def barrier(distributor: Distributor) -> None:
    """Returns when every process has come here."""
    distributor.sum_over_processes([np.zeros(1, np.float32)])


def gather_objects(distributor: Distributor, value: Any) -> list[Any]:
    """Returns every process's `value` (anything that JSON can hold), by rank."""
    payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.zeros(distributor.size, np.float32)
    lengths[distributor.rank] = len(payload)
    (lengths,) = distributor.sum_over_processes([lengths])
    # Bytes travel as float32, which holds them exactly and which every backend can sum.
    rows = np.zeros((distributor.size, int(lengths.max())), np.float32)
    rows[distributor.rank, : len(payload)] = payload
    (rows,) = distributor.sum_over_processes([rows])
    return [
        json.loads(row[: int(length)].astype(np.uint8).tobytes())
        for row, length in zip(rows, lengths, strict=True)
    ]


def broadcast_arrays(
    distributor: Distributor, arrays: dict[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Returns the chief's arrays, in every process; integers must be within 2**53.

    Args:
      arrays: the chief's; other processes pass None and need to know nothing of them.
    """
    if arrays is not None and distributor.size == 1:
        return dict(arrays)
    held = arrays if is_chief(distributor) else None
    known = None if held is None else {k: [str(v.dtype), list(v.shape)] for k, v in held.items()}
    spec = gather_objects(distributor, known)[0]
    # Adding zeros is exact for every value but -0.0, which becomes 0.0 in all processes alike.
    mine = [
        (np.zeros(shape) if held is None else held[name]).astype(_travelling_dtype(dtype))
        for name, (dtype, shape) in spec.items()
    ]
    received = distributor.sum_over_processes(mine)
    return {
        name: array.astype(dtype)
        for (name, (dtype, _)), array in zip(spec.items(), received, strict=True)
    }


def _travelling_dtype(dtype: str) -> np.dtype:
    """Returns a float type that holds every value of `dtype`: not every backend sums integers."""
    return np.dtype(dtype) if np.issubdtype(np.dtype(dtype), np.floating) else np.dtype("float64")


def reduce_inside_step_only(optimizer: keras.optimizers.Optimizer) -> None:
    """Stops `optimizer.apply` from summing the gradients over the replicas a second time.

    Under a tf.distribute strategy Keras 3 reduces by itself in `apply`. The training step must
    reduce before that (the global norm needs the sum), and a second reduction multiplies the
    gradients by the number of replicas, which Adam hides and SGD does not.
    """
    if not hasattr(optimizer, "_all_reduce_sum_gradients"):
        raise RuntimeError(
            f"Keras {keras.__version__} reduces gradients in another place than "
            "_all_reduce_sum_gradients; see trainer/distribution/distributor.py"
        )
    optimizer._all_reduce_sum_gradients = list


def update_each_copy(
    variable: keras.Variable, update: Callable[..., Any], *args: tf.Tensor
) -> None:
    """Runs, inside a step, `update(copy, *args)` where each shard's copy of `variable` is.

    There it may assign to that copy, and to variables that are placed with it.
    """

    def each(strategy: tf.distribute.Strategy, *args: Any) -> None:
        strategy.extended.update(variable.value, update, args=args, group=False)

    tf.distribute.get_replica_context().merge_call(each, args=args)


def make_distributor(kind: str, cluster: Cluster, collective_timeout_seconds: float) -> Distributor:
    """Returns the distributor of `kind`, one of config.DISTRIBUTORS.

    "auto" is horovod or multi_worker where the environment names peers, else one_device.

    Raises:
      InputError: `kind` does not fit the environment.
    """
    from trainer.distribution import horovod, tf_distribute

    if faults := distributor_faults(kind, cluster):
        raise InputError("\n".join(faults))
    if kind == "auto":
        several = "horovod" if cluster.horovod else "multi_worker"
        kind = several if cluster.size > 1 else "one_device"
    if kind == "horovod":
        return horovod.horovod(cluster, collective_timeout_seconds)
    if kind == "multi_worker":
        return tf_distribute.multi_worker(cluster, collective_timeout_seconds)
    if kind == "mirrored":
        return tf_distribute.mirrored()
    return tf_distribute.one_device()
