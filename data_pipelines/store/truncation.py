"""Names a file that was truncated while it was memory-mapped, instead of a bare bus error.

Reading a page beyond a file's end raises SIGBUS, for which Python's own handlers never run: the
failing instruction is repeated first. So this is a handler of the C library that calls Python.
"""

import ctypes
import os
import signal
from pathlib import Path

_sizes: dict[str, int] = {}  # of the files that are mapped
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def watch(path: Path, size: int) -> None:
    """Ends the process with a line about `path` if it is read beyond its end later on."""
    if not _sizes:
        ctypes.CDLL(None).signal(signal.SIGBUS, _on_bus_error)
    _sizes[str(path)] = size


@_Handler
def _on_bus_error(number: int) -> None:
    for path, size in _sizes.items():
        try:
            found = os.path.getsize(path)
        except OSError:
            found = 0
        if found < size:
            text = f"{path} has {found} bytes instead of {size}: it was truncated while in use"
            os.write(2, f"{text}; prepare the store again\n".encode("utf-8", "backslashreplace"))
            os._exit(2)
    ctypes.CDLL(None).signal(number, None)  # not one of ours: the repeated instruction ends it
