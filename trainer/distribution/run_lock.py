"""One run at a time in a run's folder.

The chief holds a lock on RUN/run.lock while it works. The kernel, or the NFS server, releases it
when the process ends, however it ends, so no lock is stale on one machine. After the loss of a node
an NFS server may need until its lease expires; a restart of the same job waits for that.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data_pipelines.durable import make_folder
from data_pipelines.errors import InputError
from trainer.safe_files import without_links

FILE = "run.lock"
WAIT_SECONDS = 10.0  # for a predecessor that is just ending
SAME_JOB_WAIT_SECONDS = 120.0  # above the lease of NFS servers, 90 s by default
_POLL_SECONDS = 0.2
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def held(
    folder: Path, log: Callable[[str], None], environ: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Holds the lock of the run's `folder` for the duration of the block; creates the folder.

    Raises:
        InputError: Another process holds the lock, or the folder cannot be written.
    """
    path = folder / FILE
    try:
        make_folder(folder)
        descriptor = without_links(str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise InputError(
            f"--run_dir={folder} cannot be written: {error.strerror}: make room or make it writable"
        ) from None
    with os.fdopen(descriptor, "a+", encoding="utf-8", errors="replace") as file:
        if _locked(file, folder, _job(environ), log):
            _write_holder(file, _job(environ))
        yield


def _locked(file: IO[str], folder: Path, job: str, log: Callable[[str], None]) -> bool:
    """Takes the lock; returns False, after a warning, if the file system cannot lock."""
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                log(
                    f"warning: --run_dir={folder}: its file system has no locks "
                    f"({error.strerror}); a second run in this folder would not be noticed"
                )
                return False
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(f"{folder / FILE} cannot be locked: {error.strerror}") from None
        holder = _holder(file)
        same_job = bool(job) and holder.get("job") == job
        if time.monotonic() - began > (SAME_JOB_WAIT_SECONDS if same_job else WAIT_SECONDS):
            raise InputError(
                f"--run_dir={folder} is in use by {_described(holder)}: wait until it has ended, "
                "stop it, or name another --run_dir"
            )
        if not told:
            log(f"waiting for {_described(holder)}, which still uses --run_dir={folder}")
            told = True
        time.sleep(_POLL_SECONDS)


def _job(environ: Mapping[str, str]) -> str:
    """Returns what the platform calls this job, "" if it has no name."""
    return environ.get("WARMSTATE_JOB") or environ.get("SLURM_JOB_ID") or ""


def _write_holder(file: IO[str], job: str) -> None:
    """Says in the file who holds it; for people and for `_described`, not for the lock itself."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
    text = json.dumps(holder | {"since": time.strftime("%Y-%m-%d %H:%M:%S %z")}) + "\n"
    with contextlib.suppress(OSError):  # a full disk: the lock holds without it
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), text.encode())  # not through a buffer, which `close` would flush


def _holder(file: IO[str]) -> dict[str, Any]:
    try:
        file.seek(0)
        found = json.loads(file.read(4096))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(holder: Mapping[str, Any]) -> str:
    if not {"host", "pid"} <= holder.keys():
        return "another process"
    job = f" of job {holder['job']!r:.60}" if holder.get("job") else ""
    return (
        f"process {holder['pid']!r:.20} on host {holder['host']!r:.80}{job}, "
        f"since {holder.get('since')!r:.40}"
    )
