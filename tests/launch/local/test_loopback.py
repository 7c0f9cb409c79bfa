"""Servers of a local job's workers listen on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import loopback
from launch.local.workers import run_local, worker_environments
from tests.processes import ended

# Binds the wildcard address of both families at the port of the cluster, then at another one.
BINDS = """
import json, os, socket
task = json.loads(os.environ["TF_CONFIG"])
port = int(task["cluster"]["worker"][task["task"]["index"]].rpartition(":")[2])
found = []
for family, wildcard, number in (
    (socket.AF_INET, "0.0.0.0", port),
    (socket.AF_INET6, "::", port),
    (socket.AF_INET, "0.0.0.0", 0),
):
    with socket.socket(family) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0) if ":" in wildcard else None
        server.bind((wildcard, number))
        found.append(server.getsockname()[0])
print("BOUND", json.dumps(found))
"""
# What a worker's own process listens on once TensorFlow's server runs.
TENSORFLOW = """
import os
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly()
import psutil
from trainer.distribution import cluster
from trainer.distribution.make import make_distributor
distributor = make_distributor("multi_worker", cluster.resolve(os.environ), 60)
found = psutil.Process().net_connections("tcp")
print("LISTENS", sorted(c.laddr.ip for c in found if c.status == "LISTEN"), flush=True)
distributor.barrier()
"""


def test_only_the_cluster_port_is_moved_to_loopback(capfdbinary: pytest.CaptureFixture) -> None:
    assert run_local([sys.executable, "-c", BINDS], workers=2) == 0
    lines = [line for line in capfdbinary.readouterr().out.splitlines() if b"BOUND" in line]
    expected = ["127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0"]
    assert [json.loads(line.partition(b"BOUND")[2]) for line in lines] == [expected] * 2


def test_tensorflow_servers_listen_on_loopback() -> None:
    from tests.integration.equivalence import run_workers  # with it, TensorFlow

    done = run_workers([sys.executable, "-c", TENSORFLOW], 2)
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if "LISTENS" in line]
    assert len(lines) == 2
    for line in lines:
        addresses = json.loads(line.partition("LISTENS")[2].replace("'", '"'))
        assert addresses and all(a.endswith("127.0.0.1") for a in addresses), line


@pytest.mark.parametrize("compiler", [None, "false"])
def test_a_missing_compiler_is_a_warning(
    compiler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler:
        (tmp_path / "cc").symlink_to(f"/bin/{compiler}")
    monkeypatch.setenv("PATH", str(tmp_path))
    with loopback.library() as (path, warning):
        assert path is None
        assert "listen on every interface" in warning and "docs/reliability.md" in warning


def test_what_is_preloaded_already_stays() -> None:
    inherited = {"LD_PRELOAD": "/lib/other.so"}
    first, _ = worker_environments(2, inherited, preloaded=Path("/tmp/loopback.so"))
    assert first["LD_PRELOAD"] == "/tmp/loopback.so /lib/other.so"


def test_a_killed_launcher_leaves_no_file(tmp_path: Path) -> None:
    program = "from launch.local import loopback\nwith loopback.library() as (path, _):\n"
    program += "    print(path, flush=True); input()"
    launcher = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        text=True,
    )
    with ended(launcher, seconds=60):
        path = launcher.stdout.readline().strip()
        assert Path(path).read_bytes().startswith(b"\x7fELF")
        launcher.kill()
    assert not any(tmp_path.iterdir())
