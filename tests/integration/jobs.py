"""A job under the real launcher, whose workers a test can find and hurt."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.integration.programs import ENVIRONMENT, REPOSITORY, SMALL
from tests.processes import children_of, ended

DISTRIBUTOR_FLAGS = {"multi_worker": (), "horovod": ("--distributor=horovod",)}

# In the middle of whatever Python code it runs a worker raises (SIGUSR1) or gets stuck (SIGUSR2:
# other than with SIGSTOP, its other threads go on).
HURT_ON_SIGNAL = """
import signal
import time

def fail(number, frame):
    raise RuntimeError("the test asked for it")

signal.signal(signal.SIGUSR1, fail)
signal.signal(signal.SIGUSR2, lambda number, frame: time.sleep(1e6))
"""


class Job:
    """A launcher, its lines, and its workers by rank.

    Attributes:
      lines: printed so far.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.lines: list[str] = []

    def wait_for(self, *texts: str) -> str:
        """Returns the next line that holds one of `texts`."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if any(text in line for text in texts):
                return self.lines[-1]
        raise AssertionError(f"none of {texts} was printed:\n" + "\n".join(self.lines))

    def worker_pids(self, workers: int = 2) -> dict[int, int]:
        """Returns the workers' process ids, by rank."""
        limit = time.monotonic() + 300
        while len(pids := self._pids_of_ranks()) < workers:  # they are being started
            assert self.process.poll() is None and time.monotonic() < limit, "no workers are there"
            time.sleep(0.01)
        return pids

    def _pids_of_ranks(self) -> dict[int, int]:
        pids = {}
        for pid in children_of(self.process.pid):
            text = ""
            with contextlib.suppress(OSError):  # it ended meanwhile
                text = Path(f"/proc/{pid}/environ").read_text()
            pairs = (entry.partition("=") for entry in text.split("\0"))
            environ = {name: value for name, _, value in pairs}
            if "HOROVOD_RANK" in environ:
                pids[int(environ["HOROVOD_RANK"])] = pid
            elif "TF_CONFIG" in environ:
                pids[json.loads(environ["TF_CONFIG"])["task"]["index"]] = pid
        return pids

    def finish(self) -> int:
        """Reads all lines; returns the exit code."""
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait()


@contextlib.contextmanager
def job(
    distributor: str,
    folder: Path,
    *flags: str,
    launcher_flags: tuple[str, ...] = (),
    seconds: float = 600,
) -> Iterator[Job]:
    """Starts two workers; ends them, if they still run, when the block ends or after `seconds`."""
    patch = folder / "python"
    patch.mkdir(parents=True)
    (patch / "sitecustomize.py").write_text(HURT_ON_SIGNAL)
    launcher = [sys.executable, "-u", "-m", "launch.main", "--workers=2"]
    launcher += [*DISTRIBUTOR_FLAGS[distributor], *launcher_flags]
    # By exec, never forked: only then are sitecustomize.py run and /proc/PID/environ right.
    process = subprocess.Popen(
        [*launcher, "--", *SMALL, *flags],
        cwd=REPOSITORY,
        env=ENVIRONMENT | {"PYTHONPATH": str(patch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with ended(process, seconds):
        yield Job(process)


def wait_until_gone(pids: Iterator[int], seconds: float = 10.0) -> None:
    """Returns when none of the processes lives."""
    limit = time.monotonic() + seconds
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([pidfd], [], [], max(0.0, limit - time.monotonic()))
        os.close(pidfd)
        assert ended, f"process {pid} still lives"


HURT = {
    "raise": signal.SIGUSR1,
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "stick": signal.SIGUSR2,
}
