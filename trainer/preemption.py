"""TERM asks a run to save and stop.

The step that is under way is finished, all workers learn of the request with its sums, and the
chief writes a checkpoint: so the time between TERM and KILL (`terminationGracePeriodSeconds`,
Slurm's `KillWait`) must be longer than a step, an evaluation and the writing of a checkpoint
together. Where it is not, the run resumes from the checkpoint before.
"""

import signal
from types import FrameType

EXIT_CODE = 143  # what a shell reports for a process ended by TERM


class Preempted(Exception):
    """The run was asked to stop, and its state is saved."""


class StopRequest:
    """Notes a TERM. Make it after the distributor: TensorFlow's multi-worker strategy installs a
    handler of its own, which swallows the signal.

    Attributes:
      received: whether TERM has come. A second one ends the process at once; a checkpoint that is
        being written is then lost, and the one before is good.
    """

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
