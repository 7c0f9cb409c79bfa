"""Keeps the gRPC servers of workers on one machine on loopback.

TensorFlow binds a worker's server to every interface, also if the cluster names 127.0.0.1. The
server has no password: whoever reaches it can read and write files as the worker's user. Workers
therefore preload a small C library that changes where their cluster port is bound.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

PORT_VARIABLE = "WARMSTATE_LOOPBACK_PORT"
WARNING = (
    "warning: workers' gRPC servers listen on every interface, without a password: restricting "
    "them to loopback needs a C compiler (cc), {reason}; see docs/reliability.md"
)
_SOURCE = Path(__file__).with_name("loopback.c")


@contextlib.contextmanager
def library() -> Iterator[tuple[Path | None, str]]:
    """Builds the library for the duration of the block.

    Returns:
        Its path and ""; or None and a warning if it cannot be built.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        yield None, WARNING.format(reason="which was not found")
        return
    with tempfile.TemporaryDirectory(prefix="warmstate-") as folder:
        path = Path(folder) / "loopback.so"
        command = [compiler, "-O1", "-shared", "-fPIC", str(_SOURCE), "-o", str(path), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        built = b"" if done.returncode else path.read_bytes()
    if not built:
        last = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        yield None, WARNING.format(reason=f"which failed: {last}")
        return
    # In memory: a launcher that is killed leaves no file, and /tmp may forbid executables.
    with open(os.memfd_create("loopback.so"), "wb", buffering=0) as file:
        file.write(built)
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"), ""


def variables(path: Path, port: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that preload the library at `path` into a worker."""
    preloaded = [str(path), *inherited.get("LD_PRELOAD", "").split()]
    return {"LD_PRELOAD": " ".join(preloaded), PORT_VARIABLE: str(port)}
