"""What ends a run that has gone wrong by itself: numbers that are none, steps that do not come."""

import faulthandler
import math
from collections.abc import Mapping, Sequence
from types import TracebackType

from data_pipelines.errors import InputError

SHOWN_GRADIENTS = 5
SHOWN_EXAMPLES = 64


class NonFiniteError(InputError):
    """The loss or a gradient of a step is not finite; all workers raise it at the same step."""


def describe_nonfinite(
    step: int, loss: float, norms: Mapping[str, float], examples: Sequence[int]
) -> str:
    """Returns one line: the step, the loss, the largest gradients and the batch's examples.

    Args:
      norms: of the gradient of each variable, by its name, before clipping.
      examples: of the global batch, as numbers in the data that the stage reads; may be empty.
    """
    # Those that are not finite come first.
    largest = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
    gradients = ", ".join(f"{name} {norms[name]:.4g}" for name in largest[:SHOWN_GRADIENTS])
    shown = ", ".join(map(str, examples[:SHOWN_EXAMPLES])) or "not known"
    more = len(examples) - SHOWN_EXAMPLES
    shown += f" and {more} more" if more > 0 else ""
    return (
        f"step {step} is not finite: loss {loss:.6g}; largest gradients by their norm: "
        f"{gradients}; examples of the batch: {shown}"
    )


class StallWatchdog:
    """Ends the process, after every thread's stack is printed, if nothing beats for some time.

    It waits in a thread of C, which a process that hangs in TensorFlow cannot hold up. The exit
    code is 1: under the launcher --max_restarts starts the job again.

    Args:
      seconds: how long; 0 waits for ever.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def beat(self) -> None:
        """Begins to wait anew."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True)

    def __enter__(self) -> "StallWatchdog":
        self.beat()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
