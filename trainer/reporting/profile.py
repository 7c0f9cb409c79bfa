"""Profiles some steps for TensorBoard, and prints a table of the time by part of the step."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

# Part of the step -> pattern of its operations' names (its tf.name_scope). The first match counts.
PARTS = {
    "LSTM, forward": "lstm_forward",
    "LSTM, backward": "lstm_backward",
    "collectives": "collective|Collective|Horovod",
    "optimizer": "optimizer",
    "softmax": "softmax",
    "tables, read": "read_rows",
    "input, waited for": "IteratorGetNext|input_wait",
}
_OPERATION = re.compile(r"^[^\s:]+:\w+$")


class Profiler:
    """Profiles steps `first` to `last`, both included, and prints the table.

    Args:
        first, last: Numbers of steps.
        folder: Folder for the profile, for TensorBoard.
        log: Prints a line.
    """

    def __init__(self, first: int, last: int, folder: Path, log: Callable[[str], None]):
        self._first, self._last = first, last
        self._folder = folder
        self._log = log
        self._running = False

    def before(self, step: int) -> None:
        """Starts before step `first`, or at a resumed run's first step in the range."""
        if not self._running and self._first <= step <= self._last:
            self._first = step
            self._running = True
            tf.profiler.experimental.start(str(self._folder))

    def after(self, step: int) -> None:
        """Stops after step `last`."""
        if self._running and step >= self._last:
            self.close()
            steps = step - self._first + 1
            self._log(
                f"profile of steps {self._first} to {step}, for TensorBoard: {self._folder}\n"
                f"{table(times_of(self._folder), steps)}"
            )

    def close(self) -> None:
        """Stops the profiler if it is running."""
        if self._running:
            self._running = False
            tf.profiler.experimental.stop()


def times_of(folder: Path) -> Counter[str]:
    """Returns the milliseconds of each part, from the newest profile in `folder`.

    An operation's time is that of its own thread; helper threads are not counted.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    path = max(folder.glob("**/*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    times: Counter[str] = Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                if name == "input_wait" or _OPERATION.match(name):
                    times[part_of(name)] += event.duration_ps / 1e9
    return times


def part_of(name: str) -> str:
    """Returns the part of the step that the operation belongs to."""
    for part, pattern in PARTS.items():
        if re.search(pattern, name):
            return part
    return "all else"


def table(times: Counter[str], steps: int) -> str:
    """Returns a table of the parts, the slowest first."""
    total = sum(times.values()) or 1.0
    lines = [f"{'part of a step':<20}{'ms a step':>12}{'share':>9}"]
    for part, milliseconds in times.most_common():
        share = f"{100 * milliseconds / total:.1f} %"
        lines.append(f"{part:<20}{milliseconds / steps:>12.2f}{share:>9}")
    return "\n".join(lines)
