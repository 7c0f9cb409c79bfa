"""A real pseudo-terminal, and what a person would see on it."""

import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import forked

_TOKEN = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")


class Screen:
    """The lines of a terminal that only writes, moves to a line's start and erases lines."""

    def __init__(self, columns: int):
        self.columns = columns
        self.lines = [""]
        self._at = 0

    def feed(self, text: str) -> None:
        """Takes in what was written."""
        for token in _TOKEN.findall(text):
            if token == "\r":
                self._at = 0
            elif token == "\n":
                self.lines.append("")
                self._at = 0
            elif token == "\x1b[K":
                self.lines[-1] = self.lines[-1][: self._at]
            elif not token.startswith("\x1b"):
                line = self.lines[-1]
                self.lines[-1] = line[: self._at] + token + line[self._at + len(token) :]
                self._at += len(token)
                assert len(self.lines[-1]) < self.columns or self.lines[-1] == token


def run_on_terminal(
    command: Sequence[str],
    columns: int = 100,
    rows: int = 30,
    cwd: Path | None = None,
    each: Callable[[str], None] = lambda raw: None,
    **environment: str,
) -> tuple[int, str]:
    """Runs a command on a terminal of that size; returns its exit code and all that it wrote.

    Args:
      each: is called with all that was written so far, whenever there is more.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("TF_CONFIG", "COLUMNS", "LINES")}
    process = forked.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, start_new_session=True,
        env=inherited | {"TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(theirs)
    raw = b""
    try:
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # the last one that had it open has ended
                break
            if not more:
                break
            raw += more
            each(raw.decode(errors="replace"))
        return process.wait(timeout=60), raw.decode(errors="replace")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)
