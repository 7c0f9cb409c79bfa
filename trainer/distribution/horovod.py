"""The distributor on Horovod: one process a shard, sums in a ring over Gloo (CPU) or NCCL (GPU).

Horovod's own optimizers, callbacks and broadcasts do not know Keras 3 (they change nothing, or
raise); they are not needed: the step reduces its gradients itself and `optimizer.apply` reduces
nothing outside of a tf.distribute strategy.
"""

import contextlib
import http.client
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import ModuleType
from typing import Any

import tensorflow as tf

from data_pipelines.errors import InputError
from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import Distributor

START_SECONDS = 300.0  # within which all processes must have come to `hvd.init()`


class HorovodDistributor(Distributor):
    """A Distributor over an initialised `horovod.tensorflow`."""

    def __init__(self, hvd: ModuleType):
        super().__init__(hvd.rank(), hvd.size())
        self._hvd = hvd

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def run(self, step: Callable[..., Any], *args: Any) -> Any:
        return step(*args)

    def local_shard(self) -> int | tf.Tensor:
        return 0

    def all_reduce_sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        # One collective a type, so that there is one order of additions. Tensors sent one by one
        # are packed into buffers as they come in, and from three processes on the sums then vary.
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        sums: list[tf.Tensor] = [None] * len(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = tf.concat([tf.reshape(tensors[i], [-1]) for i in chosen], axis=0)
            # It has no bfloat16.
            wide = tf.cast(flat, tf.float32) if dtype == tf.bfloat16 else flat
            name = f"sum_{len(chosen)}_{dtype.name}"
            reduced = tf.cast(self._hvd.allreduce(wide, op=self._hvd.Sum, name=name), dtype)
            parts = tf.split(reduced, [tf.size(tensors[i]) for i in chosen])
            for i, part in zip(chosen, parts, strict=True):
                sums[i] = tf.ensure_shape(tf.reshape(part, tf.shape(tensors[i])), tensors[i].shape)
        return sums

    def all_gather_rows(self, values: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return (
            self._hvd.allgather(values, name="gather_values"),
            self._hvd.allgather(indices, name="gather_indices"),
        )


def horovod(cluster: Cluster, collective_timeout_seconds: float) -> HorovodDistributor:
    """Returns the distributor of the processes that Horovod's launcher, or ours, has started.

    Args:
      collective_timeout_seconds: how long a collective waits for a peer that hangs; whole seconds
        count, 5 at the least.

    Raises:
      InputError: this Horovod cannot be loaded, or sees other peers than the environment names.
      tf.errors.DeadlineExceededError: a peer has not started within START_SECONDS.
    """
    try:
        import horovod.tensorflow as hvd
    except (ImportError, tf.errors.NotFoundError) as error:
        raise InputError(
            "--distributor=horovod: the Horovod that is installed does not load with TensorFlow "
            f"{tf.__version__}: {str(error).splitlines()[0]}; `make horovod` builds it anew"
        ) from error
    bound_collectives(os.environ, collective_timeout_seconds)
    check_own_name()
    wait_for_peers(os.environ, cluster)
    hvd.init()
    if hvd.size() != cluster.size:
        raise InputError(
            f"{cluster.named_by} says that there are {cluster.size} processes, but Horovod sees "
            f"{hvd.size()}: start them with launch.main --distributor=horovod or horovodrun --gloo"
        )
    use_gpu_of(hvd.local_rank())
    return HorovodDistributor(hvd)


def check_own_name() -> None:
    """Raises InputError if this machine's name has no address: `hvd.init()` would crash."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise InputError(
            f"--distributor=horovod needs an address of this machine's own name, {name}: "
            f"{error.strerror}; add it to /etc/hosts"
        ) from None


def bound_collectives(environ: MutableMapping[str, str], timeout_seconds: float) -> None:
    """Sets the variables from which `hvd.init()` learns how long a collective may wait.

    Two things can hang: a peer's own thread, which never joins a collective (the coordinator
    notices), and a whole process, stopped or cut off (Gloo's sockets notice). The coordinator looks
    once a second: at the second look it drops a waiting tensor from its cache, at the next it
    begins to count, and it ends the job at the first look after the shutdown time. It would warn
    of each wait of a second, a checkpoint's for example, so that only errors are logged.
    """
    whole = max(5, math.floor(timeout_seconds))
    environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] = "1"
    environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = str(whole - 3)
    environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(whole)
    environ.setdefault("HOROVOD_LOG_LEVEL", "error")


def wait_for_peers(
    environ: Mapping[str, str], cluster: Cluster, seconds: float = START_SECONDS
) -> None:
    """Returns when all processes have come here, by notes in the launcher's rendezvous server.

    `hvd.init()` would give its peers only the time that a collective has, and processes that are
    still importing TensorFlow on a busy machine need more.

    Raises:
      tf.errors.DeadlineExceededError: some have not come within `seconds`.
    """
    address = environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
    if cluster.size == 1 or not address:
        return
    port = int(environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])

    def succeeds(method: str, rank: int) -> bool:
        server = http.client.HTTPConnection(address, port, timeout=10)
        with contextlib.closing(server), contextlib.suppress(OSError, http.client.HTTPException):
            server.request(method, f"/warmstate_started/{rank}", b"1" if method == "PUT" else None)
            return server.getresponse().status == http.HTTPStatus.OK
        return False

    limit = time.monotonic() + seconds
    peers = [rank for rank in range(cluster.size) if rank != cluster.rank]
    to_do = [("PUT", cluster.rank), *(("GET", rank) for rank in peers)]
    while to_do := [request for request in to_do if not succeeds(*request)]:
        if time.monotonic() > limit:
            who = f"workers {[rank for _, rank in to_do]} have not started"
            if to_do[0][0] == "PUT":
                who = f"the rendezvous server at {address}:{port} has not answered"
            message = f"{who} within {seconds:g} seconds"
            raise tf.errors.DeadlineExceededError(None, None, message)
        time.sleep(0.05)


def use_gpu_of(local_rank: int) -> None:
    """Leaves this process one GPU, that of its rank on this machine; none where there are none.

    Raises:
      InputError: there are GPUs, but fewer than processes.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    if local_rank >= len(gpus):
        raise InputError(
            f"--distributor=horovod uses one GPU a process; process {local_rank} on this machine "
            f"has none, there are {len(gpus)}: start fewer, or hide all with CUDA_VISIBLE_DEVICES="
        )
    tf.config.set_visible_devices(gpus[local_rank], "GPU")
