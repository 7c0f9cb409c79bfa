"""The launcher's terminal: printed lines, and below them the live line of the first worker.

$WARMSTATE_LIVE_COLUMNS tells a worker the width of the terminal. The worker may then print a live
line: ERASE, a text, a carriage return, and ERASE again. The second ERASE shows that no line feed
follows; otherwise the launcher would hold the text back. If the launcher's output is not a
terminal, the variable is not set and there is no live line.
"""

import os
import shutil

COLUMNS_VARIABLE = "WARMSTATE_LIVE_COLUMNS"
ERASE = "\x1b[K"


def columns() -> int:
    """Returns the width of the terminal, 0 if standard output is not a terminal."""
    if not os.isatty(1) or os.environ.get("TERM", "") in ("", "dumb"):
        return 0
    return shutil.get_terminal_size().columns


def live_text(line: str) -> str | None:
    """Returns the text of a worker's live line; None if `line` is an ordinary line."""
    if not (line.startswith(ERASE) and line.endswith("\r")):
        return None
    return line.replace(ERASE, "").rstrip("\r")


class Screen:
    """Remembers the live line, and returns what to write so that it stays the last line."""

    def __init__(self) -> None:
        self._shown = ""

    def line(self, text: str) -> str:
        """Returns the characters that print the line `text` above the live line."""
        return f"\r{ERASE}{text}{self._shown}" if self._shown else text

    def live(self, text: str) -> str:
        """Returns the characters that replace the live line by `text`; "" removes it."""
        if not text and not self._shown:
            return ""
        self._shown = text[: max(0, columns() - 1)]  # the terminal may be narrower by now
        return f"\r{ERASE}{self._shown}"
