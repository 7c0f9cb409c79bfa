"""A long run at the demo's size that loses a worker every two minutes: no leaks, no losses.

    python -m tests.integration.soak [--minutes=60] [--restart_seconds=120] [--workers=2]
        [--store=FOLDER] [--out=FILE]

First the same run undisturbed, then the one that is hurt: by KILL and TERM in turn, of each worker
in turn. Memory, file descriptors and threads of launcher and workers are sampled. Prints what it
found as JSON, and exits with 1 unless memory stays within 5 % after a warm-up, no descriptors or
threads are added, and the final state and every loss are the undisturbed run's. All in all it
takes twice the minutes.
"""

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.integration.programs import ENVIRONMENT, REPOSITORY, metrics
from trainer.training import checkpoint

CALIBRATION_STEPS = 60
SAMPLE_SECONDS = 2.0
WARM_UP = 0.5  # of a sitting; of the launcher, of the whole run
GROWTH = 1.05
MOST_THREADS = 200  # of a worker
FLAGS = (
    "--flagfile=trainer/configs/demo.cfg",
    "--stage=pretrain",
    "--precision=float32",  # auto may choose differently in each run
    "--log_every_steps=1",
    "--checkpoint_every_steps=25",
)


@dataclass
class Samples:
    """Of one process, in the order of time."""

    seconds: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def take(self, process: psutil.Process, began: float) -> None:
        """Adds one, unless the process is gone."""
        with contextlib.suppress(psutil.Error), process.oneshot():
            rss, descriptors = process.memory_info().rss, process.num_fds()
            threads = process.num_threads()
            self.seconds.append(time.monotonic() - began)
            self.rss_bytes.append(rss)
            self.descriptors.append(descriptors)
            self.threads.append(threads)

    def after(self, seconds: float) -> "Samples":
        """Returns those taken later than that."""
        first = sum(s < seconds for s in self.seconds)
        return Samples(*(column[first:] for column in vars(self).values()))


def command(
    run_dir: Path, store: str, workers: int, steps: int, max_restarts: int = 0
) -> list[str]:
    """Returns the command of a run."""
    launcher = [sys.executable, "-u", "-m", "launch.main", f"--workers={workers}"]
    launcher += [f"--max_restarts={max_restarts}", "--grace_seconds=60", "--"]
    paths = [f"--run_dir={run_dir}", f"--store={store}"]
    return [*launcher, *FLAGS, *paths, f"--pretrain_steps={steps}"]


def undisturbed(run_dir: Path, store: str, workers: int, steps: int) -> None:
    """Trains to the end."""
    done = subprocess.run(
        command(run_dir, store, workers, steps),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-5000:]}\nthe run ended with {done.returncode}")


def disturbed(
    run_dir: Path,
    store: str,
    workers: int,
    steps: int,
    restart_seconds: float,
    max_restarts: int,
) -> tuple[Samples, list[Samples], int]:
    """Trains to the end, and hurts a worker each `restart_seconds` of a sitting.

    Returns:
      samples of the launcher, of every worker of every sitting that was hurt, and how many were.
    """
    process = subprocess.Popen(
        command(run_dir, store, workers, steps, max_restarts),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    launcher, began, restarts = psutil.Process(process.pid), time.monotonic(), 0
    of_launcher, of_workers = Samples(), []
    try:
        while process.poll() is None:
            sitting = time.monotonic()
            found = _workers(launcher, workers)
            samples = {worker.pid: Samples() for worker in found}
            while process.poll() is None and time.monotonic() < sitting + restart_seconds:
                of_launcher.take(launcher, began)
                for worker in found:
                    samples[worker.pid].take(worker, sitting)
                time.sleep(SAMPLE_SECONDS)
            if process.poll() is None and len(found) == workers:
                number = signal.SIGKILL if restarts % 2 else signal.SIGTERM
                with contextlib.suppress(psutil.Error):
                    found[restarts // 2 % workers].send_signal(number)
                    restarts += 1
                    of_workers += samples.values()
                psutil.wait_procs(found, timeout=120)
    finally:
        process.kill()  # its workers go with it
        process.wait()
    if process.returncode:
        raise SystemExit(f"the disturbed run ended with {process.returncode}")
    return of_launcher, of_workers, restarts


def _workers(launcher: psutil.Process, count: int) -> list[psutil.Process]:
    """Returns the launcher's workers once there are `count`, or what there is as it ends."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            found = [c for c in launcher.children() if "trainer.main" in c.cmdline()]
            if len(found) == count:
                break
            time.sleep(0.1)
    return found


def faults_of(launcher: Samples, workers: Sequence[Samples], restart_seconds: float) -> list[str]:
    """Returns what grew."""
    faults = []
    warm = launcher.after(launcher.seconds[-1] * WARM_UP)
    _compare(faults, "launcher", warm.rss_bytes[:5], warm.rss_bytes[-5:], GROWTH)
    for name in ("descriptors", "threads"):
        column = getattr(warm, name)
        _compare(faults, f"launcher's {name}", column[:5], column[-5:], 1.0)
    sittings = [samples.after(restart_seconds * WARM_UP) for samples in workers]
    sittings = [samples for samples in sittings if len(samples.seconds) >= 4]
    for number, samples in enumerate(sittings):
        half = len(samples.seconds) // 2
        where = f"worker in sitting {number}"
        _compare(faults, where, samples.rss_bytes[:half], samples.rss_bytes[half:], GROWTH)
        for name in ("descriptors", "threads"):
            column = getattr(samples, name)
            _compare(faults, f"{name} of {where}", column[:half], column[half:], 1.0)
        if max(samples.threads) > MOST_THREADS:
            faults.append(f"{where}: {max(samples.threads)} threads")
    if len(sittings) < 4:
        return [*faults, f"{len(sittings)} sittings are too few to compare: give it more --minutes"]
    middle = len(sittings) // 2
    for name, limit in (("rss_bytes", GROWTH), ("descriptors", 1.0), ("threads", 1.0)):
        medians = [statistics.median(getattr(samples, name)) for samples in sittings]
        _compare(faults, f"workers' {name}", medians[:middle], medians[middle:], limit)
    return faults


def _compare(faults: list[str], what: str, first: Sequence, last: Sequence, limit: float) -> None:
    before, after = statistics.median(first), statistics.median(last)
    if after > before * limit:
        faults.append(f"{what}: from {before} to {after}")


def main() -> int:
    """Runs, compares, prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--restart_seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--store", default="", help="made from the demo's source if not given")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder, workers = Path(text), options.workers
        store = options.store or str(folder / "store")
        undisturbed(folder / "calibration", store, workers, CALIBRATION_STEPS)
        lines = (folder / "calibration" / "metrics.jsonl").read_text().splitlines()
        times = {line["step"]: line["unix_time"] for line in map(json.loads, lines)}
        half = CALIBRATION_STEPS // 2
        step_seconds = (times[CALIBRATION_STEPS - 1] - times[half]) / (CALIBRATION_STEPS - 1 - half)
        steps = int(options.minutes * 60 / step_seconds)
        print(f"{step_seconds:.3f} s a step, {steps} steps", flush=True)
        undisturbed(folder / "whole", store, workers, steps)
        print("the undisturbed run is done", flush=True)
        # A machine that is slower than it was needs more of them, a program that fails ends.
        allowed = 10 + int(5 * options.minutes * 60 / options.restart_seconds)
        launcher, of_workers, restarts = disturbed(
            folder / "hurt", store, workers, steps, options.restart_seconds, allowed
        )
        faults = faults_of(launcher, of_workers, options.restart_seconds)
        runs = [folder / "whole", folder / "hurt"]
        states = [checkpoint.read(run / "checkpoints" / f"step-{steps:08d}")[0] for run in runs]
        if states[0]["sha256"] != states[1]["sha256"]:
            faults.append("the final state is another")
        if metrics(runs[0]) != metrics(runs[1]):
            faults.append("the losses are others")
        every = 1 + len(launcher.rss_bytes) // 20
        result = {
            "workers": workers,
            "steps": steps,
            "restarts": restarts,
            "minutes_disturbed": round(launcher.seconds[-1] / 60, 1),
            "launcher_rss_mib": [round(b / 2**20, 1) for b in launcher.rss_bytes[::every]],
            "worker_rss_mib": [round(s.rss_bytes[-1] / 2**20) for s in of_workers if s.rss_bytes],
            "worker_descriptors": [s.descriptors[-1] for s in of_workers if s.descriptors],
            "worker_threads": [max(s.threads) for s in of_workers if s.threads],
            "faults": faults,
        }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
