import contextlib
import http.client
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest

from data_pipelines.errors import InputError
from trainer.reporting import status_server
from trainer.reporting.status_server import Vitals, _Server, serving

Serve = Callable[[Vitals], int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Returns serve(vitals), which serves until the test ends and returns the port."""
    with contextlib.ExitStack() as stack:
        yield lambda vitals: stack.enter_context(serving("127.0.0.1", 0, vitals))


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_before_training_it_is_well_and_knows_no_loss(serve: Serve) -> None:
    port = serve(Vitals(stall_seconds=1e-9))
    assert get(port, "/healthz") == (200, "ok\n")
    code, text = get(port, "/metrics")
    assert code == 200 and 'warmstate_loss{stage=""} NaN\n' in text
    assert "checkpoint_age" not in text
    for line in text.splitlines():
        assert re.fullmatch(
            r'# (HELP|TYPE) warmstate_\w+ .+|warmstate_\w+{stage=""} (NaN|[-+.e\d]+)', line
        )
    assert get(port, "/healthz", "HEAD") == (200, "")
    assert get(port, "/other")[0] == 404
    assert get(port, "/healthz", "POST")[0] == 501


def test_a_stall_is_unhealthy_only_while_a_stage_trains(serve: Serve) -> None:
    vitals = Vitals(stall_seconds=100)
    port = serve(vitals)
    vitals.begin("pretrain", 3, 10)
    assert get(port, "/healthz") == (200, "ok\n")
    vitals.beat = time.monotonic() - 101
    code, text = get(port, "/healthz")
    assert code == 503 and text.startswith("no step for 101 s")
    vitals.stage = ""  # as at the end of training
    assert get(port, "/healthz")[0] == 200


def test_a_limit_of_the_probe_s_own_leaves_the_first_step_its_time(serve: Serve) -> None:
    vitals = Vitals()
    port = serve(vitals)
    assert get(port, "/started") == (503, "no step yet\n")
    vitals.begin("pretrain", 3, 10)
    vitals.beat = time.monotonic() - 101
    assert get(port, "/healthz?stalled=100")[0] == 200  # it traces
    vitals.step = 4
    assert get(port, "/started") == (200, "ok\n")
    code, text = get(port, "/healthz?stalled=100")
    assert code == 503 and text.startswith("no step for 101 s")
    assert get(port, "/healthz?stalled=300")[0] == 200
    assert get(port, "/healthz")[0] == 200
    vitals.begin("finetune", 0, 10)
    assert get(port, "/started")[0] == 200
    assert get(port, "/healthz?stalled=x") == (
        400,
        "stalled=x: must be a whole number of seconds\n",
    )


def test_a_client_that_talks_nonsense_does_no_harm(
    capfd: pytest.CaptureFixture, serve: Serve
) -> None:
    port = serve(Vitals())
    for nonsense in (b"\0\xff\r\n\r\n", b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(nonsense)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()
    assert capfd.readouterr() == ("", "")


def test_a_run_that_is_started_again_has_its_port_again() -> None:
    first = _Server("127.0.0.1", 0, Vitals())
    port = first.socket.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        first.handle_request()
        assert client.recv(12) == b"HTTP/1.0 200"
        while client.recv(1 << 12):  # to the end: the server has closed first
            pass
    first.server_close()
    _Server("127.0.0.1", port, Vitals()).server_close()


def test_it_serves_until_the_block_ends() -> None:
    with serving("127.0.0.1", 0, Vitals()) as port:
        waiting = socket.create_connection(("127.0.0.1", port), timeout=10)
        assert get(port, "/healthz")[0] == 200
    with waiting:
        assert waiting.recv(1) == b""
    with serving("127.0.0.1", port, Vitals()) as again:
        assert again == port and get(port, "/healthz")[0] == 200


def test_it_listens_on_loopback_alone(serve: Serve) -> None:
    port = serve(Vitals())
    with socket.socket() as other:  # the port of any other address is free
        other.bind(("127.0.0.2", port))


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.7", "no host"])
def test_what_cannot_be_listened_on_names_the_flag(host: str, serve: Serve) -> None:
    port = serve(Vitals())
    refused = pytest.raises(InputError, match=f"--status_port={port}: cannot listen on {host}")
    with refused, serving(host, port, Vitals()):
        pass


def test_slow_clients_take_few_descriptors_and_keep_nobody_out(serve: Serve) -> None:
    port = serve(Vitals())
    clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(60)]
    try:
        for client in clients:
            client.sendall(b"GET /healthz HTTP/1.1\r\n")  # and never the empty line
        assert get(port, "/healthz") == (200, "ok\n")
        connections = psutil.Process().net_connections("tcp")
        accepted = [c for c in connections if c.laddr.port == port and c.raddr]
        assert 1 < len(accepted) <= status_server.MAX_CONNECTIONS
    finally:
        for client in clients:
            client.close()


def test_a_request_has_a_deadline_however_slowly_it_comes(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(status_server, "MAX_SECONDS", 0.3)
    port = serve(Vitals())
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while client.send(b"G") and time.monotonic() - began < 10:
                client.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    if client.recv(1) == b"":
                        break
        assert time.monotonic() - began < 5
