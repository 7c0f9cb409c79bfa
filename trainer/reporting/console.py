"""What a run prints: lines, and on a terminal one line below them that is always up to date.

Three ways, found out once:

  terminal  standard output is one: the live line is redrawn in place
  launcher  the launcher says in $WARMSTATE_LIVE_COLUMNS that its own output is a terminal so wide:
            a live line is then written as launch/local/screen.py reads it, which redraws it
  plain     a pipe, a pod: there is no live line, and status lines come at intervals
"""

import shutil
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self, TextIO

COLUMNS_VARIABLE = "WARMSTATE_LIVE_COLUMNS"
_ERASE = "\x1b[K"


class Console:
    """The one voice of a run. Call it with a line to print it.

    Args:
      stream: where to print.
      environment: of the process.
      is_silent: prints nothing: for workers that are not the chief.

    Attributes:
      live: shows a text as the live line, cut to the terminal's width; None where there is none.
      columns: of the terminal, 0 where there is none.
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
        if self._redraws and self._shown:
            self._print(f"\r{_ERASE}{line}\n{self._shown}")
        else:
            self._print(f"{line}\n")

    @property
    def columns(self) -> int:
        """The width of the live line."""
        if self._redraws:
            return shutil.get_terminal_size().columns
        return self._told_columns

    def _live(self, text: str) -> None:
        text = text[: max(0, self.columns - 1)]  # a full line would wrap
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Erases the live line, so that whatever comes next has a line of its own."""
        if self._redraws and self._shown:
            self._shown = ""
            self._print(f"\r{_ERASE}")
        elif self.live is not None:
            self._live("")
