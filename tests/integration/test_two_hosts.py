"""Two workers in two network namespaces: other addresses, as on two hosts, and not only ports."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.integration.programs import ENVIRONMENT, REPOSITORY, SMALL, metrics, train

PORT = 20_000  # free: each namespace is new
# What `ip netns exec` does for the trainer.
ON_HOST = """
import ctypes, os, runpy, sys
host = os.open(f"/run/netns/{sys.argv.pop(1)}", os.O_RDONLY)
CLONE_NEWNET = 0x40000000
if ctypes.CDLL(None, use_errno=True).setns(host, CLONE_NEWNET):
    raise OSError(ctypes.get_errno(), "setns")
os.close(host)
runpy.run_module("trainer.main", run_name="__main__", alter_sys=True)
"""
FLAGS = ("--stage=pretrain", "--pretrain_steps=12")


def ip(*words: str) -> None:
    """Runs `ip`; raises CalledProcessError if it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Yields the addresses of two namespaces, by name, that a cable joins."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program `ip` (Debian: iproute2)")
    pid = os.getpid()
    addresses = {f"warm{pid}a": "10.213.7.1", f"warm{pid}b": "10.213.7.2"}
    made = []
    try:
        try:
            for name in addresses:
                ip("netns", "add", name)
                made.append(name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        first, second = addresses
        ip("-n", first, "link", "add", "cable0", "type", "veth", "peer", "cable1", "netns", second)
        for name, link in ((first, "cable0"), (second, "cable1")):
            ip("-n", name, "address", "add", f"{addresses[name]}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield addresses
    finally:
        for name in made:
            ip("netns", "delete", name)


def test_two_hosts_train_as_two_workers_of_one(
    hosts: dict[str, str], small_store: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, f"--store={small_store}")
    cluster = {"worker": [f"{address}:{PORT}" for address in hosts.values()]}
    workers = []
    try:
        for index, name in enumerate(hosts):
            config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
            workers.append(
                forked.Popen(
                    [
                        sys.executable,
                        "-c",
                        ON_HOST,
                        name,
                        *SMALL,
                        *flags,
                        f"--run_dir={tmp_path}/two",
                    ],
                    cwd=REPOSITORY,
                    env=ENVIRONMENT | {"TF_CONFIG": json.dumps(config)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    train(2, *flags, f"--run_dir={tmp_path}/one")
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    bundles = [tmp_path / name / "encoder" / "encoder.safetensors" for name in ("one", "two")]
    assert bundles[0].read_bytes() == bundles[1].read_bytes()
