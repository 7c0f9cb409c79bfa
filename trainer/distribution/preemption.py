"""TERM asks a run to save and stop.

The step or the batch of an evaluation that is under way is finished, all workers learn of the
request with its sums, and the chief writes a checkpoint: so the time between TERM and KILL
(`terminationGracePeriodSeconds`, Slurm's `KillWait`) must be longer than a step and the writing of
a checkpoint together. Where it is not, the run resumes from the checkpoint before.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Sequence

EXIT_CODE = 143  # what a shell reports for a process ended by TERM
_STDERR = 2  # the file descriptor


class Preempted(Exception):
    """The run was asked to stop; its text says what is saved."""


class StopRequest:
    """Notes a TERM. Make it in the main thread, after the distributor: TensorFlow's multi-worker
    strategy installs a handler of its own, which swallows the signal.

    The signals are taken in a thread, so that a main thread that hangs in TensorFlow, where Python
    runs no handler, does not keep a second one or the end of the grace time from ending the
    process. A checkpoint that is being written is then lost, and the one before is good.

    Args:
        signals: Names without SIG, as ("TERM", "USR1"). The second of the same kind ends the process.
        grace_seconds: After so long the process ends; 0 = it may take its time.

    Attributes:
        received: Whether one has come.
    """

    def __init__(self, signals: Sequence[str] = ("TERM",), grace_seconds: float = 0.0):
        self.received = False
        self._grace_seconds = grace_seconds or math.inf
        self._numbers = {signal.Signals[f"SIG{name}"] for name in signals}
        self._pipe, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in self._numbers:
            signal.signal(number, lambda number, frame: None)  # else nothing comes to the pipe
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
                _end(f"a second {signal.Signals(number).name} came")
            if not seen:
                limit = time.monotonic() + self._grace_seconds
            seen.add(number)
            self.received = True


def _end(why: str) -> None:
    # Not through sys.stderr: its lock may be held by the thread that hangs.
    os.write(_STDERR, f"{why}: ended at once\n".encode())
    os._exit(EXIT_CODE)
