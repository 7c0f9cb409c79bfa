"""Processes that tests start, and that end with them."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Returns the processes that a process started and that run; not every kernel lists them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def ended(process: subprocess.Popen, seconds: float) -> Iterator[None]:
    """Kills the process when the block ends, or after `seconds`; closes its output.

    A launcher's workers die with it.
    """
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
