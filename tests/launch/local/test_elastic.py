"""How an elastic job's size follows losses and its file: real launchers, small workers."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.local.elastic import AvailableWorkers
from tests.processes import ended

REPOSITORY = Path(__file__).parents[3]
TRAINER = """
import json, os, signal, sys, time
alone = '{"task": {"index": 0}, "cluster": {"worker": ["me"]}}'
config = json.loads(os.environ.get("TF_CONFIG", alone))
index, size = config["task"]["index"], len(config["cluster"]["worker"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
exec(sys.argv[1])
print("ready", size, index, os.getpid(), flush=True)
signal.pause()
"""


class Job:
    """An elastic job's launcher; `lines` are its own ones, without "launch: "."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.lines: list[str] = []

    def ready(self, size: int) -> list[int]:
        """Returns the process ids, by worker, when a gang of `size` is ready."""
        pids: dict[int, int] = {}
        while len(pids) < size:
            line = self._next_line()
            assert line, self.lines
            if " ready " in line:
                found, index, pid = map(int, line.split()[-3:])
                assert found == size, line
                pids[index] = pid
        return [pids[index] for index in range(size)]

    def said(self) -> str:
        """Returns the launcher's next line."""
        count = len(self.lines)
        while len(self.lines) == count:
            assert self._next_line()
        return self.lines[-1]

    def finish(self) -> int:
        """Returns the exit code, when all is over."""
        while self._next_line():
            pass
        return self.process.wait()

    def _next_line(self) -> str:
        line = self.process.stdout.readline()
        if line.startswith("launch: "):
            self.lines.append(line.removeprefix("launch: ").rstrip("\n"))
        return line.replace("ready", " ready", 1) if line.startswith("ready") else line


@contextlib.contextmanager
def elastic(folder: Path, *flags: str, code: str = "") -> Iterator[Job]:
    """Starts an elastic job of workers that run `code`; ends it, at the latest after 2 minutes."""
    (folder / "trainer").mkdir()
    (folder / "trainer" / "__init__.py").touch()
    (folder / "trainer" / "main.py").write_text(TRAINER)
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.main", "--elastic", *flags, "--", code],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with ended(process, seconds=120):
        yield Job(process)


FROM_1_TO_3 = ("--min_workers=1", "--max_workers=3")
FROM_2_TO_3 = ("--min_workers=2", "--max_workers=3")


def test_each_loss_takes_one_worker_until_there_are_too_few(tmp_path):
    with elastic(tmp_path, *FROM_1_TO_3) as job:
        os.kill(job.ready(3)[2], signal.SIGKILL)
        os.kill(job.ready(2)[0], signal.SIGKILL)
        os.kill(job.ready(1)[0], signal.SIGKILL)
        assert job.finish() == 137
    assert job.lines == [
        "worker 2 was killed by signal 9 (SIGKILL)",
        "2 of 3 workers left: resuming from the last checkpoint",
        "worker 0 was killed by signal 9 (SIGKILL)",
        "1 of 2 workers left: resuming from the last checkpoint",
        "worker 0 was killed by signal 9 (SIGKILL)",
        "0 of 1 workers left, fewer than --min_workers=1: the job ends",
    ]


def test_who_hangs_while_the_others_lose_a_peer_is_a_loss(tmp_path):
    hang = "if size == 3: index == 1 and signal.pause(); sys.exit(75)"
    with elastic(tmp_path, *FROM_2_TO_3, code=hang) as job:
        job.ready(2)
        assert "worker 1 hung" in job.lines[0]
        assert job.lines[1] == "2 of 3 workers left: resuming from the last checkpoint"


def test_the_file_is_followed_up_and_down(tmp_path):
    file = tmp_path / "available"
    flags = (*FROM_1_TO_3, f"--available_workers={file}")
    with elastic(tmp_path, *flags, "--workers=2") as job:
        job.ready(2)  # and there is no file
        file.write_text("5\n")
        job.ready(3)
        file.write_text(" 1 ")
        job.ready(1)
        file.unlink()
        job.ready(3)
        file.write_text("0")
        assert job.finish() == 143
    rest = "workers: resuming from the last checkpoint"
    assert job.lines == [
        f"{file} allows 3 instead of 2 {rest}",
        f"{file} allows 1 instead of 3 {rest}",
        f"{file} allows 3 instead of 1 {rest}",
        f"{file} allows 0 instead of 3 workers, fewer than --min_workers=1: the job ends",
    ]


def test_a_lost_place_is_gone_until_the_file_is_written_again(tmp_path):
    file = tmp_path / "available"
    file.write_text("3")
    with elastic(tmp_path, *FROM_2_TO_3, f"--available_workers={file}") as job:
        os.kill(job.ready(3)[1], signal.SIGKILL)
        job.ready(2)
        file.write_text("3")  # the same number
        job.ready(3)


def test_a_file_without_a_number_changes_nothing(tmp_path):
    file = tmp_path / "available"
    file.write_text("two")
    with elastic(tmp_path, *FROM_1_TO_3, f"--available_workers={file}") as job:
        job.ready(3)
        file.write_text("-1")
        job.said()
        file.write_text("1")
        job.ready(1)
    rest = "which is not a whole number; the job keeps 3 workers"
    assert job.lines == [
        f"--available_workers: {file} holds 'two', {rest}",
        f"--available_workers: {file} holds '-1', {rest}",
        f"{file} allows 1 instead of 3 workers: resuming from the last checkpoint",
    ]


def test_too_few_workers_to_begin_with(tmp_path):
    file = tmp_path / "available"
    file.write_text("1")
    with elastic(tmp_path, *FROM_2_TO_3, f"--available_workers={file}") as job:
        assert job.finish() == 2
    assert job.lines == [f"{file} allows 1 workers, fewer than --min_workers=2: the job ends"]


def test_the_file_bounds_the_start(tmp_path):
    (tmp_path / "available").write_text("2")
    flags = (*FROM_1_TO_3, f"--available_workers={tmp_path}/available", "--workers=3")
    with elastic(tmp_path, *flags) as job:
        job.ready(2)


def test_max_restarts_bounds_the_losses(tmp_path):
    with elastic(tmp_path, *FROM_1_TO_3, "--max_restarts=1") as job:
        os.kill(job.ready(3)[0], signal.SIGKILL)
        os.kill(job.ready(2)[0], signal.SIGKILL)
        assert job.finish() == 137
    assert job.lines[-1] == "1 of 2 workers left; gave up after loss 2, --max_restarts=1"


@pytest.mark.parametrize("code", ["sys.exit(2)", "signal.signal(15, lambda *_: sys.exit(2))"])
def test_an_error_of_configuration_ends_the_job(tmp_path, code):
    file = tmp_path / "available"
    with elastic(tmp_path, *FROM_2_TO_3, f"--available_workers={file}", code=code) as job:
        if code != "sys.exit(2)":
            job.ready(3)
            file.write_text("2")
        assert job.finish() == 2
    (line,) = job.lines
    assert line.endswith("exited with code 2")


def test_workers_that_are_done_when_they_are_to_stop_are_done(tmp_path):
    file = tmp_path / "available"
    done = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))"
    with elastic(tmp_path, *FROM_2_TO_3, f"--available_workers={file}", code=done) as job:
        job.ready(3)
        file.write_text("2")
        assert job.finish() == 0
    assert job.lines == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_the_job(tmp_path, number):
    with elastic(tmp_path, *FROM_2_TO_3) as job:
        pids = job.ready(3)
        job.process.send_signal(number)
        assert job.finish() == 128 + number
    assert job.lines == [f"stopped by {number.name}"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_signal_to_the_launcher_during_a_change_ends_the_job(tmp_path):
    file = tmp_path / "available"
    wait = (
        "signal.signal(15, lambda *_: (print('saving', flush=True), time.sleep(1), sys.exit(143)))"
    )
    with elastic(tmp_path, *FROM_2_TO_3, f"--available_workers={file}", code=wait) as job:
        job.ready(3)
        file.write_text("2")
        while "saving" not in job._next_line():
            pass
        job.process.send_signal(signal.SIGINT)
        assert job.finish() == 130
    assert job.lines == ["stopped by SIGINT"]


def test_who_does_not_stop_for_a_change_is_killed(tmp_path):
    file = tmp_path / "available"
    refuse = "index == 0 and signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    flags = (*FROM_2_TO_3, f"--available_workers={file}", "--grace_seconds=0.2")
    with elastic(tmp_path, *flags, code=refuse) as job:
        job.ready(3)
        file.write_text("2")
        job.ready(2)
    assert job.lines[0] == "worker 0 did not stop on TERM and was killed"


def test_a_worker_that_saves_after_a_term_of_its_own_is_left_in_peace(tmp_path):
    """As the trainer's chief: TERM to one stops all, the others end first, a second TERM kills."""
    save = """
def note(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(int(open("other").read()), signal.SIGUSR1)
    time.sleep(1)
    open("saved", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))
"""
    with elastic(tmp_path, "--min_workers=1", "--max_workers=2", code=save) as job:
        pids = job.ready(2)
        (tmp_path / "other").write_text(str(pids[1]))
        os.kill(pids[0], signal.SIGTERM)
        job.ready(1)
    assert (tmp_path / "saved").exists()
    assert job.lines[0] == "worker 1 exited with code 143"


def faults(*flags: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-m", "launch.main", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (result.returncode, result.stdout) == (2, "")
    return [line.removeprefix("launch: ") for line in result.stderr.splitlines()]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--elastic"], ["--elastic: needs --min_workers", "--elastic: needs --max_workers"]),
        (
            ["--min_workers=1", "--max_workers=2", "--available_workers=x"],
            [
                "--min_workers=1: needs --elastic",
                "--max_workers=2: needs --elastic",
                "--available_workers=x: needs --elastic",
            ],
        ),
        (
            ["--elastic", "--min_workers=3", "--max_workers=2"],
            ["--min_workers=3 and --max_workers=2: the first must not be above the second"],
        ),
        (
            ["--elastic", "--min_workers=2", "--max_workers=3", "--workers=4"],
            ["--workers=4: must be between --min_workers=2 and --max_workers=3"],
        ),
        (
            ["--elastic", "--min_workers=0", "--max_workers=x", "--workers=0", "--max_restarts=-1"],
            [
                "--workers=0 must be at least 1",
                "--max_restarts=-1 must be at least 0",
                "--min_workers=0 must be at least 1",
                "--max_workers=x is not an integer",
            ],
        ),
        (
            ["--elastic", "--min_workers=2", "--available_workers=/nowhere/file"],
            [
                "--elastic: needs --max_workers",
                "--available_workers=/nowhere/file: must be a file in a folder that exists",
            ],
        ),
    ],
)
def test_faults_are_told_all_at_once(flags, expected):
    assert faults(*flags) == expected


@pytest.mark.parametrize(("start", "count"), [([], 3), (["--workers=2"], 2)])
def test_dry_run_prints_the_first_workers(start, count):
    result = subprocess.run(
        [sys.executable, "-m", "launch.main", "--elastic", *FROM_2_TO_3, *start, "--dry_run"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 0
    assert result.stdout.count("# worker ") == count


def test_a_file_is_news_when_it_stays_the_same_for_two_looks(tmp_path):
    file = tmp_path / "available"
    available = AvailableWorkers(file, without_file=7)
    assert available.read() == 7
    assert not available.is_rewritten()
    file.write_text("")  # somebody begins to write
    assert not available.is_rewritten()
    file.write_text("12\n")
    assert not available.is_rewritten()
    assert available.is_rewritten()
    assert available.read() == 12
    assert not available.is_rewritten()


@pytest.mark.parametrize("content", [b"", b"1.5", b"-1", b"1 2", b"\xff", "²".encode()])
def test_what_is_no_number_is_said(tmp_path, content):
    file = tmp_path / "available"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="which is not a whole number"):
        AvailableWorkers(file, 1).read()


def test_a_pipe_and_a_missing_permission_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a file"):
        AvailableWorkers(tmp_path / "pipe", 1).read()
    with pytest.raises(ValueError, match="cannot be read"):
        (tmp_path / "file").write_text("1")
        AvailableWorkers(tmp_path / "file" / "below", 1).read()
