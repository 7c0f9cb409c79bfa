"""Workers are killed at random, the launcher starts them again, and the result has the same bits.

WARMSTATE_KILLS=20 makes it a long test.
"""

import os
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.numpy

from tests.integration.jobs import Job, job, wait_until_gone

pytestmark = pytest.mark.slow(
    "minutes of kills; quick: test_launch_local.py, resumed runs in test_training.py"
)
KILLS = int(os.environ.get("WARMSTATE_KILLS", "3"))
STEPS = 30 + 15 * KILLS
STARTING_SECONDS = 10.0  # a start takes about that long


def final_state(folder: Path) -> dict[str, bytes]:
    newest = max((folder / "checkpoints").glob("step-*"))
    assert newest.name == f"step-{STEPS:08d}"
    tensors = safetensors.numpy.load_file(newest / "state.safetensors")
    tensors |= safetensors.numpy.load_file(folder / "encoder" / "encoder.safetensors")
    return {name: array.tobytes() for name, array in tensors.items()}


def wait_for_step(running: Job, step: int) -> None:
    """Returns when a line says that `step` or a later one is done."""
    while True:
        done = re.search(r"pretrain step (\d+)/", running.wait_for("pretrain step "))
        if int(done[1]) >= step:
            return


def kill_some(running: Job, draw: random.Random, kills: int) -> None:
    """Kills a random worker at each of some random steps, now and then while it still starts."""
    pids: dict[int, int] = {}
    for number, step in enumerate(sorted(draw.sample(range(1, STEPS - 5), kills)), 1):
        if number % 5 == 0:
            time.sleep(draw.uniform(0, STARTING_SECONDS))
        else:
            wait_for_step(running, step)
            time.sleep(draw.uniform(0, 0.2))  # so that it comes while a checkpoint is written, too
        pids = running.worker_pids()
        os.kill(pids[draw.randrange(2)], signal.SIGKILL)
        running.wait_for(f"launch: restart {number} of {kills}")
        wait_until_gone(pids.values())


@pytest.mark.parametrize(
    "distributor", ["multi_worker", pytest.param("horovod", marks=pytest.mark.horovod)]
)
def test_a_run_whose_workers_are_killed_ends_with_the_same_bits(
    small_store: Path, tmp_path: Path, distributor: str
) -> None:
    flags: Sequence[str] = (
        "--stage=pretrain",
        f"--store={small_store}",
        f"--pretrain_steps={STEPS}",
        f"--run_dir={tmp_path}/{{}}",
    )

    def flags_of(name: str) -> list[str]:
        return [flag.format(name) for flag in flags]

    with job(distributor, tmp_path / "a", *flags_of("whole")) as running:
        assert running.finish() == 0, "\n".join(running.lines)
    restarts = (f"--max_restarts={KILLS}",)
    with job(distributor, tmp_path / "b", *flags_of("killed"), launcher_flags=restarts) as running:
        kill_some(running, random.Random(f"{distributor} {KILLS}"), KILLS)
        code = running.finish()
    printed = "\n".join(running.lines)
    print(printed)
    assert code == 0, printed
    assert printed.count("was killed by signal 9 (SIGKILL)") == KILLS
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")
