"""TERM asks a run to save and stop.

The current step or batch is finished, all workers learn of the request with its sums, and the
chief writes a checkpoint. So the time between TERM and KILL (`terminationGracePeriodSeconds`,
Slurm's `KillWait`) must be longer than a step plus a checkpoint; otherwise the run resumes from the
checkpoint before.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Sequence

from data_pipelines.errors import PREEMPTED_EXIT_CODE

_STDERR = 2  # the file descriptor


class Preempted(Exception):
    """The run was asked to stop; its text describes what is saved."""


class StopRequest:
    """Receives TERM.

    Make it in the main thread, after the distributor: TensorFlow's multi-worker strategy installs
    another handler, which swallows the signal.

    A thread receives the signals: Python runs no handlers while the main thread hangs in
    TensorFlow, but a second signal or the end of the grace time must still end the process. A
    checkpoint that is being written is then lost; the one before is intact.

    Args:
        signals: Names without SIG, as ("TERM", "USR1"). A second signal of the same kind ends the
            process at once.
        grace_seconds: The process ends this long after the first signal; 0 for no limit.

    Attributes:
        received: Whether a signal has been received.
    """

    def __init__(self, signals: Sequence[str] = ("TERM",), grace_seconds: float = 0.0):
        self.received = False
        self._grace_seconds = grace_seconds or math.inf
        self._numbers = {signal.Signals[f"SIG{name}"] for name in signals}
        self._pipe, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in self._numbers:  # without a handler nothing is written to the pipe
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._watch, name="stop request", daemon=True).start()

    def _watch(self) -> None:
        seen: set[int] = set()
        limit = math.inf
        while True:
            left = None if limit == math.inf else max(0.0, limit - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                _end(f"not stopped within --grace_seconds={self._grace_seconds:g} of the signal")
            (number,) = os.read(self._pipe, 1)
            if number not in self._numbers:
                continue
            if number in seen:
                _end(f"received a second {signal.Signals(number).name}")
            if not seen:
                limit = time.monotonic() + self._grace_seconds
            seen.add(number)
            self.received = True


def _end(why: str) -> None:
    # Not through sys.stderr: the hanging thread may hold its lock.
    os.write(_STDERR, f"{why}: ended immediately\n".encode())
    os._exit(PREEMPTED_EXIT_CODE)
