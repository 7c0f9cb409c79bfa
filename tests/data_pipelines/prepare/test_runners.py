import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.prepare.runners import (
    Count,
    Processes,
    Progress,
    WorkerDiedError,
    run_here,
    runner_for,
)


def quiet() -> Progress:
    return Progress(1, lambda line: None)


def note(folder: Path, task: int, count: Count) -> None:
    (folder / str(task)).write_text(str(os.getpid()))
    count(1)


def refuse(task: int, count: Count) -> None:
    raise InputError(f"task {task} is wrong")


def die(task: int, count: Count) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("runner", [run_here, Processes(3)])
def test_every_task_is_done_once(tmp_path: Path, runner) -> None:
    runner(partial(note, tmp_path), range(7), quiet())
    processes = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(processes) == [str(task) for task in range(7)]
    assert (set(processes.values()) == {str(os.getpid())}) == (runner is run_here)
    runner(partial(note, tmp_path), [], quiet())


@pytest.mark.parametrize("runner", [run_here, Processes(2)])
def test_a_tasks_error_is_raised(runner) -> None:
    with pytest.raises(InputError, match="^task 5 is wrong$"):
        runner(refuse, [5], quiet())


def test_a_killed_worker_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(WorkerDiedError, match="--processes"):
        Processes(2)(die, [1, 2], quiet())


def test_workers_do_not_mind_what_this_process_did_with_tensorflow(tmp_path: Path) -> None:
    import tensorflow as tf

    tf.constant([1]) + 1  # starts its threads, with which a fork of this process could hang
    Processes(2)(partial(note, tmp_path), range(2), quiet())
    assert len(list(tmp_path.iterdir())) == 2


def test_no_more_processes_than_tasks() -> None:
    assert runner_for(8, 1) is run_here and runner_for(1, 8) is run_here
    assert runner_for(0, 0) is run_here
    assert isinstance(runner_for(2, 2), Processes)


def test_progress_tells_documents_parts_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("data_pipelines.prepare.runners.time.monotonic", lambda: now[0])
    lines: list[str] = []
    progress = Progress(10, lines.append)
    progress.show(1)
    now[0] = 2.0
    progress.show(1000)
    now[0] = 4.0
    progress.finished(4)
    progress.show(4000)
    progress.show(4001)
    assert lines == [
        "prepare: 1,000 documents, 0 of 10 parts, 500 documents/s",
        "prepare: 4,000 documents, 4 of 10 parts, 1,000 documents/s, about 6 s left",
    ]


def test_the_driver_needs_no_tensorflow(tmp_path: Path) -> None:
    program = (
        "import sys; from data_pipelines.prepare import PrepareConfig, ensure_store\n"
        "if __name__ == '__main__':\n"
        f"    config = PrepareConfig('textfiles:{tmp_path}/*.txt', vocab_size=5, processes=2)\n"
        f"    ensure_store(config, '{tmp_path}/store')\n"
        "    sys.exit('tensorflow' in sys.modules)"
    )
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("spam eggs " * 9)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
