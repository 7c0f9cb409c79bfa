"""A real job loses a worker and finds one, and computes what an undisturbed one does."""

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.batches.batch_plan import BatchPlan
from data_pipelines.store.token_store import TokenStore
from tests.integration.jobs import HURT, Job, job, wait_until_gone
from tests.integration.programs import train

pytestmark = pytest.mark.slow(
    "minutes of jobs that shrink and grow; quick: tests/launch/local/test_elastic.py"
)
BATCH, MAX_TOKENS, CHECKPOINT_EVERY = 12, 24, 10  # as in programs.SMALL
STEPS = 600
# Dropout is drawn by slice, and slices depend on the number of workers.
TRAINING = ("--stage=pretrain", "--pretrain_dropout=0", f"--pretrain_steps={STEPS}")


def wait_for_step(running: Job, least: int = 1) -> int:
    """Returns the step that a line says is done, `least` or a later one."""
    while True:
        line = running.wait_for("pretrain step ")
        if (done := re.search(r"pretrain step (\d+)/", line)) and int(done[1]) >= least:
            return int(done[1])


def seconds_to_the_next_step(running: Job, began: float, what: str) -> int:
    """Prints how long the job stood still; returns the first step that it did again."""
    step = wait_for_step(running)
    print(f"{what}: {time.monotonic() - began:.1f} s to step {step}")
    return step


def lose(running: Job, rank: int, how: str, after_step: int) -> int:
    """Hurts a worker; returns the first step that the others do again."""
    at = wait_for_step(running, after_step)
    pids = running.worker_pids()
    began = time.monotonic()
    os.kill(pids[rank], HURT[how])
    running.wait_for("workers left: resuming from the last checkpoint")
    first = seconds_to_the_next_step(running, began, f"{how} after step {at}")
    wait_until_gone(pids.values())
    assert len(running.worker_pids()) == len(pids) - 1
    return first


def allow(running: Job, file: Path, workers: int) -> int:
    """Rewrites the file of --available_workers; returns the first step of the new gang."""
    began = time.monotonic()
    file.write_text(f"{workers}\n")
    last = running.wait_for("stopped by TERM after step")
    running.wait_for(f"allows {workers} instead of ")
    first = seconds_to_the_next_step(running, began, f"{workers} workers allowed")
    assert f"stopped by TERM after step {first - 1};" in last, (
        "no step is done twice, none left out"
    )
    assert len(running.worker_pids()) == workers
    return first


def step_lines(folder: Path) -> list[tuple[int, float]]:
    """Returns (step, loss) of every line of metrics.jsonl that is of a step, as they stand."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_epochs_are_whole(store: Path, steps: Sequence[int]) -> None:
    """Asserts that these steps read each example of every epoch exactly once."""
    view = TokenStore(store).split("train").pieces(MAX_TOKENS)
    plan = BatchPlan(view, max_tokens=MAX_TOKENS, global_batch=BATCH, seed=0)
    epochs = len(steps) // plan.steps_per_epoch
    assert epochs >= 2
    for epoch in range(epochs):
        of_epoch = [step for step in steps if plan.epoch_of(step - 1) == epoch]
        read = np.concatenate([plan.indices(step - 1) for step in of_epoch])
        np.testing.assert_array_equal(np.sort(read), np.arange(len(view)))


@pytest.mark.parametrize(
    "distributor", ["multi_worker", pytest.param("horovod", marks=pytest.mark.horovod)]
)
def test_a_job_that_shrinks_and_grows_reads_each_example_once(
    small_store: Path, tmp_path: Path, distributor: str
) -> None:
    flags = (*TRAINING, f"--store={small_store}")
    train(1, *flags, f"--run_dir={tmp_path}/whole")
    file = tmp_path / "available"
    file.write_text("3")
    launcher = ("--elastic", "--min_workers=2", "--max_workers=3", "--workers=3")
    launcher += (f"--available_workers={file}", "--grace_seconds=30")
    folder = f"--run_dir={tmp_path}/elastic"
    with job(distributor, tmp_path / "job", *flags, folder, launcher_flags=launcher) as running:
        again = lose(running, 1, "kill", after_step=15)
        assert again % CHECKPOINT_EVERY == 1
        grown = allow(running, file, 3)
        again = lose(running, 0, "raise", after_step=grown + 15)  # the chief
        assert again % CHECKPOINT_EVERY == 1 or again == grown
        allow(running, file, 3)
        allow(running, file, 2)
        code = running.finish()
    printed = "\n".join(running.lines)
    assert code == 0, printed
    disturbed, whole = step_lines(tmp_path / "elastic"), step_lines(tmp_path / "whole")
    steps = [step for step, _ in disturbed]
    assert steps == list(range(1, STEPS + 1))
    assert_epochs_are_whole(small_store, steps)
    losses = [loss for _, loss in disturbed], [loss for _, loss in whole]
    print("largest relative difference:", np.max(np.abs(losses[0] / np.array(losses[1]) - 1)))
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    "distributor", ["multi_worker", pytest.param("horovod", marks=pytest.mark.horovod)]
)
def test_workers_are_told_to_stop_and_hang_until_the_last_one_goes_on_alone(
    small_store: Path, tmp_path: Path, distributor: str
) -> None:
    launcher = ("--elastic", "--min_workers=1", "--max_workers=3", "--workers=3")
    launcher += ("--grace_seconds=30",)
    flags = (*TRAINING, f"--store={small_store}", f"--run_dir={tmp_path}/run")
    flags += ("--collective_timeout_seconds=8", "--pretrain_steps=120")
    with job(distributor, tmp_path, *flags, launcher_flags=launcher) as running:
        wait_for_step(running, 5)
        began = time.monotonic()
        os.kill(running.worker_pids()[0], signal.SIGTERM)
        last = running.wait_for("stopped by TERM after step")
        running.wait_for("2 of 3 workers left: resuming from the last checkpoint")
        first = seconds_to_the_next_step(running, began, "told to stop")
        assert f"stopped by TERM after step {first - 1};" in last
        wait_for_step(running, first + 12)
        began = time.monotonic()
        os.kill(running.worker_pids()[1], signal.SIGSTOP)
        running.wait_for("worker 1 hung")
        running.wait_for("1 of 2 workers left: resuming from the last checkpoint")
        seconds_to_the_next_step(running, began, "hangs")
        code = running.finish()
    assert code == 0, "\n".join(running.lines)
    assert [step for step, _ in step_lines(tmp_path / "run")] == list(range(1, 121))


def test_below_the_least_number_of_workers_the_job_ends(small_store: Path, tmp_path: Path) -> None:
    launcher = ("--elastic", "--min_workers=2", "--max_workers=2")
    flags = (*TRAINING, f"--store={small_store}", f"--run_dir={tmp_path}/run")
    with job("multi_worker", tmp_path, *flags, launcher_flags=launcher) as running:
        wait_for_step(running, 5)
        pids = running.worker_pids()
        os.kill(pids[1], signal.SIGKILL)
        code = running.finish()
        wait_until_gone(pids.values())
    assert code == 137
    assert running.lines[-2:] == [
        "launch: worker 1 was killed by signal 9 (SIGKILL)",
        "launch: 1 of 2 workers left, fewer than --min_workers=2: the job ends",
    ]
