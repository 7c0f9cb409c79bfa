"""Prints the lines of a run and, on a terminal, a live line below them.

Where standard output goes decides how:

  terminal  the live line is redrawn in place
  launcher  the launcher's output is a terminal, its width in $WARMSTATE_LIVE_COLUMNS: the live
            line is written for launch/local/screen.py, which redraws it
  plain     a pipe or a pod: no live line; status lines are printed at intervals instead
"""

import shutil
from collections.abc import Callable, Mapping
from typing import Self, TextIO

from data_pipelines.printable import printable

COLUMNS_VARIABLE = "WARMSTATE_LIVE_COLUMNS"
_ERASE = "\x1b[K"


class Console:
    """Prints the output of a run: call it with a line.

    Args:
        stream: Where to print.
        environment: The process's environment variables.
        is_silent: Prints nothing; for workers other than the chief.

    Attributes:
        live: Shows a text as the live line, cut to the terminal's width; None without a terminal.
    """

    def __init__(self, stream: TextIO, environment: Mapping[str, str], is_silent: bool = False):
        self._stream = stream
        self._is_silent = is_silent
        self._shown = ""
        self._redraws = stream.isatty() and environment.get("TERM", "") not in ("", "dumb")
        columns = environment.get(COLUMNS_VARIABLE, "")
        self._told_columns = int(columns) if columns.isdecimal() else 0
        is_live = not is_silent and (self._redraws or self._told_columns > 0)
        self.live: Callable[[str], None] | None = self._live if is_live else None

    def __call__(self, line: str) -> None:
        if self._is_silent:
            return
        line = printable(line)
        if self._redraws and self._shown:
            self._print(f"\r{_ERASE}{line}\n{self._shown}")
        else:
            self._print(f"{line}\n")

    @property
    def columns(self) -> int:
        """The width of the live line; 0 without a terminal."""
        if self._redraws:
            return shutil.get_terminal_size().columns
        return self._told_columns

    def _live(self, text: str) -> None:
        text = printable(text)[: max(0, self.columns - 1)]  # a full line would wrap
        if self._redraws:
            self._shown = text
            self._print(f"\r{_ERASE}{text}")
        else:
            self._print(f"{_ERASE}{text}\r{_ERASE}")

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Erases the live line, so that later output starts on an empty line."""
        if self._redraws and self._shown:
            self._shown = ""
            self._print(f"\r{_ERASE}")
        elif self.live is not None:
            self._live("")
