"""Two runs never share a folder."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from tests.conftest import REPOSITORY
from trainer.distribution import run_lock

HOLD = """
import sys, time
from pathlib import Path
from trainer.distribution import run_lock
with run_lock.held(Path(sys.argv[1]), print, {"WARMSTATE_JOB": sys.argv[2]}):
    print("HELD", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process, which holds the lock of `tmp_path` as job "theirs"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), "theirs"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "HELD\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_who_holds_the_folder(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.3)
    lines: list[str] = []
    with pytest.raises(InputError) as fault, run_lock.held(tmp_path, lines.append, {}):
        pass
    for part in (f"process {holder.pid}", os.uname().nodename, "'theirs'", str(tmp_path)):
        assert part in str(fault.value)
    assert len(lines) == 1 and lines[0].startswith("waiting for process")


def test_a_killed_holder_frees_the_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run_lock.held(tmp_path, print, {}):
        written = json.loads((tmp_path / run_lock.FILE).read_text())
    assert written["pid"] == os.getpid()


def test_a_restart_of_the_same_job_waits_for_its_predecessor(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.0)
    lines: list[str] = []

    def end_it(line: str) -> None:
        lines.append(line)
        holder.kill()

    with run_lock.held(tmp_path, end_it, {"WARMSTATE_JOB": "theirs"}):
        assert lines


def test_the_lock_can_be_taken_again_and_again(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock.held(tmp_path / "new", print, {}):
            assert (tmp_path / "new" / run_lock.FILE).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 5000, '{"host": 1, "pid": null}', "\x00"])
def test_a_damaged_lock_file_does_not_matter(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.0)
    (tmp_path / run_lock.FILE).write_text(text)
    with open(tmp_path / run_lock.FILE) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is in use by"), run_lock.held(tmp_path, print, {}):
            pass
    with run_lock.held(tmp_path, print, {}):
        pass


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lines: list[str] = []
    with run_lock.held(tmp_path, lines.append, {}):
        assert "has no locks (No locks available)" in lines[0]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("of somebody else")
    (tmp_path / run_lock.FILE).symlink_to(tmp_path / "victim")
    with (
        pytest.raises(InputError, match="cannot be written: Too many levels of symbolic links"),
        run_lock.held(tmp_path, print, {}),
    ):
        pass
    assert (tmp_path / "victim").read_text() == "of somebody else"


def test_a_folder_that_cannot_be_made_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot be written"),
        run_lock.held(tmp_path / "file" / "run", print, {}),
    ):
        pass
