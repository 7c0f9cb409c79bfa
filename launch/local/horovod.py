"""How Horovod's workers find each other: a rendezvous server and environment variables.

Horovod is imported only when it is used.
"""

import contextlib
import importlib.util
import threading
from collections.abc import Iterator

_NAMES = (
    *("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "HOSTNAME"),
    *("CONTROLLER", "CPU_OPERATIONS", "GLOO_IFACE", "GLOO_RENDEZVOUS_ADDR"),
    *("GLOO_RENDEZVOUS_PORT", "ELASTIC"),
)
VARIABLES = tuple(f"HOROVOD_{name}" for name in _NAMES)
_LOOPBACK = "127.0.0.1"


def is_installed() -> bool:
    """Returns whether this Python has Horovod."""
    return importlib.util.find_spec("horovod") is not None


def worker_environments(workers: int, rendezvous_port: int) -> list[dict[str, str]]:
    """Returns, for each worker on this machine, the variables that `hvd.init()` reads."""
    shared = {
        "HOROVOD_SIZE": str(workers),
        "HOROVOD_LOCAL_SIZE": str(workers),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": _LOOPBACK,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(rendezvous_port),
    }
    return [
        {"HOROVOD_RANK": str(rank), "HOROVOD_LOCAL_RANK": str(rank), **shared}
        for rank in range(workers)
    ]


class Rendezvous:
    """A server on loopback, through which the workers of one job exchange their addresses.

    Attributes:
        port: Open from the beginning; requests wait until `serving`.
    """

    def __init__(self, workers: int):
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http import http_server

        # Horovod's RendezvousServer would listen on every interface, and start its thread at once.
        # A process with threads must not run Python code between fork and exec.
        self._server = http_server.RendezvousHTTPServer(
            (_LOOPBACK, 0), http_server.RendezvousHandler, verbose=False
        )
        self._server.daemon_threads = True
        self._server.init(get_host_assignments(parse_hosts(f"localhost:{workers}"), workers))
        self.port: int = self._server.server_port

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answers requests in a thread until the block ends, then closes the server."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            thread.join()
            self.close()

    def close(self) -> None:
        """Stops listening."""
        self._server.server_close()
