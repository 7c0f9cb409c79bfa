"""A worker that raises, is killed or hangs ends the job soon, and is named."""

import os
import time
from pathlib import Path

import pytest

from tests.integration.jobs import HURT, job, wait_until_gone

pytestmark = pytest.mark.slow(
    "waits for timeouts in real jobs; quick: trainer/distribution/test_failures.py"
)
TIMEOUT_SECONDS = 8.0
# To be noticed, to tell survivors from the one that hangs, to stop; and slack for a busy machine.
LIMIT_SECONDS = TIMEOUT_SECONDS + 3.0 + 5.0 + 5.0
HANGS = (75, "launch: worker {} hung: worker {} waited for it until the timeout; it was killed")
ENDINGS = {
    "raise": (1, "launch: worker {} exited with code 1"),
    "kill": (137, "launch: worker {} was killed by signal 9 (SIGKILL)"),
    "stop": HANGS,
    "stick": HANGS,
}


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize("how", HURT)
@pytest.mark.parametrize(
    "distributor", ["multi_worker", pytest.param("horovod", marks=pytest.mark.horovod)]
)
def test_the_guilty_worker_ends_the_job_and_is_named(
    small_store: Path, tmp_path: Path, distributor: str, how: str, guilty: int
) -> None:
    flags = (
        "--stage=pretrain",
        f"--store={small_store}",
        f"--run_dir={tmp_path}/run",
        "--pretrain_steps=100000",
        f"--collective_timeout_seconds={TIMEOUT_SECONDS}",
    )
    with job(distributor, tmp_path, *flags) as running:
        running.wait_for("pretrain step 12/")
        pids = running.worker_pids()
        assert sorted(pids) == [0, 1]
        began = time.monotonic()
        os.kill(pids[guilty], HURT[how])
        code = running.finish()
        seconds = time.monotonic() - began
        wait_until_gone(pids.values())
    print(f"{distributor} {how} {guilty}: {seconds:.1f} s")
    expected_code, last_line = ENDINGS[how]
    printed = "\n".join(running.lines)
    assert code == expected_code, printed
    assert running.lines[-1] == last_line.format(guilty, 1 - guilty), printed
    assert seconds < (LIMIT_SECONDS if expected_code == 75 else 10.0), printed
    if how != "raise":
        assert "Traceback" not in printed, printed
    else:
        assert "RuntimeError: the test asked for it" in printed
