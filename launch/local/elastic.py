"""Jobs whose number of workers changes: one less after a loss, more where there are more.

Each change ends all workers and starts the new number of them; the trainer goes on from its last
good checkpoint, on any number of workers. docs/elastic.md says why, and what a change costs.
"""

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.local import workers as local


@dataclass(frozen=True)
class Limits:
    """What the number of workers may be.

    Attributes:
      minimum: below it the job ends.
      maximum: never more.
      start: how many to begin with; None: as many as there may be.
      available_file: holds how many there may be now; without such a file, `maximum`.
      max_losses: after which the job goes on; None: any number.
    """

    minimum: int
    maximum: int
    start: int | None = None
    available_file: Path | None = None
    max_losses: int | None = None


class AvailableWorkers:
    """The number in a file that somebody rewrites now and then.

    Args:
      file: None is a file that is never there.
      without_file: the number while it is not there.
    """

    def __init__(self, file: Path | None, without_file: int):
        self._file = file
        self._without_file = without_file
        self._last_read = self._last_seen = self._stamp()

    def read(self) -> int:
        """Returns the number as it is now.

        Raises:
          ValueError: the file is there, and cannot be read or holds something else.
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
        """Returns whether the file is another one than `read` saw, also if the number is the same.

        Only if it was the same at the call before: what is half written is no news.
        """
        stamp, before = self._stamp(), self._last_seen
        self._last_seen = stamp
        return stamp == before and stamp != self._last_read

    def _stamp(self) -> tuple[int | None, ...] | None:
        """Returns what changes when the file does; None while it is not there."""
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
    """Runs workers as `run_local` does, but starts another number of them after some
    changes: one less after a failure, and whatever `limits.available_file` allows when rewritten.

    A failure of configuration (exit code 2) and a signal to the launcher end the job.

    Returns the exit code: as `run_local` does, where the job ends by a failure; 2 if there are too
    few workers to begin with, and 143 if that is so later.
    """
    available = AvailableWorkers(limits.available_file, limits.maximum)
    allowed = _read(available, limits, limits.start or limits.maximum, local.say)
    if allowed < limits.minimum:
        local.say(_too_few(f"{limits.available_file} allows {allowed} workers", limits))
        return local.CONFIGURATION_EXIT_CODE
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
    """Returns how many workers to go on with, 0 to end the job, and the line that says so.

    Args:
      workers: that there were.
      allowed: by the file that was rewritten; None: a worker was lost.
      losses: until now.
    """
    after, fact = workers - 1, f"{workers - 1} of {workers} workers left"
    if allowed is not None:
        after = allowed
        fact = f"{limits.available_file} allows {allowed} instead of {workers} workers"
    if after < limits.minimum:
        return 0, _too_few(fact, limits)
    if allowed is None and limits.max_losses is not None and losses > limits.max_losses:
        return 0, f"{fact}; gave up after loss {losses}, --max_restarts={limits.max_losses}"
    return after, f"{fact}: going on from the last checkpoint"


def _too_few(fact: str, limits: Limits) -> str:
    return f"{fact}, fewer than --min_workers={limits.minimum}: the job ends"


def _read(available: AvailableWorkers, limits: Limits, otherwise: int, say: local.Say) -> int:
    """Returns the file's number, not more than the maximum; `otherwise` if it has none."""
    try:
        return min(available.read(), limits.maximum)
    except ValueError as error:
        say(f"--available_workers: {error}; the job keeps {otherwise} workers")
        return otherwise
