"""The distributor on Horovod: a process for each shard, ring sums over Gloo (CPU) or NCCL (GPU).

Horovod's optimizers, callbacks and broadcasts do not support Keras 3 (they do nothing, or raise).
They are not needed: the step reduces its gradients itself, and `optimizer.apply` reduces nothing
outside of a tf.distribute strategy.
"""

import contextlib
import http.client
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from types import ModuleType
from typing import Any

import tensorflow as tf

from data_pipelines.errors import InputError
from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import Distributor
from trainer.distribution.watchdog import Watchdog

START_SECONDS = 300.0  # limit for all processes to reach `hvd.init()`


class HorovodDistributor(Distributor):
    """A Distributor over an initialised `horovod.tensorflow`."""

    def __init__(self, hvd: ModuleType, watchdog: Watchdog):
        super().__init__(hvd.rank(), hvd.size(), watchdog=watchdog)
        self._hvd = hvd

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def _run(self, step: Callable[..., Any], *args: Any) -> Any:
        return step(*args)

    def local_shard(self) -> int | tf.Tensor:
        return 0

    def _all_reduce(self, flat: tf.Tensor) -> tf.Tensor:
        # Horovod does not support bfloat16.
        wide = tf.cast(flat, tf.float32) if flat.dtype == tf.bfloat16 else flat
        name = f"sum_{flat.dtype.name}"
        return tf.cast(self._hvd.allreduce(wide, op=self._hvd.Sum, name=name), flat.dtype)

    def _all_gather(self, flat: tf.Tensor) -> tf.Tensor:
        # Horovod cannot gather bfloat16 either; integers of the same width keep the bits.
        bits = tf.bitcast(flat, tf.uint16) if flat.dtype == tf.bfloat16 else flat
        return tf.bitcast(self._hvd.allgather(bits[None], name="gather"), flat.dtype)


def horovod(cluster: Cluster, collective_timeout_seconds: float) -> HorovodDistributor:
    """Returns the distributor of processes started by Horovod's launcher or ours.

    Args:
        collective_timeout_seconds: How long a collective waits for a hung peer.

    Raises:
        InputError: Horovod cannot be loaded, or its number of peers differs from the environment's.
        tf.errors.DeadlineExceededError: A peer did not start within START_SECONDS.
    """
    try:
        import horovod.tensorflow as hvd
    except (ImportError, tf.errors.NotFoundError) as error:
        raise InputError(
            "--distributor=horovod: the installed Horovod does not load with TensorFlow "
            f"{tf.__version__}: {str(error).splitlines()[0]}; `make horovod` rebuilds it"
        ) from error
    store = rendezvous_store(os.environ, cluster)
    bound_collectives(os.environ, collective_timeout_seconds, watched=store is not None)
    check_own_name()
    if store:
        wait_for_peers(store, cluster)
    hvd.init()
    if hvd.size() != cluster.size:
        raise InputError(
            f"{cluster.named_by} names {cluster.size} processes, but Horovod sees "
            f"{hvd.size()}: start them with launch.main --distributor=horovod or horovodrun --gloo"
        )
    use_gpu_of(hvd.local_rank())
    # shutdown() makes every collective raise, after Horovod's thread has left Gloo.
    watchdog = Watchdog(
        hvd.rank(), hvd.size(), collective_timeout_seconds, store, lambda reason: hvd.shutdown()
    )
    return HorovodDistributor(hvd, watchdog)


def check_own_name() -> None:
    """Raises InputError if this machine's name has no address, which crashes `hvd.init()`."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise InputError(
            f"--distributor=horovod needs an address of this machine's own name, {name}: "
            f"{error.strerror}; add it to /etc/hosts"
        ) from None


class RendezvousStore:
    """The launcher's rendezvous server as a store (see watchdog.py)."""

    on_worker_0 = False

    def __init__(self, address: str, port: int):
        self.address = address
        self.port = port

    def put(self, key: str, value: str) -> None:
        status, _ = self._answer("PUT", key, value.encode())
        if status != http.HTTPStatus.OK:
            raise OSError(f"PUT {key}: {status}")

    def get(self, key: str) -> str | None:
        status, body = self._answer("GET", key)
        return body.decode() if status == http.HTTPStatus.OK else None

    def _answer(self, method: str, key: str, body: bytes | None = None) -> tuple[int, bytes]:
        server = http.client.HTTPConnection(self.address, self.port, timeout=10)
        with contextlib.closing(server):
            try:
                server.request(method, f"/warmstate/{key}", body)
                answer = server.getresponse()
                return answer.status, answer.read()
            except http.client.HTTPException as error:
                raise OSError(f"{method} {key}: {error!r}") from error


def rendezvous_store(environ: Mapping[str, str], cluster: Cluster) -> RendezvousStore | None:
    """Returns the launcher's store; None for a single worker, and for mpirun, which has none."""
    address = environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
    if cluster.size == 1 or not address:
        return None
    return RendezvousStore(address, int(environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]))


def bound_collectives(
    environ: MutableMapping[str, str], timeout_seconds: float, watched: bool
) -> None:
    """Sets the variables with which `hvd.init()` limits the wait of a collective.

    Gloo's limit makes a collective raise that waits for a stopped or disconnected process. It comes
    after the watchdog's verdict, which names the process.

    Without a watchdog Horovod's coordinator must find a process whose main thread hangs. It checks
    once a second: the second check drops a waiting tensor from its cache, the next one starts to
    count, and the first one after the shutdown time ends the job. Only errors are logged: it would
    warn of each wait of a second, for example for a checkpoint.
    """
    whole = max(5, math.ceil(timeout_seconds))
    if watched:
        environ["HOROVOD_STALL_CHECK_DISABLE"] = "1"
    else:
        environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] = "1"
        environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = str(max(5, int(timeout_seconds)) - 3)
    environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(whole + 2)
    environ.setdefault("HOROVOD_LOG_LEVEL", "error")


def wait_for_peers(
    store: RendezvousStore, cluster: Cluster, seconds: float = START_SECONDS
) -> None:
    """Waits until all processes have started, through the launcher's rendezvous server.

    `hvd.init()` would give its peers only the time of a collective, but processes that still import
    TensorFlow on a busy machine need more.

    Raises:
        tf.errors.DeadlineExceededError: A process did not start within `seconds`.
    """
    limit = time.monotonic() + seconds
    noted, missing = False, [rank for rank in range(cluster.size) if rank != cluster.rank]
    while not noted or missing:
        with contextlib.suppress(OSError):
            if not noted:
                store.put(f"started_{cluster.rank}", "1")
                noted = True
            missing = [rank for rank in missing if store.get(f"started_{rank}") is None]
        if (missing or not noted) and time.monotonic() > limit:
            who = f"workers {missing} have not started"
            if not noted:
                who = f"the rendezvous server at {store.address}:{store.port} has not answered"
            message = f"{who} within {seconds:g} seconds"
            raise tf.errors.DeadlineExceededError(None, None, message)
        time.sleep(0.05)


def use_gpu_of(local_rank: int) -> None:
    """Leaves this process the GPU of its rank on this machine, if there are GPUs.

    Raises:
        InputError: There are fewer GPUs than processes.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    if local_rank >= len(gpus):
        raise InputError(
            f"--distributor=horovod needs a GPU for each process; process {local_rank} on this "
            f"machine has none of the {len(gpus)}: start fewer, or hide all with "
            "CUDA_VISIBLE_DEVICES="
        )
    tf.config.set_visible_devices(gpus[local_rank], "GPU")
