"""Two workers, killed and stopped at random points, end with the bits of a run left alone.

WARMSTATE_FAULT_KILLS=30 WARMSTATE_FAULT_TERMS=10 is the long form.
"""

import functools
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.integration.jobs import Job, job, wait_until_gone
from tests.integration.programs import metrics, run, train
from trainer.training import checkpoint

pytestmark = pytest.mark.slow(
    "kills at random points, for minutes; quick: the resumed runs of test_training.py"
)
KILLS = int(os.environ.get("WARMSTATE_FAULT_KILLS", "3"))
TERMS = int(os.environ.get("WARMSTATE_FAULT_TERMS", "2"))
STEPS = 40 + 12 * max(KILLS, TERMS)
LAST_FAULT = STEPS - 35  # so that the run is not over before the fault
GRACE_SECONDS = 30.0
GRACE = (f"--grace_seconds={GRACE_SECONDS}",)
FLAGS = (
    f"--pretrain_steps={STEPS}",
    f"--finetune_steps={STEPS}",
    "--pretrain_evaluate_every_steps=8",
    "--finetune_evaluate_every_steps=8",
    "--checkpoint_every_steps=3",
)


@pytest.fixture(scope="module")
def stage_flags(
    small_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Sequence[str]]:
    """Returns each stage's flags; fine-tuning begins from an encoder pretrained for 5 steps."""
    folder = tmp_path_factory.mktemp("encoder")
    store = f"--store={small_store}"
    train(1, "--stage=pretrain", store, f"--run_dir={folder}", "--pretrain_steps=5")
    return {
        "pretrain": ("--stage=pretrain", store, *FLAGS),
        "finetune": ("--stage=finetune", store, f"--encoder={folder}/encoder", *FLAGS),
    }


@pytest.fixture(scope="module")
def whole_run(
    stage_flags: dict[str, Sequence[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Returns stage -> the folder of a run that nobody disturbed, on two workers; made once."""

    @functools.cache
    def folder_of(stage: str) -> Path:
        folder = tmp_path_factory.mktemp(stage)
        train(2, *stage_flags[stage], f"--run_dir={folder}")
        return folder

    return folder_of


def assert_same(whole: Path, disturbed: Path) -> None:
    """Compares the final state, what the loop remembers of it, every loss, and the bundles."""
    name = f"step-{STEPS:08d}"
    expected, found = (checkpoint.read(f / "checkpoints" / name) for f in (whole, disturbed))
    assert expected[0]["sha256"] == found[0]["sha256"]
    for note in ("metrics", "step", "skipped_steps"):
        assert expected[0]["notes"][note] == found[0]["notes"][note], note
    assert metrics(whole) == metrics(disturbed)
    bundles = [path.relative_to(whole) for path in whole.glob("*/*.safetensors")]
    assert bundles
    for path in bundles:  # pretraining leaves an encoder and a decoder
        assert (whole / path).read_bytes() == (disturbed / path).read_bytes(), path


def wait_for_step(running: Job, stage: str, step: int) -> None:
    """Returns when a line says that `step` or a later one is done."""
    while True:
        line = running.wait_for(f"{stage} step ")
        if int(re.search(rf"{stage} step (\d+)", line)[1]) >= step:
            return


def wait_for_write(unfinished: Path) -> None:
    """Returns when a checkpoint is being written."""
    limit = time.monotonic() + 60
    while not unfinished.exists():  # it is there for milliseconds
        assert time.monotonic() < limit, "no checkpoint was written"


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_whose_workers_are_killed_ends_with_the_same_bits(
    stage_flags: dict, whole_run: Callable[[str], Path], tmp_path: Path, stage: str
) -> None:
    draw = random.Random(f"{stage} {KILLS}")
    folder = tmp_path / "run"
    unfinished = folder / "checkpoints" / "unfinished"
    flags = (*stage_flags[stage], f"--run_dir={folder}")
    left_unfinished = 0
    with job(
        "multi_worker",
        tmp_path / "job",
        *flags,
        launcher_flags=(f"--max_restarts={KILLS}",),
        seconds=300 + 240 * KILLS,  # a restart takes a minute on a machine that is busy
    ) as running:
        for number, step in enumerate(sorted(draw.sample(range(1, LAST_FAULT), KILLS)), 1):
            wait_for_step(running, stage, step)
            pids = running.worker_pids()
            if number % 2:
                rank = 0  # the chief writes
                wait_for_write(unfinished)
            else:
                rank = draw.randrange(2)
                time.sleep(draw.uniform(0, 0.1))
            os.kill(pids[rank], signal.SIGKILL)
            wait_until_gone([pids[rank]], seconds=60)
            left_unfinished += rank == 0 and unfinished.exists()
            running.wait_for(f"launch: restart {number} of {KILLS}")
            wait_until_gone(pids.values(), seconds=60)
        code = running.finish()
    printed = "\n".join(running.lines)
    assert code == 0, printed
    assert printed.count("was killed by signal 9 (SIGKILL)") == KILLS, printed
    print(f"{stage}: {KILLS} kills, {left_unfinished} inside the writing of a checkpoint")
    assert left_unfinished > 0
    assert_same(whole_run(stage), folder)


def stop(running: Job, after_seconds: float) -> tuple[str, float]:
    """Sends TERM to the launcher; returns what both workers said of it, and how long it took."""
    time.sleep(after_seconds)
    began = time.monotonic()
    running.process.terminate()
    code = running.finish()
    seconds = time.monotonic() - began
    printed = "\n".join(running.lines)
    assert code == 143, printed
    said = re.findall(r"\[worker \d\] (.*stopped by TERM .*)", printed)
    assert len(said) == 2 and len(set(said)) == 1, printed  # at the same step
    assert seconds < GRACE_SECONDS
    return said[0], seconds


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_that_is_stopped_by_term_ends_with_the_same_bits(
    stage_flags: dict, whole_run: Callable[[str], Path], tmp_path: Path, stage: str
) -> None:
    draw = random.Random(f"{stage} {TERMS}")
    folder = tmp_path / "run"
    flags = (*stage_flags[stage], f"--run_dir={folder}")
    steps = sorted(draw.sample(range(1, LAST_FAULT), TERMS))
    for number, step in enumerate(steps):
        in_averaging = stage == "pretrain" and number == TERMS - 1
        if number % 2:
            step = -(-step // 8) * 8  # an evaluation follows
        with job("multi_worker", tmp_path / f"job{number}", *flags, launcher_flags=GRACE) as job_:
            if in_averaging:
                job_.wait_for("averaging the final state")
            else:
                wait_for_step(job_, stage, step)
            said, seconds = stop(job_, draw.uniform(0, 0.05))
        where = "the averaging" if in_averaging else f"step {step}"
        print(f"{stage}: TERM after {where}: {said}; {seconds:.1f} s")
        wanted = "during an evaluation" if in_averaging else "state saved"
        assert wanted in said
    train(2, *flags)
    assert_same(whole_run(stage), folder)


def test_term_stops_an_evaluation_of_a_bundle(
    small_store: Path, whole_run: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = (
        "--stage=evaluate",
        f"--store={small_store}",
        f"--classifier={whole_run('finetune')}/classifier",
        f"--run_dir={tmp_path}/run",
        "--evaluate_split=train",
    )
    with job("multi_worker", tmp_path / "job", *flags, launcher_flags=GRACE) as running:
        running.wait_for("evaluate: ")
        said, _ = stop(running, 0)
    assert "during an evaluation" in said
    assert not (tmp_path / "run" / "report.json").exists()
    train(2, *flags)
    assert (tmp_path / "run" / "report.json").exists()


def test_two_workers_stop_at_the_same_step_that_is_not_finite(
    small_store: Path, tmp_path: Path
) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", "--pretrain_steps=20")
    done = run(2, *flags, f"--run_dir={tmp_path}/stop", "--pretrain_learning_rate=1e30")
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    said = re.findall(
        r"pretrain: step (\d+) is not finite: .*largest gradients.*batch: \d+", output
    )
    assert said and len(set(said)) == 1, output
    assert "Traceback" not in output
    skip = (*flags, f"--run_dir={tmp_path}/skip", "--pretrain_learning_rate=1e30")
    done = run(2, *skip, "--on_nonfinite=skip", "--max_skipped_steps=3")
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "skipped, 3 of 3" in output and "3 were skipped before it" in output
