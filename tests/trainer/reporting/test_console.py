import io

import pytest

from launch.local import screen
from tests.terminal import Screen
from trainer.reporting import console
from trainer.reporting.console import Console


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_launcher_and_the_trainer_mean_the_same() -> None:
    assert console.COLUMNS_VARIABLE == screen.COLUMNS_VARIABLE


def test_on_a_terminal_the_live_line_stays_below_the_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream, shown = Terminal(), Screen(20)
    with Console(stream, {"TERM": "xterm"}) as out:
        out("first")
        out.live("step 10")
        out.live("step 2 and what does not fit")
        out("second")
        shown.feed(stream.getvalue())
        assert shown.lines == ["first", "second", "step 2 and what doe"]
    after = Screen(20)
    after.feed(stream.getvalue())
    assert after.lines == ["first", "second", ""]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {}])
def test_a_simple_terminal_has_no_live_line(environment: dict[str, str]) -> None:
    assert Console(Terminal(), environment).live is None


def test_in_a_pipe_there_are_only_lines() -> None:
    stream = io.StringIO()
    with Console(stream, {"TERM": "xterm"}) as out:
        assert out.live is None
        out("a line")
    assert stream.getvalue() == "a line\n"


def test_the_launcher_reads_what_the_console_writes() -> None:
    stream = io.StringIO(newline="")
    with Console(stream, {console.COLUMNS_VARIABLE: "12"}) as out:
        out("first")
        out.live("step 1 of many")
        out("second")
    stream.seek(0)
    lines = stream.readlines()  # cut at carriage returns too, as the launcher cuts
    assert [screen.live_text(line) for line in lines] == [None, "step 1 of m", None, "", None]
    assert [line.replace(screen.ERASE, "") for line in lines if line.endswith("\n")] == [
        "first\n",
        "second\n",
    ]


def test_who_is_not_the_chief_says_nothing() -> None:
    stream = Terminal()
    with Console(stream, {"TERM": "xterm", console.COLUMNS_VARIABLE: "80"}, is_silent=True) as out:
        out("a line")
        assert out.live is None
    assert stream.getvalue() == ""


def test_escape_sequences_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Console(stream, {"TERM": "xterm"}) as out:
        out("labels \x1b[31mpos=0\x1b]0;title\x07")
        out.live("\x1b[2J one\rtwo")
    written = stream.getvalue()
    assert r"labels \x1b[31mpos=0\x1b]0;title\x07" in written
    assert r"\x1b[2J one\rtwo" in written
    assert "\x1b[31m" not in written and "\x1b[2J" not in written and "\x07" not in written
