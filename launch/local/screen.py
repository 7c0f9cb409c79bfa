"""What is on the launcher's terminal: lines, and below them the live line of the first worker.

A worker that is told by $WARMSTATE_LIVE_COLUMNS how wide the terminal is may print a live line:
ERASE, a text, a carriage return, and ERASE again, without which nobody could know that no line feed
follows, and the text would be held back. Where the launcher's output is no terminal it tells
nobody, and there are only lines.
"""

import os
import shutil

COLUMNS_VARIABLE = "WARMSTATE_LIVE_COLUMNS"
ERASE = "\x1b[K"


def columns() -> int:
    """Returns the width of the terminal that standard output is, 0 if it is none."""
    if not os.isatty(1) or os.environ.get("TERM", "") in ("", "dumb"):
        return 0
    return shutil.get_terminal_size().columns


def live_text(line: str) -> str | None:
    """Returns what a worker wants to be shown as the live line; None if `line` is a plain one."""
    if not (line.startswith(ERASE) and line.endswith("\r")):
        return None
    return line.replace(ERASE, "").rstrip("\r")


class Screen:
    """Knows the live line that is shown, and what to write so that it stays the last one."""

    def __init__(self) -> None:
        self._shown = ""

    def line(self, text: str) -> str:
        """Returns what writes a whole line, `text`, above the live line."""
        return f"\r{ERASE}{text}{self._shown}" if self._shown else text

    def live(self, text: str) -> str:
        """Returns what shows `text` in place of the live line; "" takes it away."""
        if not text and not self._shown:
            return ""
        self._shown = text[: max(0, columns() - 1)]  # the terminal may be narrower by now
        return f"\r{ERASE}{self._shown}"
