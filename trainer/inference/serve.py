"""--stage=serve: serves a classifier over HTTP, from one process on the CPU.

  GET  /         a page to try sentences
  POST /predict  {"text": "..."} or {"texts": ["...", ...]}; for a classifier with contexts also
                 "context" or "contexts"
                 -> {"predictions": [{"label": "pos", "probabilities": {"neg": 0.1, "pos": 0.9}}]}
                 With --tasks also {"task": "..."}; texts of all tasks are read together. A
                 classifier of --labels=multi also answers "labels": those above their thresholds.
  GET  /healthz  200 while it serves
  GET  /metrics  Prometheus's text format, see `serve_metrics`
  /sessions      see `serve_sessions`

Requests that arrive while the model computes form the next batch, so none waits for a timer. An
error is {"error": "..."}: 400 for invalid JSON, 403 for the Origin of another site, 413 for too
many or too large texts, 415 for another Content-Type, 421 for the Host of another machine while it
listens on loopback, 422 for invalid texts, 503 for an overfull queue.
"""

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from data_pipelines.errors import InputError
from data_pipelines.sources.text import text_fault
from trainer.config import Config
from trainer.inference.http_connection import LIMIT_CONCURRENCY, HttpConnection
from trainer.inference.http_requests import Refusal, answered, body_of, object_of
from trainer.inference.serve_metrics import Measured, ServeMetrics
from trainer.inference.serve_sessions import SessionTable, contexts_of, session_routes
from trainer.inference.task_bank import TaskBank
from trainer.inference.text_classifier import TextClassifier, load_classifier, prediction_of

BATCH_TEXTS = 256
BATCH_CHARACTERS = 1 << 20  # the model takes over 20 bytes for each
PENDING_TEXTS = 4096
PENDING_BYTES = 16 << 20  # of bodies, from their arrival to their answer
GRACE_SECONDS = 20
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class TextOfTask:
    """A text, the task of a TaskBank that it is read for, and for a classifier its context."""

    text: str
    task: str = ""
    context: str | None = None

    def __len__(self) -> int:
        return len(self.text)


class Batcher:
    """Batches requests: one batch is computed while the next one gathers.

    Args:
        compute: Returns the probabilities of texts or sessions, float32 [items, classes].
    """

    def __init__(self, compute: Callable[[list[Any]], np.ndarray]):
        self._compute = compute
        self._waiting: list[tuple[Sequence[Sized], asyncio.Future[Any]]] = []
        self.pending_texts = 0  # waiting, or being read
        self._pending_bytes = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")

    @contextlib.contextmanager
    def counted_bytes(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that adds bytes to those of one pending body.

        It raises Refusal if all pending bodies are too large together.
        """
        mine = 0

        def add(size: int) -> None:
            nonlocal mine
            others = self._pending_bytes - mine  # a single body is limited by --max_body_bytes
            if others and self._pending_bytes + size > PENDING_BYTES:
                raise Refusal(503, f"{self._pending_bytes} bytes are waiting: try again later")
            mine += size
            self._pending_bytes += size

        try:
            yield add
        finally:
            self._pending_bytes -= mine

    async def probabilities(self, texts: Sequence[Sized]) -> np.ndarray:
        """Returns float32 [texts, classes].

        Raises:
            Refusal: The queue is full.
        """
        # A single request is always accepted; --max_texts limits it.
        if self.pending_texts and self.pending_texts + len(texts) > PENDING_TEXTS:
            raise Refusal(503, f"{self.pending_texts} texts are waiting: try again later")
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((texts, answer))
        self.pending_texts += len(texts)
        self._arrived.set()
        try:
            return await answer
        finally:
            self.pending_texts -= len(texts)

    async def work(self) -> None:
        """Computes batches until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            texts = [text for part, _ in batch for text in part]
            try:
                found = await loop.run_in_executor(self._thread, self._compute, texts)
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            start = 0
            for part, answer in batch:
                if not answer.done():  # it is, where the client is gone
                    answer.set_result(found[start : start + len(part)])
                start += len(part)

    def _next_batch(self) -> list[tuple[Sequence[Sized], asyncio.Future[Any]]]:
        """Returns the requests that came first: at least one, and as many as make one batch."""
        count, texts, characters = 0, 0, 0
        for part, _ in self._waiting:
            texts, characters = texts + len(part), characters + sum(map(len, part))
            if count and (texts > BATCH_TEXTS or characters > BATCH_CHARACTERS):
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        if not self._waiting:
            self._arrived.clear()
        return batch


class OnlyLoopback:
    """Middleware that refuses requests whose Host is not this machine.

    Otherwise a foreign web page could query a server on loopback, through a domain that resolves
    to 127.0.0.1 (DNS rebinding).
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            host = Request(scope).headers.get("host", "")
            if not is_loopback(host):
                why = f"Host {host!r:.99} is not this machine: ask localhost, or set another --host"
                app = JSONResponse({"error": why}, 421)
        await app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Returns whether a Host header or an address is a loopback one."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def application(model: TextClassifier | TaskBank, config: Config, only_loopback: bool) -> Starlette:
    """Returns the ASGI application.

    Args:
        model: The classifier, or the tasks; only a classifier has sessions.
        config: Has the limits of requests and sessions.
        only_loopback: Whether to answer only requests to loopback names.
    """
    page = (resources.files("trainer.inference") / "serve.html").read_text(encoding="utf-8")
    metrics = ServeMetrics(lambda: sum(each.pending_texts for each in batchers))
    batcher = Batcher(metrics.counted(_reader(model)))
    batchers, names = [batcher], model.class_names

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        workers = [asyncio.create_task(each.work()) for each in batchers]
        yield
        for worker in workers:
            worker.cancel()

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    async def health(request: Request) -> Response:
        kind = "tasks" if isinstance(names, dict) else "classes"
        return JSONResponse({"status": "ok", kind: names})

    async def predict(request: Request) -> Response:
        with batcher.counted_bytes() as add_bytes:
            values = object_of(await body_of(request, config.max_body_bytes, add_bytes))
            texts = texts_of(values, config.max_texts)
            task, classes = task_and_classes(values, names)
            contexts = contexts_in(model, values, len(texts))
            pairs = zip(texts, contexts, strict=True)
            rows = [TextOfTask(text, task, context) for text, context in pairs]
            found = await batcher.probabilities(rows)
        if isinstance(model, TextClassifier):
            answers = [model.prediction(row).in_json() for row in found]
        else:
            answers = [prediction_of(row, classes).in_json() for row in found]
        return JSONResponse({"predictions": answers})

    routes = [
        Route("/predict", answered(predict), methods=["POST"]),  # first: most requests are these
        Route("/", index),
        Route("/healthz", health),
        Route("/metrics", metrics.show),
    ]
    if isinstance(model, TextClassifier):
        classifier = model
        readers = Batcher(
            metrics.counted(lambda them: classifier.session_reader.probabilities(them))
        )
        batchers.append(readers)
        table = SessionTable(config.max_sessions, config.session_seconds)
        routes += session_routes(
            model, table, readers.probabilities, config.max_body_bytes, batcher.counted_bytes
        )
    middleware = [Middleware(Measured, metrics), *[Middleware(OnlyLoopback)] * only_loopback]
    return Starlette(routes=routes, lifespan=lifespan, middleware=middleware)


def _reader(model: TextClassifier | TaskBank) -> Callable[[list[TextOfTask]], Any]:
    """Returns a function from texts to the probabilities of their task's classes."""

    def read(rows: list[TextOfTask]) -> Any:
        texts = [row.text for row in rows]
        if isinstance(model, TaskBank):
            bank: TaskBank = model
            return bank.probabilities(texts, [row.task for row in rows])
        return model.probabilities(texts, contexts=[row.context for row in rows])

    return read


def texts_of(values: dict[str, Any], max_texts: int) -> list[str]:
    """Returns the texts of a request's object.

    Raises:
        Refusal: It has no texts, or more than `max_texts`.
    """
    if len(values.keys() & {"text", "texts"}) != 1:
        raise Refusal(422, 'the body must be {"text": "..."} or {"texts": ["...", ...]}')
    texts = [values["text"]] if "text" in values else values["texts"]
    if not isinstance(texts, list):
        raise Refusal(422, "'texts' must be a list")
    if len(texts) > max_texts:
        raise Refusal(413, f"{len(texts)} texts are more than {max_texts} (--max_texts)")
    for number, text in enumerate(texts, 1):
        fault = text_fault(text) if isinstance(text, str) else "it is not a string"
        if fault:
            raise Refusal(422, f"text {number}: {fault}")
    return texts


def contexts_in(
    model: TextClassifier | TaskBank, values: dict[str, Any], count: int
) -> list[str | None]:
    """Returns the contexts of the `count` texts of a request's object.

    Raises:
        Refusal: They do not fit the texts or the model.
    """
    contexts = [values.get("context")] if "text" in values else values.get("contexts")
    key = model.context_key if isinstance(model, TextClassifier) else ""
    contexts = contexts_of(key, [None] * count if contexts is None else contexts)
    if len(contexts) != count:
        raise Refusal(422, f"{len(contexts)} contexts for {count} texts")
    return contexts


def task_and_classes(
    values: dict[str, Any], names: Sequence[str] | dict[str, tuple[str, ...]]
) -> tuple[str, Sequence[str]]:
    """Returns the task of a request's object, "" for a classifier, and the names of its classes.

    Raises:
        Refusal: There is no such task.
    """
    by_task = names if isinstance(names, dict) else {"": names}
    task = values.get("task", "")
    if not (isinstance(task, str) and task in by_task):
        raise Refusal(422, f"there is no task {task!r:.99}: GET /healthz lists the tasks")
    return task, by_task[task]


def listening(host: str, port: int) -> socket.socket:
    """Returns a listening socket, of IPv6 for an IPv6 address.

    Raises:
        InputError: The address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise InputError(
            f"--host={host} --port={port} is not available: {error.strerror}"
        ) from None


def server_of(app: Starlette) -> uvicorn.Server:
    """Returns the server of an application."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=HttpConnection,
            ws="none",
            proxy_headers=False,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=LIMIT_CONCURRENCY,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )


def serve(config: Config) -> None:
    """Serves until TERM or INT, and then finishes the open requests.

    Raises:
        InputError: The classifier is not usable, or the address is not available.
    """
    model: TextClassifier | TaskBank
    if config.tasks:
        model = TaskBank(config.encoder, config.tasks)
    else:
        model = load_classifier(Path(config.classifier))
    first = next(iter(model.class_names)) if config.tasks else ""
    _reader(model)([TextOfTask("the first text traces the graphs", first)])
    listener = listening(config.host, config.port)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    app = application(model, config, is_loopback(host))
    server = server_of(app)
    # The server restores these handlers and raises the signal again when it has stopped.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    print(f"serving {config.tasks or config.classifier} at http://{host}:{port}", flush=True)
    server.run(sockets=[listener])
    print("stopped", flush=True)
