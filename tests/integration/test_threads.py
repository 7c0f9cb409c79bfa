"""A worker needs no more threads, descriptors or memory the longer it trains."""

from pathlib import Path

import psutil
import pytest

from tests.integration.jobs import job
from tests.integration.soak import GROWTH, MOST_THREADS, Samples


@pytest.mark.timeout(1500)  # a busy machine switches between the workers in every step
@pytest.mark.slow("600 steps; quick: the threads of 29 checkpoints in test_checkpoint.py")
@pytest.mark.parametrize(
    "distributor", ["multi_worker", pytest.param("horovod", marks=pytest.mark.horovod)]
)
def test_600_quick_steps_leave_nothing_behind(
    small_store: Path, tmp_path: Path, distributor: str
) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", f"--run_dir={tmp_path}/run")
    flags += ("--pretrain_steps=100000", "--log_every_steps=50", "--checkpoint_every_steps=50")
    with job(distributor, tmp_path, *flags, seconds=1400) as running:
        running.wait_for("pretrain step 200/")
        workers = [psutil.Process(pid) for _, pid in sorted(running.worker_pids().items())]
        early, late = ([Samples() for _ in workers] for _ in range(2))
        for samples, step in ((early, 200), (late, 600)):
            running.wait_for(f"pretrain step {step}/") if step > 200 else None
            for worker, sample in zip(workers, samples, strict=True):
                sample.take(worker, 0.0)
    for rank, (before, after) in enumerate(zip(early, late, strict=True)):
        print(f"{distributor} worker {rank}: {vars(before)} {vars(after)}")
        assert max(before.threads + after.threads) < MOST_THREADS
        assert after.threads[0] <= before.threads[0] + 2  # while a checkpoint is written
        assert after.descriptors[0] <= before.descriptors[0] + 2
        assert after.rss_bytes[0] < before.rss_bytes[0] * GROWTH
