"""Aborts a run on non-finite values or stalled steps."""

import faulthandler
import math
import time
from collections.abc import Mapping, Sequence

from data_pipelines.errors import InputError

SHOWN_GRADIENTS = 5
SHOWN_EXAMPLES = 64


class NonFiniteError(InputError):
    """A loss or gradient is not finite; all workers raise it at the same step."""


def describe_nonfinite(
    step: int, loss: float, norms: Mapping[str, float], examples: Sequence[int]
) -> str:
    """Returns one line: the step, the loss, the largest gradients and the batch's examples.

    Args:
        norms: Norm of each variable's gradient, before clipping.
        examples: Numbers of the global batch's examples in the stage's data; may be empty.
    """
    largest = list(largest_first(norms).items())[:SHOWN_GRADIENTS]
    gradients = ", ".join(f"{name} {norm:.4g}" for name, norm in largest)
    shown = ", ".join(map(str, examples[:SHOWN_EXAMPLES])) or "unknown"
    more = len(examples) - SHOWN_EXAMPLES
    shown += f" and {more} more" if more > 0 else ""
    return (
        f"step {step} is not finite: loss {loss:.6g}; largest gradients by their norm: "
        f"{gradients}; examples of the batch: {shown}"
    )


def largest_first(norms: Mapping[str, float]) -> dict[str, float]:
    """Returns the norms by name, the largest first, those that are not finite before all others."""
    names = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
    return {name: norms[name] for name in names}


class StallWatchdog:
    """Prints every thread's stack and exits with code 1 if `beat` is not called for some time.

    A thread of C waits, which a process that hangs in TensorFlow cannot block. Under the launcher,
    --max_restarts restarts the job.

    Args:
        seconds: Longest time between two beats; 0 for no limit.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._set = -math.inf  # when the thread was started, by time.monotonic()

    def beat(self) -> None:
        """Restarts the wait."""
        # Each setting ends a thread and starts one: quick steps share a setting.
        tolerance, now = min(1.0, self._seconds / 10), time.monotonic()
        if self._seconds and now - self._set >= tolerance:
            faulthandler.dump_traceback_later(self._seconds + tolerance, exit=True)
            self._set = now

    def __enter__(self) -> "StallWatchdog":
        self.beat()
        return self

    def __exit__(self, *error: object) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
            self._set = -math.inf
