"""--status_port: serves the health and the metrics of a run over HTTP, for probes and Prometheus.

/started             200 once a step has been done, 503 before: data is prepared, the step traced
/healthz             200, or 503 after --stall_seconds without a step or an evaluation
/healthz?stalled=N   the same after N seconds; the first step of a stage has no limit
/metrics             Prometheus's text format
"""

import contextlib
import http.server
import math
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import prometheus_client as prometheus

from data_pipelines.errors import InputError

MAX_CONNECTIONS = 16  # at once; each takes a descriptor and a thread of the training process
MAX_SECONDS = 10.0  # for a whole request, however slowly the client sends it


@dataclass
class Vitals:
    """The state of a run, set by the training loop and read by the server. Times are monotonic."""

    stage: str = ""  # "" before and between stages
    step: int = 0  # done in this stage, of `steps`
    steps: int = 0
    loss: float = math.nan  # the last step's
    tokens_per_second: float = math.nan  # at the last status line
    beat: float = field(default_factory=time.monotonic)  # end of the last step or evaluation
    saved: float | None = None  # the last checkpoint since the process started
    stall_seconds: float = 0.0  # --stall_seconds; 0 for no limit
    _first: int = 0  # step after which this sitting began the stage
    _has_stepped: bool = False

    def begin(self, stage: str, step: int, steps: int) -> None:
        """Starts a stage after `step`."""
        self._has_stepped = self.has_stepped()
        self.stage, self.step, self.steps, self._first = stage, step, steps, step
        self.loss = self.tokens_per_second = math.nan
        self.saved = None
        self.beat = time.monotonic()

    def has_stepped(self) -> bool:
        """Returns whether this process has done a step, so that the slow start is over."""
        return self._has_stepped or self.step > self._first

    def stalled_seconds(self, limit_seconds: float = 0.0) -> float | None:
        """Returns the time since the last step if it is too long, else None.

        Args:
            limit_seconds: Replaces `stall_seconds`, but not in the first step of a stage, which
                includes tracing.
        """
        since = time.monotonic() - self.beat
        first = self.step <= self._first
        limit = limit_seconds if limit_seconds and not first else self.stall_seconds
        return since if self.stage and 0 < limit < since else None


def prometheus_text(vitals: Vitals) -> str:
    """Returns the metrics in Prometheus's text format."""
    now = time.monotonic()
    rows = [
        ("step", "Steps done in this stage.", vitals.step),
        ("steps", "Steps of this stage.", vitals.steps),
        ("loss", "Training loss of the last step.", vitals.loss),
        ("tokens_per_second", "Of all workers, at the last status line.", vitals.tokens_per_second),
        ("seconds_since_last_step", "Since a step or an evaluation ended.", now - vitals.beat),
    ]
    if vitals.saved is not None:
        rows.append(
            ("checkpoint_age_seconds", "Since a checkpoint was written.", now - vitals.saved)
        )
    registry = prometheus.CollectorRegistry()
    for name, text, value in rows:
        gauge = prometheus.Gauge(f"warmstate_{name}", text, ["stage"], registry=registry)
        gauge.labels(vitals.stage).set(value)
    return prometheus.generate_latest(registry).decode()


class _Server(http.server.ThreadingHTTPServer):
    # Who finds a full queue tries again after one, three and seven seconds.
    request_queue_size = 128

    def __init__(self, host: str, port: int, vitals: Vitals):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.vitals = vitals
        self._open: dict[socket.socket, float] = {}  # by the time they were accepted, oldest first
        self._closed = threading.Condition()  # guards _open
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread; ends the oldest connection first if too many are open."""
        with self._closed:
            if len(self._open) >= MAX_CONNECTIONS:
                _end(next(iter(self._open)))
                # Its thread closes it. Without waiting, a busy machine would accept them all
                # before that thread runs.
                self._closed.wait_for(lambda: len(self._open) < MAX_CONNECTIONS, MAX_SECONDS)
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        super().shutdown_request(request)
        with self._closed:
            self._open.pop(request, None)
            self._closed.notify()

    def service_actions(self) -> None:
        """Ends connections that have been open for too long; called twice a second."""
        self.end_connections(accepted_before=time.monotonic() - MAX_SECONDS)

    def end_connections(self, accepted_before: float) -> None:
        """Ends the connections that were accepted before a monotonic time."""
        with self._closed:
            for connection, accepted in self._open.items():
                if accepted < accepted_before:
                    _end(connection)

    def server_bind(self) -> None:
        # HTTPServer's own would look up a name in the DNS. This sets SO_REUSEADDR, so that a
        # restarted run can take the port while old connections are in TIME_WAIT.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores clients that disconnect."""


def _end(connection: socket.socket) -> None:
    """Makes the thread of `connection` stop waiting for it, and close it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = MAX_SECONDS
    server: _Server

    def do_GET(self) -> None:
        code, kind, text = self._answer()
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def version_string(self) -> str:
        return "warmstate"

    def log_message(self, format: str, *values: object) -> None:
        """Prints nothing."""

    def _answer(self) -> tuple[int, str, str]:
        if self.path == "/metrics":
            return 200, prometheus.CONTENT_TYPE_LATEST, prometheus_text(self.server.vitals)
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/started":
            started = self.server.vitals.has_stepped()
            return (200, "text/plain", "ok\n") if started else (503, "text/plain", "no step yet\n")
        if url.path != "/healthz":
            return 404, "text/plain", "there is /started, /healthz and /metrics\n"
        limit = dict(urllib.parse.parse_qsl(url.query)).get("stalled", "0")
        if not (limit.isascii() and limit.isdecimal()):
            return 400, "text/plain", f"stalled={limit}: must be a whole number of seconds\n"
        stalled = self.server.vitals.stalled_seconds(float(limit))
        if stalled is None:
            return 200, "text/plain", "ok\n"
        return 503, "text/plain", f"no step for {stalled:.0f} s\n"


@contextlib.contextmanager
def serving(host: str, port: int, vitals: Vitals) -> Iterator[int]:
    """Serves in daemon threads until the block ends; yields the port (`port` 0 takes any free one).

    Raises:
        InputError: The port is taken, or the host is not an address of this machine.
    """
    try:
        server = _Server(host, port, vitals)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--status_port={port}: cannot listen on {host}, port {port}: {why}: choose another "
            "--status_port or --status_host, or 0 for none"
        ) from None
    threading.Thread(target=server.serve_forever, name="status", daemon=True).start()
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()
        server.server_close()
        server.end_connections(accepted_before=time.monotonic())
