"""A worker that raises, is killed or hangs ends the job soon, and is named."""

import os
import re
import time
from pathlib import Path

import pytest

from tests.integration.jobs import HURT, job, wait_until_gone

pytestmark = pytest.mark.slow(
    "waits for timeouts in real jobs; quick: trainer/distribution/test_failures.py"
)
TIMEOUT_SECONDS = 8.0
SLACK_SECONDS = 5.0  # for a busy machine
FOUND_SECONDS = TIMEOUT_SECONDS + 3.0 + SLACK_SECONDS
# To be noticed, to tell survivors from the one that hangs, to stop.
LIMIT_SECONDS = TIMEOUT_SECONDS + 3.0 + 5.0 + SLACK_SECONDS
HANGS = (75, "launch: worker {} hung: worker {} waited for it until the timeout; it was killed")
ENDINGS = {
    "raise": (1, "launch: worker {} exited with code 1"),
    "kill": (137, "launch: worker {} was killed by signal 9 (SIGKILL)"),
    "stop": HANGS,
    "stick": HANGS,
}
REASONS = {"stop": "answered", "stick": "joined a collective in which others have waited"}


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(
    ("how", "workers"),
    [*((how, 2) for how in HURT), ("stop", 3), ("stick", 3)],
)
@pytest.mark.parametrize(
    "distributor", ["multi_worker", pytest.param("horovod", marks=pytest.mark.horovod)]
)
def test_the_guilty_worker_ends_the_job_and_is_named(
    small_store: Path, tmp_path: Path, distributor: str, how: str, workers: int, guilty: int
) -> None:
    flags = (
        "--stage=pretrain",
        f"--store={small_store}",
        f"--run_dir={tmp_path}/run",
        "--pretrain_steps=100000",
        f"--collective_timeout_seconds={TIMEOUT_SECONDS}",
    )
    number = (f"--workers={workers}",)
    with job(distributor, tmp_path, *flags, launcher_flags=number) as running:
        running.wait_for("pretrain step 12/")
        pids = running.worker_pids(workers)
        assert sorted(pids) == list(range(workers))
        began = time.monotonic()
        os.kill(pids[guilty], HURT[how])
        if how in REASONS:
            running.wait_for("lost a peer")
            print(f"found after {time.monotonic() - began:.1f} s")
            assert time.monotonic() - began < FOUND_SECONDS
        code = running.finish()
        seconds = time.monotonic() - began
        wait_until_gone(pids.values())
    print(f"{distributor} {how} {guilty} of {workers}: ended after {seconds:.1f} s")
    expected_code, last_line = ENDINGS[how]
    printed = "\n".join(running.lines)
    assert code == expected_code, printed
    survivors = [rank for rank in range(workers) if rank != guilty]
    assert running.lines[-1] in [last_line.format(guilty, rank) for rank in survivors], printed
    for rank in survivors if how in REASONS else ():
        said = (
            rf"\[worker {rank}\] worker {rank} lost a peer: worker {guilty} has not {REASONS[how]}"
        )
        assert len(re.findall(rf"^{said} for \d+ seconds$", printed, re.M)) == 1, printed
    assert seconds < (LIMIT_SECONDS if expected_code == 75 else 10.0), printed
    if how != "raise":
        assert "Traceback" not in printed, printed
    else:
        assert "RuntimeError: the test asked for it" in printed
