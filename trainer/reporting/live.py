"""The live line of a stage's progress, redrawn up to ten times a second."""

import math
import time
from collections import deque
from collections.abc import Callable

from trainer.reporting.console import Console
from trainer.reporting.metrics_file import format_seconds

REDRAW_SECONDS = 0.1
RECENT_STEPS = 20
BAR_COLUMNS = (8, 24)


def bar(share: float, columns: int) -> str:
    """Returns a bar of `columns` characters, filled to `share`."""
    full = round(min(max(share, 0.0), 1.0) * columns)
    return "━" * full + "╌" * (columns - full)


def fitted(head: str, parts: list[str], share: float, columns: int) -> str:
    """Returns the head, a bar and the first of `parts`, as many as fit into a line."""
    least, most = BAR_COLUMNS
    kept: list[str] = []
    for part in parts:
        if len(" · ".join([head, *kept, part])) >= columns:
            break
        kept.append(part)
    text = " · ".join(kept)
    room = columns - len(head) - len(text) - 3
    drawn = f" {bar(share, min(room, most))}" if room >= least else ""
    return f"{head}{drawn} {text}"


class LiveStatus:
    """Keeps a console's live line up to date; does nothing without a live line.

    Args:
        console: A console, or a function that prints a line.
        name, steps: The stage's.
    """

    def __init__(
        self, console: Console | Callable[[str], None], name: str, steps: int, steps_per_epoch: int
    ):
        self._console = console if isinstance(console, Console) else None
        self._draw = console.live if isinstance(console, Console) else None
        self._name = name
        self._steps = steps
        self._steps_per_epoch = steps_per_epoch
        self._recent: deque[tuple[float, float, float, float | None]] = deque(maxlen=RECENT_STEPS)
        self._step = 0
        self._eta = ""
        self._shown_at = -math.inf

    @property
    def is_on(self) -> bool:
        """Whether a live line replaces the status lines at intervals."""
        return self._draw is not None

    def count(
        self, step: int, loss: float, tokens: float, seconds: float, wait_seconds: float | None,
        remaining_seconds: float,
    ) -> None:  # fmt: skip
        """Counts a step, and redraws the line if it is due.

        Args:
            tokens: Read by the step, over all workers.
            seconds: The step's duration.
            wait_seconds: This process's wait for the step's batch; None if unknown.
            remaining_seconds: Until the end of the stage.
        """
        if not self.is_on:
            return
        self._recent.append((loss, tokens, seconds, wait_seconds))
        self._step, self._eta = step, format_seconds(remaining_seconds)
        now = time.monotonic()
        if now - self._shown_at >= REDRAW_SECONDS or step == self._steps:
            self._shown_at = now
            self._show("")

    def note(self, doing: str) -> None:
        """Shows the run's activity between steps."""
        if self.is_on:
            self._show(doing)

    def _show(self, doing: str) -> None:
        if self._console is None or self._draw is None:
            return
        finite = [loss for loss, *_ in self._recent if math.isfinite(loss)]
        tokens = sum(each[1] for each in self._recent)
        seconds = sum(each[2] for each in self._recent)
        waits = [each[3] for each in self._recent if each[3] is not None]
        parts = [doing] if doing else []
        if finite:
            parts.append(f"loss {sum(finite) / len(finite):.3f}")
        if self._eta:
            parts.append(f"ETA {self._eta}")
        if seconds:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        parts.append(f"epoch {self._step / self._steps_per_epoch:.2f}")
        if seconds and waits:
            parts.append(f"input wait {100 * sum(waits) / (seconds + sum(waits)):.0f} %")
        head = f"{self._name} {self._step:,}/{self._steps:,}"
        line = fitted(head, parts, self._step / self._steps, self._console.columns - 1)
        self._draw(line)
