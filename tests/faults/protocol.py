"""A model of saving, dying and resuming, on the real checkpointer and the real lock of a run.

    python -m tests.faults.protocol --examples=200

Hypothesis interleaves two masters (processes that would train in one folder) on one to three
workers: they start, save, fail to write, stop, and are killed, also inside any operation of a
save; and the power fails. What holds: one master works at a time; a master resumes, with all its
workers, from the last step whose save was reported, or from the one whose save was cut off; no
state mixes two steps.
"""

import argparse
import collections
import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from data_pipelines.errors import InputError
from tests.faults import everywhere, power_loss
from trainer.distribution import run_lock
from trainer.distribution.distributor import Distributor
from trainer.training.checkpoint import Checkpointer

NAMES = ("one", "other")
OPERATIONS = st.integers(1, 26)  # of a save; a later one does not come
SECONDS = 120.0
COUNTS: collections.Counter[str] = collections.Counter()


class Threads(Distributor):
    """Workers as threads of one process: all must come to every collective."""

    def __init__(self, rank: int, size: int, shared: dict):
        super().__init__(rank, size)
        self._shared = shared

    def sum_over_processes(self, arrays: list) -> list:
        barrier = self._shared["barrier"]
        self._shared[self.rank] = [np.asarray(array) for array in arrays]
        barrier.wait(SECONDS)
        given = [self._shared[rank] for rank in range(self.size)]
        total = [sum(parts) for parts in zip(*given, strict=True)]
        barrier.wait(SECONDS)
        return total


class Workers:
    """The workers of a master, and their checkpoints."""

    def __init__(self, folder: Path, size: int):
        shared: dict = {"barrier": threading.Barrier(size)}
        self._variables = [
            {"weights": keras.Variable(np.zeros(40, np.float32))} for _ in range(size)
        ]
        self._checkpoints = [
            Checkpointer(folder / "checkpoints", Threads(rank, size, shared), each, print, keep=1)
            for rank, each in enumerate(self._variables)
        ]

    def all_do(self, work: Callable[[int], Any]) -> list[Any]:
        """Returns work(rank) of each, done at the same time."""
        found: dict[int, Any] = {}

        def do(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except InputError as error:
                found[rank] = str(error)

        threads = [threading.Thread(target=do, args=(r,)) for r in range(len(self._checkpoints))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        return [found[rank] for rank in range(len(threads))]

    def restore(self) -> list[Any]:
        """Returns the step that each worker resumes from; -1 if it mixes two."""

        def of(rank: int) -> int:
            step, notes, arrays = self._checkpoints[rank].restore() or (0, {"step": 0}, {})
            held = {*self._variables[rank]["weights"].numpy().tolist()}
            held |= {number for array in arrays.values() for number in array.tolist()}
            return step if held == {step} and notes == {"step": step} else -1

        return self.all_do(of)

    def save(self, step: int) -> list[Any]:
        """Returns of each worker whether the state of this step is saved, or the error."""

        def of(rank: int) -> bool:
            self._variables[rank]["weights"].assign(np.full(40, step, np.float32))
            self._checkpoints[rank].save(step, {"step": step}, {"best": np.full(3, step)})
            return self._checkpoints[rank].wait()

        return self.all_do(of)


def master(folder: Path, size: int, log: Path, channel: socket.socket) -> None:
    """Trains on the requests of `channel`, one JSON a line, and answers the same way."""
    lines = channel.makefile("rw", buffering=1)

    def say(**values: Any) -> None:
        lines.write(json.dumps(values) + "\n")
        lines.flush()

    def arm(at: int = 0, action: int = 0, number: int = 0) -> None:
        ctypes.CDLL(None).fault_arm(os.fsencode(folder), os.fsencode(log), at, action, number)

    arm()
    run_lock.WAIT_SECONDS = 0.0
    try:
        with run_lock.held(folder, lambda line: None, {}):
            workers = Workers(folder, size)
            say(restored=workers.restore())
            for line in lines:
                step, *fault = json.loads(line)
                arm(*fault)
                saved = workers.save(step)
                say(saved=saved)
                if set(saved) != {True}:
                    return
    except InputError as error:
        say(refused=str(error))


class Master:
    """A master's process."""

    def __init__(self, folder: Path, size: int, log: Path):
        self._channel, theirs = socket.socketpair()
        self.step, self.size = 0, size
        self._pid = os.fork()
        if not self._pid:
            with contextlib.suppress(BaseException):
                self._channel.close()
                master(folder, size, log, theirs)
            os._exit(0)
        theirs.close()
        self._channel.settimeout(SECONDS)
        self._lines = self._channel.makefile("rw", buffering=1)
        self.answer = self._read()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        return json.loads(line) if line else {}

    def save(self, step: int, at: int = 0, action: int = 0, number: int = 0) -> dict[str, Any]:
        """Returns what the master says; {} if it died."""
        self._lines.write(json.dumps([step, at, action, number]) + "\n")
        self._lines.flush()
        return self._read()

    def end(self, how: signal.Signals | None = None) -> None:
        """Kills the master, or lets it end."""
        if how:
            os.kill(self._pid, how)
        self._lines.close()
        self._channel.close()
        os.waitpid(self._pid, 0)


class Protocol(RuleBasedStateMachine):
    """Two masters, one folder.

    `possible` are the steps from which a master may resume.
    """

    def __init__(self) -> None:
        super().__init__()
        self._top = Path(tempfile.mkdtemp())
        self._folder, self._log = self._top / "run", self._top / "log"
        self._folder.mkdir()
        self._base = self._top / "base"  # what was on the disk when the log began
        shutil.copytree(self._folder, self._base)
        self._running: dict[str, Master] = {}
        self._possible = {0}

    def teardown(self) -> None:
        for each in self._running.values():
            each.end(signal.SIGKILL)
        shutil.rmtree(self._top)

    @rule(name=st.sampled_from(NAMES), size=st.integers(1, 3))
    def start(self, name: str, size: int) -> None:
        if name in self._running:
            return
        started = Master(self._folder, size, self._log)
        if self._running:
            assert "in use by process" in started.answer["refused"], started.answer
            COUNTS["starts that are refused"] += 1
            started.end()
            return
        steps = started.answer["restored"]
        assert len(set(steps)) == 1 and steps[0] in self._possible, (steps, self._possible)
        COUNTS[f"starts on {size} workers"] += 1
        started.step, self._possible = steps[0], {steps[0]}
        self._running[name] = started

    def _save(self, at: int = 0, action: int = 0, number: int = 0) -> dict[str, Any]:
        (name,) = self._running
        here = self._running[name]
        step = here.step + 1
        self._possible.add(step)
        answer = here.save(step, at, action, number)
        if answer.get("saved") == [True] * here.size:
            here.step, self._possible = step, {step}
            COUNTS["saves"] += 1
        else:
            here.end()
            del self._running[name]
        return answer

    @precondition(lambda self: self._running)
    @rule()
    def save(self) -> None:
        assert self._save(), "the master died"

    @precondition(lambda self: self._running)
    @rule(at=OPERATIONS, action=st.sampled_from(
        [everywhere.KILL_BEFORE, everywhere.KILL_AFTER, everywhere.TEAR]))  # fmt: skip
    def save_and_be_killed(self, at: int, action: int) -> None:
        COUNTS["kills inside a save"] += not self._save(at, action)

    @precondition(lambda self: self._running)
    @rule(at=OPERATIONS, number=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EINTR]))
    def save_on_a_bad_disk(self, at: int, number: int) -> None:
        answer = self._save(at, everywhere.FAIL, number)
        assert answer, "the master died"
        failed = answer["saved"][0] is not True
        assert not failed or len(set(answer["saved"])) == 1, answer  # all workers say the same
        COUNTS["saves that fail"] += failed

    @precondition(lambda self: self._running)
    @rule(how=st.sampled_from([signal.SIGKILL, None]))
    def end(self, how: signal.Signals | None) -> None:
        self._running.popitem()[1].end(how)
        COUNTS["ends and kills between saves"] += 1

    @precondition(lambda self: self._log.exists())
    @rule(which=st.integers(0, 99))
    def lose_power(self, which: int) -> None:
        while self._running:
            self._running.popitem()[1].end(signal.SIGKILL)
        disk = power_loss.Disk(self._base)
        disk.rebase(self._folder)
        for operation in power_loss.read_log(self._log):
            disk.do(operation)
        assert disk.seen() == power_loss.read(self._folder), "the log misses operations"
        trees = [tree for _, tree in disk.after_power_loss()]
        for folder in (self._folder, self._base):
            shutil.rmtree(folder)
            power_loss.write(trees[which % len(trees)], folder)
        self._log.unlink()
        COUNTS["power failures"] += 1


def main() -> int:
    """Returns the exit code; prints what happened how often."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if code := everywhere.preloaded("tests.faults.protocol"):
        return code[0]
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=options.examples, stateful_step_count=options.steps, deadline=None,
            suppress_health_check=list(HealthCheck), database=None, print_blob=True,
        ),
    )  # fmt: skip
    print(", ".join(f"{count} {what}" for what, count in sorted(COUNTS.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
