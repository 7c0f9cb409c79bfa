"""The metrics of --stage=serve: GET /metrics in Prometheus's text format."""

import time
from collections.abc import Callable
from typing import Any

import prometheus_client as prometheus
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServeMetrics:
    """What a server has done since it started.

    Args:
        pending: Returns the number of texts and pieces that wait or are being read.
    """

    def __init__(self, pending: Callable[[], int]):
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "warmstate_requests", "Requests by status.", ["code"], registry=registry
        )
        self._seconds = prometheus.Histogram(
            "warmstate_request_seconds",
            "Time from a POST's headers to the end of its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self._batches = prometheus.Histogram(
            "warmstate_batch_texts",
            "Texts, or pieces of sessions, that the model read at once.",
            buckets=BATCHES,
            registry=registry,
        )
        waiting = prometheus.Gauge(
            "warmstate_pending_texts", "Texts and pieces not answered yet.", registry=registry
        )
        waiting.set_function(pending)
        self._by_code: dict[int, Any] = {}  # to look one up costs more than to count

    async def show(self, request: Request) -> Response:
        """Answers GET /metrics."""
        text = prometheus.generate_latest(self._registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    def counted(self, compute: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """Returns `compute`, with the size of each of its batches counted."""

        def compute_and_count(items: list[Any]) -> Any:
            self._batches.observe(len(items))
            return compute(items)

        return compute_and_count

    def answered(self, method: str, code: int, seconds: float) -> None:
        """Counts a request."""
        if code not in self._by_code:
            self._by_code[code] = self._requests.labels(code)
        self._by_code[code].inc()
        if method == "POST":
            self._seconds.observe(seconds)


class Measured:
    """Middleware that counts requests; the first one, so that it sees what others refuse."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, code = time.perf_counter(), 500  # of a handler that raises

        async def sent(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            self._metrics.answered(scope["method"], code, time.perf_counter() - began)
