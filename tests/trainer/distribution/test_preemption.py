import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ended

# The main thread hangs in C: Python runs none of its handlers there.
HANGS = """
import ctypes, sys, time
from trainer.distribution.preemption import StopRequest

request = StopRequest(sys.argv[1].split(), float(sys.argv[2]))
print("ready", flush=True)
if sys.argv[3] == "hang":
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
while not request.received:
    time.sleep(0.01)
print("noted", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start() -> Iterator:
    """Returns start(signals, grace_seconds, "hang" or "go on") -> a process that is ready."""
    processes = []

    def started(signals: str, grace_seconds: float, does: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HANGS, signals, str(grace_seconds), does],
            cwd=Path(__file__).parents[3],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        context = ended(process, 120)
        context.__enter__()
        processes.append(context)
        assert process.stdout.readline() == "ready\n"
        return process

    yield started
    for context in processes:
        context.__exit__(None, None, None)


def test_a_first_signal_is_noted_and_leaves_the_process_its_time(start) -> None:
    process = start("TERM USR1", 0, "go on")
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGTERM)  # of another kind: the scheduler means the same stop
    process.stdin.close()
    assert (process.wait(), process.stdout.read()) == (0, "")


@pytest.mark.parametrize("does", ["go on", "hang"])
def test_a_second_signal_ends_the_process_whatever_it_does(start, does: str) -> None:
    process = start("TERM", 0, does)
    process.send_signal(signal.SIGTERM)
    if does == "go on":
        assert process.stdout.readline() == "noted\n"
    time.sleep(0.1)  # signals of one kind that come together are one
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert process.stdout.read() == "received a second SIGTERM: ended immediately\n"


@pytest.mark.parametrize("does", ["go on", "hang"])
def test_who_has_not_stopped_within_the_grace_time_is_ended(start, does: str) -> None:
    process = start("TERM", 0.3, does)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert 0.25 < time.monotonic() - began < 60
    assert "not stopped within --grace_seconds=0.3 of the signal" in process.stdout.read()
