"""Named jobs on this machine, for `launch status|logs|cancel NAME`.

local-jobs/NAME in the working folder holds job.json (process, command, times, exit code) and log
(every printed line). A later job of the same name replaces both.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import log_files
from launch.local import workers as local
from launch.platform import NAME

FOLDER = "local-jobs"


@dataclass
class Job:
    """The content of job.json. Process ids are reused, so it has the start of the launcher's."""

    command: Sequence[str]  # each worker's
    workers: int
    host: str
    pid: int  # the launcher's
    pid_started: int  # in clock ticks since the boot
    began: float  # seconds since 1970
    ended: float | None = None
    exit_code: int | None = None  # None until the job has ended, and if the launcher was killed

    @property
    def is_running(self) -> bool:
        """Whether the launcher runs on this machine."""
        return self.exit_code is None and _started(self.pid) == self.pid_started

    @property
    def is_elsewhere(self) -> bool:
        """Whether the job was started on another machine and may still run there."""
        return self.exit_code is None and self.host != socket.gethostname()


def faults(name: str) -> list[str]:
    """Returns one line if a job of that name cannot be started now."""
    if not re.fullmatch(NAME, name):
        return [f"--name={name}: must be letters, digits, . - and _"]
    if not os.access(Path.cwd(), os.W_OK):
        return [f"--name={name}: {FOLDER} goes to {Path.cwd()}, which cannot be written"]
    job = _read(name)
    if job and job.is_elsewhere:
        return [
            f"--name={name}: it was started on {job.host}; remove {_folder(name)} if it is gone"
        ]
    if job and job.is_running:
        return [f"--name={name}: it runs already, as process {job.pid}; choose another"]
    return []


@contextlib.contextmanager
def recorded(name: str, command: Sequence[str], workers: int) -> Iterator[Job]:
    """Yields the job, whose `exit_code` the block sets, and copies what is printed to its log."""
    folder = _folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.getpid()
    host, started = socket.gethostname(), _started(pid) or 0
    job = Job(list(command), workers, host, pid, started, began=time.time())
    with open(folder / "log", "wb", buffering=0) as log, local.lines_copied_to(log):
        _write(folder, job)
        yield job
    job.ended = time.time()
    _write(folder, job)


def status(name: str) -> int:
    """Prints the state of the job; returns 1 if there is no job of that name, else 0."""
    job = _read(name)
    if job is None:
        return _no_such_job(name)
    print(f"{name}: {_state(job)}")
    print(f"  workers: {job.workers} of {shlex.join(job.command)}")
    print(f"  began:   {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(job.began))}")
    print(f"  log:     {_folder(name) / 'log'}")
    return 0


def logs(name: str, follow: bool) -> int:
    """Prints the job's log, with `follow` until the job ends; returns 1 if there is no job."""
    job = _read(name)
    if job is None:
        return _no_such_job(name)

    def job_is_over() -> bool:
        found = _read(name)  # None if its folder was removed
        return found is None or not found.is_running

    log_files.print_file(_folder(name) / "log", job_is_over if follow else None)
    return 0


def cancel(name: str) -> int:
    """Sends TERM to the launcher, which stops the workers; returns 1 if it does not run."""
    job = _read(name)
    if job is None:
        return _no_such_job(name)
    if not job.is_running:
        print(f"launch: {name}: {_state(job)}", file=sys.stderr)
        return 1
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        descriptor = os.pidfd_open(job.pid)
        if job.is_running:  # so the descriptor is of the launcher, not of a later process
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        os.close(descriptor)
    print(f"{name}: its workers save their state and stop")
    return 0


def _state(job: Job) -> str:
    if job.is_elsewhere:
        return f"started on {job.host}; ask there"
    if job.is_running:
        return f"running for {time.time() - job.began:.0f} s, process {job.pid}"
    if job.exit_code is None or job.ended is None:
        return "gone: its launcher was killed"
    return f"ended with code {job.exit_code} after {job.ended - job.began:.0f} s"


def _no_such_job(name: str) -> int:
    print(f"launch: no job {name} in {_folder(name).parent}", file=sys.stderr)
    return 1


def _folder(name: str) -> Path:
    return Path.cwd() / FOLDER / name


def _read(name: str) -> Job | None:
    file = _folder(name) / "job.json"
    try:
        return Job(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        sys.exit(f"launch: {file} is damaged, or of another version: {error}; remove it")


def _write(folder: Path, job: Job) -> None:
    beside = folder / "job.json.new"
    beside.unlink(missing_ok=True)  # it may be a link to a file of somebody else
    with beside.open("x") as file:
        file.write(json.dumps(asdict(job), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / "job.json")


def _started(pid: int) -> int | None:
    """Returns when the process began, in clock ticks since the boot; None if it does not run."""
    try:
        # Fields 3 and 22 of proc(5) stat, behind the program's name, which may hold blanks.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
