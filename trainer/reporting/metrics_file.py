"""Writes metrics.jsonl, and formats figures for status lines."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.reporting.trackers import Tracker, tell
from trainer.safe_files import replace_text, without_links


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

    def forget_after(self, step: int, evaluated: bool = True) -> int:
        """Drops the lines that a run resumed at `step` will write again, and damaged lines.

        Args:
            evaluated: Whether the state after `step` was evaluated; if not, lines of an evaluation
                at `step` are dropped too.

        Returns:
            The number of damaged lines, without a last one that was being written.
        """
        if not self._path.exists():
            return 0
        kept, damaged = [], 0
        with open(self._path, "rb", opener=without_links) as file:
            lines = file.readlines()
        for number, line in enumerate(lines, start=1):
            values = _values_of(line)
            if values is None:
                damaged += number < len(lines)
            elif values["step"] < step or (
                values["step"] == step and (evaluated or _is_of_training(values))
            ):
                kept.append(line.decode())
        replace_text(self._path, "".join(kept))
        return damaged

    def write(self, step: int, **values: Any) -> None:
        """Appends one line, or none of it: the next one must not continue half a line."""
        line = {"stage": self._stage, "step": step, "unix_time": round(time.time(), 3), **values}
        data = (json.dumps(line) + "\n").encode()
        with open(self._path, "ab", buffering=0, opener=without_links) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
        tell(self._trackers, self._path.parent, self._stage, line)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without damaged ones."""
    with open(path, "rb", opener=without_links) as file:
        return [values for line in file if (values := _values_of(line)) is not None]


def _values_of(line: bytes) -> dict[str, Any] | None:
    """Returns the values of a line; None if a full disk, a kill or a flipped bit damaged it."""
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_whole = line.endswith(b"\n") and isinstance(values, dict)
    return values if is_whole and type(values.get("step")) is int else None


def _is_of_training(values: Mapping[str, Any]) -> bool:
    return not values.keys().isdisjoint(("tokens_per_second", "skipped_steps"))


def describe(values: Mapping[str, float]) -> str:
    """Returns "name value · name value" for a status line."""
    return " · ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
