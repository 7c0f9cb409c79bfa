"""Two workers in two network namespaces: other addresses, as on two hosts, and not only ports."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.integration.jobs import Job
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


@contextlib.contextmanager
def workers_on(hosts: dict[str, str], *flags: str) -> Iterator[list[forked.Popen]]:
    """Yields a worker on each host; ends those that still run."""
    cluster = {"worker": [f"{address}:{PORT}" for address in hosts.values()]}
    workers: list[forked.Popen] = []
    try:
        for index, name in enumerate(hosts):
            config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
            workers.append(
                forked.Popen(
                    [sys.executable, "-u", "-c", ON_HOST, name, *SMALL, *flags],
                    cwd=REPOSITORY,
                    env=ENVIRONMENT | {"TF_CONFIG": json.dumps(config)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        yield workers
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def assert_same(one: Path, two: Path) -> None:
    """Compares every loss and the bundles."""
    assert metrics(two) == metrics(one)
    bundles = [folder / "encoder" / "encoder.safetensors" for folder in (one, two)]
    assert bundles[0].read_bytes() == bundles[1].read_bytes()


@pytest.mark.slow("quick: test_cluster.py has the addresses, test_training.py two workers")
def test_two_hosts_train_as_two_workers_of_one(
    hosts: dict[str, str], small_store: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, f"--store={small_store}")
    with workers_on(hosts, *flags, f"--run_dir={tmp_path}/two") as workers:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    train(2, *flags, f"--run_dir={tmp_path}/one")
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow(
    "a cut cable, with both sides alive; quick: trainer/distribution/test_watchdog.py"
)
def test_a_cut_cable_ends_both_sides_and_the_run_resumes(
    hosts: dict[str, str], small_store: Path, tmp_path: Path
) -> None:
    steps = "--pretrain_steps=400"  # the cable is cut long before
    flags = ("--stage=pretrain", steps, f"--store={small_store}", "--checkpoint_every_steps=4")
    two = (*flags, f"--run_dir={tmp_path}/two", "--collective_timeout_seconds=8")
    first = next(iter(hosts))
    with workers_on(hosts, *two) as workers:
        Job(workers[0]).wait_for("pretrain step 9/")
        ip("-n", first, "link", "set", "cable0", "down")
        began = time.monotonic()
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
        print(f"both sides ended after {time.monotonic() - began:.0f} s")
    assert [worker.returncode for worker in workers] == [75, 75], outputs
    assert all("lost a peer" in output for output in outputs), outputs
    ip("-n", first, "link", "set", "cable0", "up")
    with workers_on(hosts, *two) as workers:
        outputs = [worker.communicate(timeout=400)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert "resumed after step" in outputs[0]
    train(2, *flags, f"--run_dir={tmp_path}/one")
    assert_same(tmp_path / "one", tmp_path / "two")
