"""status, logs and cancel of real launchers' jobs on this machine."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ended

REPOSITORY = Path(__file__).parents[3]
# Stops for TERM as the trainer does.
TRAINER = """
import signal
import sys

def save(number, frame):
    print("state saved", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
print("step 1", flush=True)
if "--forever" in sys.argv:
    while True:
        signal.pause()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a small `trainer.main` of its own."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    (tmp_path / "trainer" / "main.py").write_text(TRAINER)
    return tmp_path


def command(*words: str) -> list[str]:
    return [sys.executable, "-u", "-m", "launch.main", *words]


def options(folder: Path) -> dict[str, object]:
    return {
        "cwd": folder,
        "env": os.environ | {"PYTHONPATH": str(REPOSITORY)},
        "text": True,
    }


def launch(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(command(*words), capture_output=True, timeout=240, **options(folder))
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def running(folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Yields a launcher both of whose workers have printed their line."""
    process = subprocess.Popen(
        command("--workers=2", f"--name={name}", "--", "--forever"),
        stdout=subprocess.PIPE,
        **options(folder),
    )
    with ended(process, seconds=240):
        for _ in range(2):
            assert process.stdout.readline().endswith(" step 1\n")
        yield process


def test_a_job_that_runs_is_shown_followed_and_ended(folder: Path) -> None:
    with running(folder, "a.b") as launcher:
        code, printed, _ = launch(folder, "status", "a.b")
        assert code == 0 and printed.startswith("a.b: running for ")
        assert f"process {launcher.pid}\n  workers: 2 of " in printed
        assert sorted(launch(folder, "logs", "a.b")[1].splitlines()) == [
            "[worker 0] step 1",
            "[worker 1] step 1",
        ]
        code, _, error = launch(folder, "--name=a.b", "--", "--forever")
        assert code == 2
        assert error == (
            f"launch: --name=a.b: it runs already, as process {launcher.pid}; choose another\n"
        )
        follower = subprocess.Popen(
            command("logs", "a.b", "--follow"), stdout=subprocess.PIPE, **options(folder)
        )
        with ended(follower, seconds=240):
            assert follower.stdout.readline().endswith(" step 1\n")
            assert launch(folder, "cancel", "a.b")[0] == 0
            followed = follower.stdout.read()
            assert follower.wait() == 0
        assert launcher.wait() == 143
    assert followed.count("state saved") == 2 and "launch: stopped by SIGTERM" in followed
    assert launch(folder, "status", "a.b")[1].startswith("a.b: ended with code 143 after ")
    code, _, error = launch(folder, "cancel", "a.b")
    assert code == 1 and "ended with code 143" in error


def test_a_launcher_that_was_killed_is_gone_and_its_name_is_free(folder: Path) -> None:
    with running(folder, "a") as launcher:
        launcher.kill()
        launcher.wait()
    assert launch(folder, "status", "a")[1].startswith("a: gone: its launcher was killed\n")
    assert launch(folder, "logs", "a", "--follow")[1].count("step 1") == 2
    assert launch(folder, "--name=a")[0] == 0
    assert launch(folder, "status", "a")[1].startswith("a: ended with code 0 after ")
    assert launch(folder, "logs", "a")[1] == "step 1\n"


def test_a_process_of_the_same_number_is_not_the_job(folder: Path) -> None:
    assert launch(folder, "--name=a")[0] == 0
    file = folder / "local-jobs" / "a" / "job.json"
    job = json.loads(file.read_text()) | {"exit_code": None, "pid": os.getpid()}
    file.write_text(json.dumps(job))
    assert launch(folder, "cancel", "a")[0] == 1  # and this test goes on
    file.write_text(json.dumps(job | {"host": "another"}))
    assert "started on another; ask there" in launch(folder, "status", "a")[1]
    assert "it was started on another" in launch(folder, "--name=a")[2]


def test_a_log_that_cannot_be_written_does_not_end_the_job(folder: Path) -> None:
    (folder / "local-jobs" / "a").mkdir(parents=True)
    (folder / "local-jobs" / "a" / "log").symlink_to("/dev/full")
    code, printed, error = launch(folder, "--name=a")
    assert (code, printed) == (0, "step 1\n")
    assert error == f"launch: {folder}/local-jobs/a/log: No space left on device\n"
    assert launch(folder, "status", "a")[1].startswith("a: ended with code 0 after ")


@pytest.mark.parametrize("content", ["{", "[]", '{"workers": 1}'])
def test_a_damaged_record_is_said(folder: Path, content: str) -> None:
    file = folder / "local-jobs" / "a" / "job.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    code, printed, error = launch(folder, "status", "a")
    assert (code, printed) == (1, "")
    assert error.startswith(f"launch: {file} is damaged, or of another version: ")


def test_jobs_without_a_name_leave_nothing(folder: Path) -> None:
    assert launch(folder)[0] == 0
    assert launch(folder, "--name=a", "--dry_run")[0] == 0
    assert {path.name for path in folder.iterdir()} == {"trainer"}


@pytest.mark.parametrize("action", ["status", "logs", "cancel"])
def test_a_job_that_is_not_known(folder: Path, action: str) -> None:
    code, printed, error = launch(folder, action, "nobody")
    assert (code, printed) == (1, "")
    assert error == f"launch: no job nobody in {folder}/local-jobs\n"
