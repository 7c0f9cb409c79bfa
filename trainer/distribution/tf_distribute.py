"""The distributors on tf.distribute: one device, mirrored, multi-worker."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import Distributor


class TfDistributor(Distributor):
    """A Distributor over any synchronous tf.distribute strategy."""

    def __init__(self, strategy: tf.distribute.Strategy, rank: int, size: int):
        super().__init__(rank, size, strategy.num_replicas_in_sync // size)
        self._strategy = strategy

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return self._strategy.scope()

    def run(self, step: Callable[..., Any], *args: Any) -> Any:
        results = self._strategy.run(step, args=args)
        first = self._strategy.experimental_local_results
        return tf.nest.map_structure(lambda result: first(result)[0], results)

    def local_shard(self) -> int | tf.Tensor:
        context = tf.distribute.get_replica_context()
        return context.replica_id_in_sync_group - self.rank * self.num_local_shards

    def all_reduce_sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        context = tf.distribute.get_replica_context()
        # tf.distribute refuses tensors that the step received and did not compute: identity.
        tensors = [tf.identity(tensor) for tensor in tensors]
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)

    def all_gather_rows(self, values: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        context = tf.distribute.get_replica_context()
        return (
            context.all_gather(tf.identity(values), axis=0),
            context.all_gather(tf.identity(indices), axis=0),
        )


def one_device() -> TfDistributor:
    """Returns the distributor that uses the first GPU, or the CPU."""
    device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
    return TfDistributor(tf.distribute.OneDeviceStrategy(device), rank=0, size=1)


def mirrored() -> TfDistributor:
    """Returns the distributor that uses all GPUs of this process, or all its logical CPUs."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    return TfDistributor(strategy, rank=0, size=1)


def multi_worker(cluster: Cluster, collective_timeout_seconds: float) -> TfDistributor:
    """Returns the distributor of `cluster.size` processes: NCCL between GPUs, RING between CPUs.

    Args:
      cluster: with the addresses of all processes; each listens on its own.
      collective_timeout_seconds: how long a collective waits for a peer that hangs; without a
        limit it would wait for ever.
    """
    communication = tf.distribute.experimental.CommunicationImplementation
    gpus = tf.config.get_visible_devices("GPU")
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=communication.NCCL if gpus else communication.RING,
        timeout_seconds=collective_timeout_seconds,
    )
    # Not from TF_CONFIG, which only one of the platforms sets.
    addresses = {"worker": list(cluster.addresses)} if cluster.addresses else {}
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(addresses),
        task_type="worker",
        task_id=cluster.rank,
        num_accelerators={"GPU": len(gpus)},
        rpc_layer="grpc",
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        cluster_resolver=resolver, communication_options=options
    )
    return TfDistributor(strategy, rank=cluster.rank, size=cluster.size)
