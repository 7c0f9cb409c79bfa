"""TERM asks a run to save and stop."""

import signal
from types import FrameType

EXIT_CODE = 143  # what a shell reports for a process ended by TERM


class Preempted(Exception):
    """The run was asked to stop, and its state is saved."""


class StopRequest:
    """Notes a TERM. Make it after the distributor: TensorFlow's multi-worker strategy installs a
    handler of its own, which swallows the signal.

    Attributes:
      received: whether TERM has come. A second one ends the process at once.
    """

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
