import asyncio
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from data_pipelines.errors import InputError
from tests import forked
from tests.processes import ended
from trainer.config import Config
from trainer.inference.task_bank import load_task
from trainer.inference.text_classifier import load_classifier

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

REPOSITORY = Path(__file__).resolve().parents[3]
TEXTS = ["A fine film.", "bad, bad, bad", "So long " * 40, "café crème"]
MAX_BODY_BYTES = 200_000
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(classifier_bundle: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Yields a server's process and its port."""
    with served(classifier_bundle, f"--max_body_bytes={MAX_BODY_BYTES}", "--max_texts=50") as it:
        yield it


@contextlib.contextmanager
def served(bundle: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Yields the process and the port of a server with these flags."""
    named = (f"--classifier={bundle}",) if (bundle / "classifier.json").exists() else ()
    flags = (*named, "--port=0", *flags)
    process = forked.Popen(
        [sys.executable, "-u", "-m", "trainer.main", "--stage=serve", *flags],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with ended(process, seconds=280):
        line = process.stdout.readline()
        assert "at http://127.0.0.1:" in line, line + process.stdout.read()
        yield process, int(line.rsplit(":", 1)[1])


def ask(port: int, body: object, path: str = "/predict") -> tuple[int, dict]:
    """Posts JSON, or bytes as they are; returns the status and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, JSON)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def get(port: int, path: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def test_one_text_and_many(server: tuple, classifier_bundle: Path) -> None:
    _, port = server
    expected = [p.in_json() for p in load_classifier(classifier_bundle).predict(TEXTS)]
    status, answer = ask(port, {"texts": TEXTS})
    assert status == 200
    assert [a["label"] for a in answer["predictions"]] == [e["label"] for e in expected]
    for found, wanted in zip(answer["predictions"], expected, strict=True):
        assert found["probabilities"] == pytest.approx(wanted["probabilities"], abs=2e-6)
    assert ask(port, {"text": TEXTS[0]})[1]["predictions"] == answer["predictions"][:1]
    assert ask(port, {"texts": []}) == (200, {"predictions": []})


def test_sets_of_labels(make_classifier_bundle: Callable[..., Path]) -> None:
    folder = make_classifier_bundle(("a", "b", "c"), multi_label=True)
    expected = [prediction.labels for prediction in load_classifier(folder).predict(TEXTS)]
    with served(folder) as (_, port):
        status, answer = ask(port, {"texts": TEXTS})
        assert status == 200
        assert [each["labels"] for each in answer["predictions"]] == expected
        _, opened = ask(port, {}, "/sessions")
        _, fed = ask(port, {"text": TEXTS[0]}, f"/sessions/{opened['session']}")
        assert fed["labels"] == expected[0]


def test_many_clients_at_once_each_get_their_own_answer(server: tuple) -> None:
    _, port = server
    texts = [f"the film number {i} was {'good' if i % 3 else 'bad'}" for i in range(120)]
    _, answer = ask(port, {"texts": texts[:50]})
    with ThreadPoolExecutor(16) as clients:
        alone = list(clients.map(lambda text: ask(port, {"text": text}), texts))
    assert {status for status, _ in alone} == {200}
    for (_, found), wanted in zip(alone, answer["predictions"], strict=False):
        assert found["predictions"][0]["label"] == wanted["label"]
        probabilities = found["predictions"][0]["probabilities"]
        assert probabilities == pytest.approx(wanted["probabilities"], abs=2e-6)


def test_metrics_say_what_was_answered(classifier_bundle: Path) -> None:
    with served(classifier_bundle, "--max_texts=50") as (_, port):
        for body, status in (({"texts": TEXTS}, 200), ({"text": "fine"}, 200), ({"text": 3}, 422)):
            assert ask(port, body)[0] == status
        _, opened = ask(port, {}, "/sessions")
        assert ask(port, {"text": "a piece"}, f"/sessions/{opened['session']}")[0] == 200
        assert get(port, "/none")[0] == 404
        head = b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        assert b" 421 " in raw(port, head)
        found = metrics_of(port)
        counts = {"200": 3, "201": 1, "404": 1, "421": 1, "422": 1}
        assert {c: found[f'warmstate_requests_total{{code="{c}"}}'] for c in counts} == counts
        assert found["warmstate_request_seconds_count"] == 5
        assert 0 < found["warmstate_request_seconds_sum"] < 60
        assert found["warmstate_batch_texts_count"] == 3
        assert found["warmstate_batch_texts_sum"] == len(TEXTS) + 2
        assert found['warmstate_batch_texts_bucket{le="1.0"}'] == 2
        assert found["warmstate_pending_texts"] == 0
        with ThreadPoolExecutor(1) as client:
            slow = client.submit(ask, port, {"texts": ["so long " * 2_000] * 50})
            while metrics_of(port)["warmstate_pending_texts"] != 50:
                assert not slow.done(), slow.result()
        assert slow.result()[0] == 200 and metrics_of(port)["warmstate_pending_texts"] == 0


def metrics_of(port: int) -> dict[str, float]:
    status, headers, text = get(port, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(text.decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        s.name + "".join(f'{{{name}="{value}"}}' for name, value in s.labels.items()): s.value
        for s in samples
    }


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"", 400, "not JSON"),
        (["a"], 422, "the body must be"),
        ({"text": "a", "texts": ["b"]}, 422, "the body must be"),
        ({"texts": "a"}, 422, "must be a list"),
        ({"texts": ["a", " "]}, 422, "text 2: the text is empty"),
        ({"texts": ["a", 3]}, 422, "text 2: it is not a string"),
        ({"text": "\ud800"}, 422, "lone surrogate"),
        ({"text": "a\0b"}, 422, "NUL"),
        ({"text": "a", "task": "b"}, 422, "there is no task 'b'"),
        ({"texts": ["a"] * 51}, 413, "51 texts are more than 50"),
        ({"text": "x" * MAX_BODY_BYTES}, 413, "--max_body_bytes"),
        ({"text": "x" * 10_000_000}, 413, "--max_body_bytes"),
    ],
)
def test_what_is_refused(server: tuple, body: object, status: int, says: str) -> None:
    found, answer = ask(server[1], body)
    assert (found, says in answer["error"]) == (status, True), answer


def raw(port: int, *parts: bytes) -> bytes:
    """Sends bytes as they are, as far as the server takes them; returns all that it answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with contextlib.suppress(OSError):  # it has answered, and hung up
            for part in parts:
                connection.sendall(part)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while found := connection.recv(1 << 16):
                answer += found
        return answer


HEAD = (
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\n"
)


def test_the_bound_of_a_body_does_not_trust_what_is_said_of_its_length(server: tuple) -> None:
    _, port = server
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
    assert b" 413 " in raw(port, chunked, *[chunk] * 5, b"0\r\n\r\n").partition(b"\r\n")[0]
    # One that would never end is left after a while.
    assert b" 413 " in raw(port, chunked, *[chunk] * 400).partition(b"\r\n")[0]
    # What is announced as too large is refused unread, as is what no number is.
    huge = HEAD + b"Content-Length: %d\r\n\r\n"
    assert b" 413 " in raw(port, huge % 10**12, b"x").partition(b"\r\n")[0]
    assert b" 400 " in raw(port, HEAD + b"Content-Length: -1\r\n\r\n").partition(b"\r\n")[0]
    # Of one that says nothing there is no body; one that has more than it says is cut there.
    assert b" 400 " in raw(port, HEAD + b"\r\n", b'{"text": "a"}').partition(b"\r\n")[0]
    cut = HEAD + b"Content-Length: 3\r\n\r\n"
    assert b" 400 " in raw(port, cut, b'{"text": "a"}').partition(b"\r\n")[0]


def test_headers_are_bounded_and_bodies_are_not_taken_for_them(server: tuple) -> None:
    _, port = server
    endless = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    assert b" 400 " in raw(port, endless, *[b"X: " + b"x" * 9_000 + b"\r\n"] * 60).splitlines()[0]
    body = json.dumps({"text": "fine " * 20_000}).encode()
    whole = HEAD.replace(b"close", b"keep-alive") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert raw(port, whole, whole[:99], whole[99:], HEAD + b"\r\n").count(b"HTTP/1.1 200") == 2


def test_requests_sent_at_once_are_answered_in_order(server: tuple) -> None:
    _, port = server
    page = b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = raw(port, page + b"GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n" + last)
    statuses = [part.split()[0] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"200"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200),
        (b"LOCALHOST:8000", 200),
        (b"127.0.0.1:80", 200),
        (b"[::1]:8000", 200),
        (b"evil.example", 421),
        (b"127.0.0.1.evil.example:8000", 421),
        (b"localhost.evil.example", 421),
        (b"10.0.0.1", 421),
        (b"[::1", 421),
        (b"", 421),
    ],
)
def test_on_loopback_only_its_names_are_answered(server: tuple, host: bytes, status: int) -> None:
    _, port = server
    for line in (b"GET /healthz", b"GET /", b"POST /predict"):
        body = b'{"text": "good"}'
        head = (
            b"%s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Length: %d\r\n"
            b"Content-Type: application/json\r\n\r\n"
        )
        answer = raw(port, head % (line, host, len(body)) + body)
        assert b" %d " % status in answer.partition(b"\r\n")[0], (line, answer)


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({}, 415, "must be application/json"),
        ({"Content-Type": "text/plain"}, 415, "'text/plain'"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "'application/x-www-form"),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200, ""),
        (JSON | {"Origin": "http://HERE"}, 200, ""),
        (JSON | {"Origin": "https://HERE"}, 200, ""),  # behind a proxy with TLS
        (JSON | {"Origin": "http://evil.example"}, 403, "Origin 'http://evil.example'"),
        (JSON | {"Origin": "http://localhost:1"}, 403, "Origin 'http://localhost:1'"),
        (JSON | {"Origin": "null"}, 403, "Origin 'null'"),
    ],
)
def test_pages_of_other_sites_are_refused(
    server: tuple, headers: dict, status: int, says: str
) -> None:
    here = f"127.0.0.1:{server[1]}"
    headers = {name: value.replace("HERE", here) for name, value in headers.items()}
    connection = http.client.HTTPConnection(here, timeout=60)
    connection.request("POST", "/predict", b'{"text": "good"}', headers)
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    assert reply.status == status
    assert says in answer.get("error", ""), answer


@pytest.fixture
def quick_server(classifier_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Yields the port of a server in a thread, with a deadline of a second and 8 connections."""
    from trainer.inference import http_connection, serve

    monkeypatch.setattr(http_connection, "REQUEST_SECONDS", 1)
    monkeypatch.setattr(http_connection, "LIMIT_CONCURRENCY", 8)
    monkeypatch.setattr(serve, "LIMIT_CONCURRENCY", 8)
    app = serve.application(load_classifier(classifier_bundle), Config(), True)
    listener = serve.listening("127.0.0.1", 0)
    server = serve.server_of(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


ANSWERED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: local",
        HEAD + b"Content-Length: 99\r\n\r\n{",
        ANSWERED + b"GET /healthz HT",
        ANSWERED + HEAD + b"Content-Length: 99\r\n\r\n{",
    ],
)
def test_slow_requests_are_closed(quick_server: int, sent: bytes) -> None:
    """Also those that send a byte now and then."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", quick_server), timeout=0.1) as connection:
        connection.sendall(sent)
        while time.monotonic() < began + 30:
            with contextlib.suppress(TimeoutError):
                try:
                    if not connection.recv(1 << 16):
                        break
                    continue
                except ConnectionError:
                    break
            with contextlib.suppress(ConnectionError):
                if sent:
                    connection.sendall(b"x")
        assert time.monotonic() < began + 10


def test_a_computation_longer_than_the_deadline_is_answered(quick_server: int) -> None:
    texts = {"texts": ["a long text " * 2000] * 40}
    began = time.monotonic()
    while time.monotonic() < began + 2.5:  # on one connection each, and on kept ones
        status, answer = ask(quick_server, texts)
        assert (status, len(answer["predictions"])) == (200, 40)


def test_connections_are_limited(quick_server: int) -> None:
    with contextlib.ExitStack() as opened:
        held = [
            opened.enter_context(socket.create_connection(("127.0.0.1", quick_server), 30))
            for _ in range(7)
        ]
        assert get(quick_server, "/healthz")[0] == 503
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", quick_server), 30)
            held.append(opened.enter_context(connection))
        with contextlib.suppress(ConnectionResetError):
            assert held[-1].recv(1) == b""  # closed at once
    until = time.monotonic() + 30
    while get(quick_server, "/healthz")[0] != 200:
        assert time.monotonic() < until


def test_pending_bodies_are_bounded_in_bytes(classifier_bundle: Path) -> None:
    from trainer.inference.serve import PENDING_BYTES, Batcher, Refusal

    batcher = Batcher(load_classifier(classifier_bundle).probabilities)
    with batcher.counted_bytes() as add:
        add(2 * PENDING_BYTES)  # alone, it is accepted
    with batcher.counted_bytes() as first, batcher.counted_bytes() as second:
        first(PENDING_BYTES // 2)
        second(PENDING_BYTES // 2)
        with pytest.raises(Refusal, match=f"{PENDING_BYTES} bytes are waiting"):
            second(1)
    with batcher.counted_bytes() as add:
        add(PENDING_BYTES)


def memory_mib(pid: int, name: str) -> int:
    """Returns VmRSS, or VmHWM, the largest since it was reset."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) >> 10


def test_large_bodies_at_once_take_bounded_memory(classifier_bundle: Path) -> None:
    """Sixteen of 1 MiB took 540 MiB while a batch was bounded in texts only."""
    body = {"text": "word " * 200_000}
    with served(classifier_bundle) as (process, port), ThreadPoolExecutor(16) as clients:
        ask(port, body)
        before = memory_mib(process.pid, "VmRSS")
        found = list(clients.map(lambda _: ask(port, body)[0], range(32)))
        grown = memory_mib(process.pid, "VmHWM") - before
    assert set(found) <= {200, 503} and 200 in found
    assert grown < 150


def test_health_page_and_what_is_not_there(server: tuple) -> None:
    _, port = server
    status, _, body = get(port, "/healthz")
    assert (status, json.loads(body)) == (200, {"status": "ok", "classes": ["neg", "pos"]})
    status, headers, body = get(port, "/")
    assert status == 200 and b"<title>warmstate</title>" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"http://" not in body and b"https://" not in body  # nothing of elsewhere
    assert get(port, "/predict")[0] == 405
    assert get(port, "/nothing")[0] == 404


def test_tasks_are_served_together(
    tuned_encoder: Path, make_task: Callable[..., Path], tmp_path: Path
) -> None:
    tasks = {"mood": ("sad", "merry"), "topic": ("sport", "art", "war")}
    expected = {
        name: load_task(tuned_encoder, make_task(tmp_path / name, classes)).predict(TEXTS)
        for name, classes in tasks.items()
    }
    flags = (f"--encoder={tuned_encoder}", f"--tasks={tmp_path}")
    with served(tmp_path, *flags) as (_, port), ThreadPoolExecutor(8) as clients:
        _, _, body = get(port, "/healthz")
        assert json.loads(body) == json.loads(json.dumps({"status": "ok", "tasks": tasks}))
        for wrong in ("art", "", ["mood"], None):
            status, answer = ask(port, {"text": "a", "task": wrong})
            assert (status, "there is no task" in answer["error"]) == (422, True)
        asked = [(name, row) for row in range(len(TEXTS)) for name in tasks]
        found = clients.map(lambda a: ask(port, {"text": TEXTS[a[1]], "task": a[0]}), asked)
        for (name, row), (status, answer) in zip(asked, found, strict=True):
            assert status == 200
            wanted = expected[name][row].probabilities
            assert answer["predictions"][0]["probabilities"] == pytest.approx(wanted, abs=2e-6)


def test_a_port_that_is_taken_is_said(server: tuple, classifier_bundle: Path) -> None:
    flags = (f"--classifier={classifier_bundle}", f"--port={server[1]}")
    done = forked.run(
        [sys.executable, "-m", "trainer.main", "--stage=serve", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"--port={server[1]} is not available: Address already in use" in done.stderr


def test_a_request_alone_is_answered_however_large(classifier_bundle: Path) -> None:
    from trainer.inference.serve import PENDING_TEXTS, Batcher

    async def ask_all() -> int:
        batcher = Batcher(load_classifier(classifier_bundle).probabilities)
        worker = asyncio.create_task(batcher.work())
        found = await batcher.probabilities(["film"] * (PENDING_TEXTS + 1))
        worker.cancel()
        return len(found)

    assert asyncio.run(ask_all()) == PENDING_TEXTS + 1


def test_an_address_of_ipv6_is_one() -> None:
    from trainer.inference.serve import listening

    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with listening("::1", 0) as listener:
        assert listener.getsockname()[0] == "::1"
    with pytest.raises(InputError, match="--host=no host --port=1 is not available"):
        listening("no host", 1)


def test_term_answers_what_was_asked_and_stops(server: tuple) -> None:
    """Comes last: it ends the module's server."""
    process, port = server
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    texts = {"texts": ["a long text " * 300] * 50}
    connection.request("POST", "/predict", json.dumps(texts).encode(), JSON)
    assert get(port, "/healthz")[0] == 200  # what was sent before is read by now
    process.send_signal(signal.SIGTERM)
    reply = connection.getresponse()
    assert reply.status == 200 and len(json.loads(reply.read())["predictions"]) == 50
    connection.close()
    assert process.wait(timeout=30) == 0
    assert "stopped" in process.stdout.read()
