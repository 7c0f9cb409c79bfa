"""Jobs whose number of workers changes: one less after a loss, more when a file allows more.

Each change stops all workers and starts the new number of them. The trainer resumes from its last
good checkpoint, on any number of workers. docs/elastic.md has the reasons and the costs.
"""

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import USAGE_EXIT_CODE
from launch.local import workers as local


@dataclass(frozen=True)
class Limits:
    """Limits of the number of workers."""

    minimum: int  # the job ends below it
    maximum: int  # also the number that is allowed while there is no `available_file`
    start: int | None = None  # the number to begin with; None for as many as are allowed
    available_file: Path | None = None  # holds the number that is allowed now
    max_losses: int | None = None  # the number of losses to survive; None for any


class AvailableWorkers:
    """The number in a file that may be rewritten at any time.

    Args:
        file: None stands for a file that never exists.
        without_file: The number while the file does not exist.
    """

    def __init__(self, file: Path | None, without_file: int):
        self._file = file
        self._without_file = without_file
        self._last_read = self._last_seen = self._stamp()

    def read(self) -> int:
        """Returns the number as it is now.

        Raises:
            ValueError: The file exists, and cannot be read or holds no number.
        """
        self._last_read = self._last_seen = self._stamp()
        path = self._file
        if path is None or self._last_read is None:
            return self._without_file
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
                raise ValueError(f"{path} is not a file")
            with path.open("rb") as file:
                content = file.read(100).strip()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if not content.isdigit():
            text = content.decode(errors="replace")
            raise ValueError(f"{path} holds {text!r}, which is not a whole number")
        return int(content)

    def is_rewritten(self) -> bool:
        """Returns whether the file was rewritten since `read`, even with the same number.

        It must have stayed the same since the call before: it may be half written.
        """
        stamp, before = self._stamp(), self._last_seen
        self._last_seen = stamp
        return stamp == before and stamp != self._last_read

    def _stamp(self) -> tuple[int | None, ...] | None:
        """Returns a value that changes with the file, None while it does not exist."""
        try:
            status = self._file.stat() if self._file else None
        except FileNotFoundError:
            return None
        except OSError as error:
            return (error.errno,)
        return status and (status.st_ino, status.st_mtime_ns, status.st_size)


def run_elastic(
    command: Sequence[str], limits: Limits, grace_seconds: float = 5.0, with_horovod: bool = False
) -> int:
    """Runs workers as `run_local` does, and changes their number.

    One worker less after a failure; as many as `limits.available_file` allows when it is rewritten.
    A configuration error (exit code 2) and a signal to the launcher end the job.

    Returns:
        The exit code: that of `run_local` if a failure ends the job; 2 if too few workers are
        allowed at the start, 143 if too few are allowed later.
    """
    available = AvailableWorkers(limits.available_file, limits.maximum)
    allowed = _read(available, limits, limits.start or limits.maximum, local.say)
    if allowed < limits.minimum:
        local.say(_too_few(f"{limits.available_file} allows {allowed} workers", limits))
        return USAGE_EXIT_CODE
    workers = min(allowed, limits.start or limits.maximum)
    losses = 0
    while True:
        allowed = workers

        def asks_stop(say: local.Say, workers: int = workers) -> bool:
            nonlocal allowed
            if available.is_rewritten():
                allowed = _read(available, limits, workers, say)
            return allowed != workers

        ending = local.run_together(command, workers, grace_seconds, with_horovod, asks_stop)
        if ending.is_final:
            local.say(*ending.lines)
            return ending.exit_code
        losses += not ending.asked
        after, decision = _next(limits, workers, allowed if ending.asked else None, losses)
        if not local.say(*ending.lines, decision) or not after:
            return ending.exit_code
        workers = after


def _next(limits: Limits, workers: int, allowed: int | None, losses: int) -> tuple[int, str]:
    """Returns the next number of workers, 0 to end the job, and the line to print.

    Args:
        workers: The number until now.
        allowed: The number in the rewritten file; None if a worker was lost.
        losses: The number of losses until now.
    """
    after, fact = workers - 1, f"{workers - 1} of {workers} workers left"
    if allowed is not None:
        after = allowed
        fact = f"{limits.available_file} allows {allowed} instead of {workers} workers"
    if after < limits.minimum:
        return 0, _too_few(fact, limits)
    if allowed is None and limits.max_losses is not None and losses > limits.max_losses:
        return 0, f"{fact}; gave up after loss {losses}, --max_restarts={limits.max_losses}"
    return after, f"{fact}: resuming from the last checkpoint"


def _too_few(fact: str, limits: Limits) -> str:
    return f"{fact}, fewer than --min_workers={limits.minimum}: the job ends"


def _read(available: AvailableWorkers, limits: Limits, otherwise: int, say: local.Say) -> int:
    """Returns the file's number, at most the maximum; `otherwise` if it holds none."""
    try:
        return min(available.read(), limits.maximum)
    except ValueError as error:
        say(f"--available_workers: {error}; the job keeps {otherwise} workers")
        return otherwise
