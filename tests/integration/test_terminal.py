"""What a person sees who starts a run on a terminal, through the launcher."""

import re
import sys
from pathlib import Path

from tests.integration.programs import REPOSITORY, command
from tests.terminal import Screen, run_on_terminal

PROGRAM = """
import os, sys, time
columns = os.environ.get("WARMSTATE_LIVE_COLUMNS")
chief = columns is not None
sys.stdout.write("starts, chief\\n" if chief else "starts\\n")
if chief:
    for step in range(1, 4):
        sys.stdout.write(f"\\x1b[Kstep {step} of 3\\r\\x1b[K")
        sys.stdout.flush()
        time.sleep(0.2)
    sys.stdout.write("wrote it\\n")
    sys.stdout.write("\\x1b[K\\r\\x1b[K")
"""


def test_the_launcher_shows_the_live_line_of_its_first_worker(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    script = (
        "import sys; from launch.local.workers import run_local; "
        f"sys.exit(run_local([sys.executable, '-u', {str(program)!r}], 2))"
    )
    states: list[list[str]] = []

    code, raw = run_on_terminal([sys.executable, "-c", script], 60, cwd=REPOSITORY)
    assert code == 0
    raw = raw.replace("\r\n", "\n")
    for end in (*(found.start() for found in re.finditer("\r", raw)), len(raw)):
        screen = Screen(60)
        screen.feed(raw[:end])
        states.append(screen.lines)
    for step in (1, 2, 3):  # each at its time, on the last line
        assert any(lines[-1] == f"step {step} of 3" for lines in states)
    end = states[-1]
    assert sorted(end[:2]) == ["[worker 0] starts, chief", "[worker 1] starts"]
    assert end[2:] == ["[worker 0] wrote it", ""]


def test_a_run_has_one_live_line_and_leaves_only_lines(small_store: Path, tmp_path: Path) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", f"--run_dir={tmp_path}/run")
    states: list[str] = []

    def look(raw: str) -> None:
        screen = Screen(100)
        screen.feed(raw.replace("\r\n", "\n"))
        states.append(screen.lines[-1])

    code, raw = run_on_terminal(
        [*command(1, *flags), "--pretrain_steps=30"], 100, cwd=REPOSITORY, each=look
    )
    assert code == 0, raw
    live = [line for line in states if line.startswith("pretrain ") and "━" in line]
    assert live and all(len(line) < 100 for line in live)
    assert "loss" in live[-1] and "tokens/s" in live[-1] and "ETA" in live[-1]
    screen = Screen(100)
    screen.feed(raw.replace("\r\n", "\n"))
    lines = [line for line in screen.lines if line]
    starts = ("data: ", "lstm: ", "pretrain", "{", " ", "}", "report")
    assert all(line.startswith(starts) and "━" not in line for line in lines), lines
    assert not any("pretrain step 1/" in line for line in lines)  # they are for pipes
    assert any("pretrain step 30 · validation" in line for line in lines)
