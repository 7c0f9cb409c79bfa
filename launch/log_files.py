"""Log files that others write."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_SECONDS = 0.5


def print_file(path: Path, job_is_over: Callable[[], bool] | None = None) -> None:
    """Prints a file; with `job_is_over` also what is written later, until that returns True.

    Then the file need not be there yet.
    """
    position = 0
    while True:
        over = job_is_over is None or job_is_over()  # before the last look at the file
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
