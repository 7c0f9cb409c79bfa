"""A run that met a number that is none, and the command that its message names."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.programs import ENVIRONMENT, REPOSITORY, metrics, run, train

pytestmark = pytest.mark.slow("quick: tests/trainer/training/test_loop.py, in one process")


def replayed(command: str) -> str:
    """Runs a command that a message names; returns what it printed."""
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_the_step_that_stopped_a_run_is_shown(
    small_store: Path, tmp_path: Path, workers: int
) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", f"--run_dir={tmp_path}/run")
    flags += ("--pretrain_steps=20", "--checkpoint_every_steps=2", "--pretrain_learning_rate=1e30")
    stopped = run(workers, *flags)
    said = re.search(
        r"step (\d+) is not finite.*batch: ([\d, ]+); `(.*)` shows", stopped.stderr + stopped.stdout
    )
    assert stopped.returncode == 2 and said, stopped.stdout + stopped.stderr
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    printed = replayed(said[3])
    assert f"step {said[1]} · loss " in printed and "nan" in printed
    for example in said[2].split(", "):
        assert re.search(rf"  {example}: \S+", printed)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))


def test_a_step_of_each_stage_of_the_whole_job_has_the_loss_that_it_had(
    small_store: Path, tmp_path: Path
) -> None:
    flags = (f"--store={small_store}", f"--run_dir={tmp_path}", "--log_every_steps=1")
    train(2, *flags, "--pretrain_steps=12", "--finetune_steps=12", "--checkpoint_every_steps=4")
    for part in ("pretrain", "warm", "scratch"):
        loss = metrics(tmp_path / part)[11]
        printed = replayed(
            "python -m launch.main --workers=2 -- --stage=replay --step=11 "
            f"--run_dir={tmp_path / part}"
        )
        assert f"replay: step 11 · loss {loss:.9g}" in printed, printed
