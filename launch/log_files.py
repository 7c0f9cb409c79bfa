"""Printing log files while other processes write them."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_SECONDS = 0.5


def print_file(path: Path, job_is_over: Callable[[], bool] | None = None) -> None:
    """Prints a file.

    Args:
        job_is_over: Until it returns True, what is written later is printed too, and the file need
            not exist yet.
    """
    position = 0
    while True:
        over = job_is_over is None or job_is_over()  # asked before the last look at the file
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                while data := file.read(1 << 16):
                    sys.stdout.buffer.write(data)
                position = file.tell()
            sys.stdout.buffer.flush()
        if over:
            return
        time.sleep(_LOOK_SECONDS)
