"""Writes metrics.jsonl, and formats figures for status lines."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.reporting.trackers import Tracker, tell
from trainer.safe_files import replace_text


def format_seconds(seconds: float) -> str:
    """Returns "47s", "3m05s" or "2h07m"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Metrics:
    """Appends to a metrics.jsonl: each line a JSON object with a stage, a step and a time."""

    def __init__(self, path: Path, stage: str, trackers: Sequence[Tracker] = ()):
        self._path = path
        self._stage = stage
        self._trackers = trackers

    def forget_after(self, step: int, evaluated: bool = True) -> None:
        """Drops the lines that a run resumed at `step` will write again.

        Args:
            evaluated: Whether the state after `step` was evaluated; if not, lines of an evaluation
                at `step` are dropped too.
        """

        def stays(line: str) -> bool:
            at = _step_of(line) if line.endswith("\n") else math.inf
            return at < step or (at == step and (evaluated or _is_of_training(line)))

        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            replace_text(self._path, "".join(filter(stays, lines)))

    def write(self, step: int, **values: Any) -> None:
        """Appends one line."""
        line = {"stage": self._stage, "step": step, "unix_time": round(time.time(), 3), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        tell(self._trackers, self._path.parent, self._stage, line)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # truncated by a full disk or a kill
        return math.inf


def _is_of_training(line: str) -> bool:
    return not json.loads(line).keys().isdisjoint(("tokens_per_second", "skipped_steps"))


def describe(values: Mapping[str, float]) -> str:
    """Returns "name value · name value" for a status line."""
    return " · ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
