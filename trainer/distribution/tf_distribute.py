"""The distributors on tf.distribute: one device, mirrored, multi-worker."""

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob
from tensorflow.python.eager import context as eager_context

from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import Distributor
from trainer.distribution.watchdog import Watchdog

_TYPES = [tf.float32, tf.float64, tf.float16, tf.bfloat16]
_FIRST_KEY = 2**30  # tf.distribute counts its own keys from 100


class TfDistributor(Distributor):
    """A Distributor over any synchronous tf.distribute strategy."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        rank: int,
        size: int,
        watchdog: Watchdog | None = None,
    ):
        super().__init__(rank, size, strategy.num_replicas_in_sync // size, watchdog)
        self._strategy = strategy

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return self._strategy.scope()

    def _run(self, step: Callable[..., Any], *args: Any) -> Any:
        results = self._strategy.run(step, args=args)
        first = self._strategy.experimental_local_results
        return tf.nest.map_structure(lambda result: first(result)[0], results)

    def local_shard(self) -> int | tf.Tensor:
        context = tf.distribute.get_replica_context()
        return context.replica_id_in_sync_group - self.rank * self.num_local_shards

    def _all_reduce(self, flat: tf.Tensor) -> tf.Tensor:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, flat)

    def _all_gather(self, flat: tf.Tensor) -> tf.Tensor:
        return tf.distribute.get_replica_context().all_gather(flat[None], axis=0)


class MultiWorkerDistributor(TfDistributor):
    """A Distributor over the processes of a MultiWorkerMirroredStrategy.

    A collective needs a key that all workers give it. tf.distribute takes a new one each time, for
    which every worker but the first sends it a request. And it gathers in two collectives, shapes
    before values. Here the size is the key, so a request is sent only for a new size.
    """

    def __init__(
        self,
        strategy: tf.distribute.MultiWorkerMirroredStrategy,
        cluster: Cluster,
        watchdog: Watchdog,
    ):
        super().__init__(strategy, cluster.rank, cluster.size, watchdog)
        self._launchers = strategy.extended._cross_device_ops._launchers

    def _all_reduce(self, flat: tf.Tensor) -> tf.Tensor:
        options = {"merge_op": "Add", "final_op": "Id"}
        return self._launch(tf.raw_ops.CollectiveReduceV2, flat, 0, **options)

    def _all_gather(self, flat: tf.Tensor) -> tf.Tensor:
        gathered = self._launch(tf.raw_ops.CollectiveGatherV2, flat, len(_TYPES))
        return tf.reshape(gathered, [self.num_shards, -1])

    def _launch(
        self, collective: Callable[..., tf.Tensor], flat: tf.Tensor, kind: int, **options: str
    ) -> tf.Tensor:
        launcher = self._launchers[tf.distribute.get_replica_context()._replica_id]
        kind += _TYPES.index(flat.dtype)
        return collective(
            input=flat,
            group_size=self.num_shards,
            group_key=launcher._group_key,
            instance_key=_FIRST_KEY + (2 * len(_TYPES) * tf.size(flat) + kind) % _FIRST_KEY,
            ordering_token=[launcher._get_ordering_token()],
            communication_hint=launcher._options.implementation.value,
            **options,
        )


def one_device() -> TfDistributor:
    """Returns the distributor for the first GPU, or the CPU."""
    device = "GPU:0" if tf.config.get_visible_devices("GPU") else "CPU:0"
    return TfDistributor(tf.distribute.OneDeviceStrategy(device), rank=0, size=1)


def mirrored() -> TfDistributor:
    """Returns the distributor for all GPUs of this process, or all its logical CPUs."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    return TfDistributor(strategy, rank=0, size=1)


def multi_worker(cluster: Cluster, collective_timeout_seconds: float) -> TfDistributor:
    """Returns the distributor of `cluster.size` processes: NCCL between GPUs, RING between CPUs.

    Args:
        cluster: It has the addresses of all processes.
        collective_timeout_seconds: How long a collective waits for a hung peer.
    """
    communication = tf.distribute.experimental.CommunicationImplementation
    gpus = tf.config.get_visible_devices("GPU")
    options = tf.distribute.experimental.CommunicationOptions(
        # Without timeout_seconds, with which each collective keeps a thread for that long.
        implementation=communication.NCCL if gpus else communication.RING
    )
    if cluster.size > 1:
        configure_heartbeats(cluster.size, collective_timeout_seconds)
    # Not from TF_CONFIG, which only some platforms set.
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
    store = CoordinationStore() if cluster.size > 1 else None
    watchdog = Watchdog(
        cluster.rank, cluster.size, collective_timeout_seconds, store, abort_collectives
    )
    return MultiWorkerDistributor(strategy, cluster, watchdog)


def configure_heartbeats(workers: int, collective_timeout_seconds: float) -> None:
    """Makes TensorFlow's heartbeats (10 seconds by default) slower than the watchdog.

    They also find a stopped process, but do not name it. A stopped worker 0 is found after half of
    the limit.
    """
    eager_context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        coordinated_jobs=[CoordinatedJob(name="worker", num_tasks=workers)],
        heartbeat_timeout_in_ms=round(2000 * (collective_timeout_seconds + 3)),
    )


class CoordinationStore:
    """The store (see watchdog.py) in TensorFlow's coordination service, which worker 0 runs."""

    on_worker_0 = True

    def put(self, key: str, value: str) -> None:
        context = eager_context.context()
        context.delete_config_key_value(f"warmstate/{key}")  # a key cannot be set twice
        context.set_config_key_value(f"warmstate/{key}", value)

    def get(self, key: str) -> str | None:
        try:
            return eager_context.context().get_config_key_value(f"warmstate/{key}", 100)
        except tf.errors.DeadlineExceededError:  # the request waits for a missing key
            return None


def abort_collectives(reason: str) -> None:
    """Makes every collective of this process raise DeadlineExceededError."""
    eager_context.context().abort_collective_ops(tf.errors.DEADLINE_EXCEEDED, reason)
