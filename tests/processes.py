"""Processes that tests start, and that end with them."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator


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
