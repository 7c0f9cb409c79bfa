"""The generated batch script on a real SLURM of two nodes; see slurm_cluster.py."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.integration.programs import REPOSITORY, SMALL, metrics, train
from tests.integration.slurm_cluster import show_job, slurm, slurm_cluster, wait_for_end, why_not
from trainer.distribution.node_list import expand_hosts

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no SLURM: {why_not()}")
STEPS = 150


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapping[str, str]]:
    with slurm_cluster(kill_wait_seconds=120) as environment:
        yield environment


def run_launcher(
    cluster: Mapping[str, str], folder: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.main", "--platform=slurm", *words],
        cwd=folder,
        env={**cluster, "PYTHONPATH": str(REPOSITORY)},
        text=True,
        capture_output=True,
        timeout=120,
    )


def launch(cluster: Mapping[str, str], folder: Path, *flags: str) -> str:
    """Submits two workers with logs in `folder`; returns the job's number."""
    done = run_launcher(cluster, folder, "--workers=2", "--cpus_per_worker=1", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.match(r"job (\d+)\n", done.stdout)[1]


def logs(folder: Path) -> str:
    return "\n".join(f"{p.name}:\n{p.read_text()}" for p in folder.glob("slurm-logs/*.log"))


def wait_for_a_step(folder: Path, job: str, sitting: int) -> None:
    """Returns when worker 0 has done a step in its n-th sitting (from 0)."""
    log = folder / "slurm-logs" / f"{job}-worker-0.log"
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        text = log.read_text() if log.exists() else ""
        # Each sitting but the first says where it goes on.
        part = re.split("pretrain: resumed after", text)[sitting:]
        if part and "pretrain step " in part[0]:
            return
        time.sleep(0.05)
    raise AssertionError(f"sitting {sitting} did no step:\n{logs(folder)}")


def pid_of_worker(cluster: Mapping[str, str], job: str, rank: int) -> int:
    wanted = {f"SLURM_CONF={cluster['SLURM_CONF']}", "SLURM_STEP_ID=0"}
    wanted |= {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    for entry in Path("/proc").iterdir():
        try:
            environ = set((entry / "environ").read_text().split("\0"))
            is_trainer = b"trainer.main" in (entry / "cmdline").read_bytes()
        except OSError:  # no process, or one that has ended
            continue
        if wanted <= environ and is_trainer:
            return int(entry.name)
    raise AssertionError(f"job {job} has no worker {rank}")


@pytest.mark.slow("trains under SLURM; quick: resuming in test_training.py")
def test_a_job_that_is_requeued_ends_with_the_same_bits(
    cluster: Mapping[str, str], small_store: Path, tmp_path: Path
) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", f"--pretrain_steps={STEPS}")
    job = launch(
        cluster, tmp_path, "--max_restarts=3", "--", *SMALL, *flags, f"--run_dir={tmp_path}/slurm"
    )
    wait_for_a_step(tmp_path, job, 0)
    slurm(cluster, "scontrol", "requeue", job)
    wait_for_a_step(tmp_path, job, 1)
    # To the workers, not to the script: what --signal does near the time limit.
    slurm(cluster, "scancel", "--signal=TERM", job)
    wait_for_a_step(tmp_path, job, 2)
    os.kill(pid_of_worker(cluster, job, 1), signal.SIGKILL)
    shown = wait_for_end(cluster, job, 300)
    printed = logs(tmp_path)
    print(printed)
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), printed
    assert shown["Restarts"] == "3"
    for rank in range(2):
        log = (tmp_path / "slurm-logs" / f"{job}-worker-{rank}.log").read_text()
        assert log.count("; state saved") == 2, printed
    assert "workers were told to stop and have saved: back into the queue" in printed
    assert "workers ended with code 137, 2 of 3 restarts: back into the queue" in printed
    train(2, *flags, f"--run_dir={tmp_path}/whole")
    assert metrics(tmp_path / "slurm") == metrics(tmp_path / "whole")
    bundles = [tmp_path / name / "encoder" / "encoder.safetensors" for name in ("slurm", "whole")]
    assert bundles[0].read_bytes() == bundles[1].read_bytes()


def test_a_wrong_flag_fails_the_job_at_once_whatever_the_restarts(
    cluster: Mapping[str, str], tmp_path: Path
) -> None:
    job = launch(cluster, tmp_path, "--max_restarts=3", "--", f"--run_dir={tmp_path}", "--sead=1")
    shown = wait_for_end(cluster, job, 60)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0")
    for rank in range(2):
        log = (tmp_path / "slurm-logs" / f"{job}-worker-{rank}.log").read_text()
        assert "did you mean --seed?" in log


def test_what_sbatch_refuses_is_said_and_ends_with_its_code(
    cluster: Mapping[str, str], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="invalid partition specified: mars"):
        launch(cluster, tmp_path, "--partition=mars")


SAVING_TRAINER = """
import os
import signal
import sys

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
if "SLURM_RESTART_COUNT" not in os.environ:
    print("begun", flush=True)
    while True:
        signal.pause()
"""


def small_trainer(folder: Path, code: str) -> None:
    """Puts a `trainer.main` into the job's folder, which it finds before the real one."""
    (folder / "trainer").mkdir()
    (folder / "trainer" / "__init__.py").touch()
    (folder / "trainer" / "main.py").write_text(code)


def wait_until_begun(folder: Path) -> None:
    limit = time.monotonic() + 60
    while logs(folder).count("begun") < 2:
        assert time.monotonic() < limit, logs(folder)
        time.sleep(0.05)


def test_status_logs_and_cancel(cluster: Mapping[str, str], tmp_path: Path) -> None:
    small_trainer(tmp_path, SAVING_TRAINER)
    job = launch(cluster, tmp_path, "--name=reviews")
    wait_until_begun(tmp_path)
    shown = run_launcher(cluster, tmp_path, "status", "reviews")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"{job} reviews: RUNNING\n")
    log = tmp_path / "slurm-logs" / f"{job}-worker-0.log"
    assert f"  nodes:    127.0.0.[2-3]\n  lines:    {log}\n" in shown.stdout
    assert run_launcher(cluster, tmp_path, "logs", job).stdout == "begun\n"
    assert run_launcher(cluster, tmp_path, "cancel", "reviews").returncode == 0
    wait_for_end(cluster, job, 60)
    shown = run_launcher(cluster, tmp_path, "status", "reviews")
    assert shown.stdout.startswith(f"{job} reviews: CANCELLED\n")
    again = run_launcher(cluster, tmp_path, "cancel", "reviews")
    nobody = run_launcher(cluster, tmp_path, "status", "nobody")
    for done in (again, nobody):
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("launch: SLURM has no job ")


REPORTING_TRAINER = """
import os
import sys
from pathlib import Path

if "--bad" in sys.argv:
    sys.exit(2)
if os.environ["SLURM_PROCID"] == "0":
    Path("runs").mkdir()
    Path("runs/report.json").write_text("{}")
    print("report: runs/report.html")
"""


def test_a_job_is_followed_to_its_report(cluster: Mapping[str, str], tmp_path: Path) -> None:
    small_trainer(tmp_path, REPORTING_TRAINER)
    done = run_launcher(cluster, tmp_path, "--workers=2", "--cpus_per_worker=1", "--follow")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("report: runs/report.html\n")
    assert done.stderr.endswith(f"launch: report: {tmp_path}/runs/report.json\n")
    flags = ("--workers=2", "--cpus_per_worker=1", "--wait", "--", "--bad")
    done = run_launcher(cluster, tmp_path, *flags)
    assert done.returncode == 2
    assert done.stderr.endswith(" FAILED, code 2\n")


@pytest.mark.slow("waits for SLURM's grace time; quick: tests/launch/slurm has the script")
def test_a_job_that_is_preempted_with_a_grace_time_starts_again_once(
    cluster: Mapping[str, str], tmp_path: Path
) -> None:
    small_trainer(tmp_path, SAVING_TRAINER)
    job = launch(cluster, tmp_path)
    wait_until_begun(tmp_path)
    urgent = ("sbatch", "--quiet", "--partition=urgent", "--ntasks=2", "--output=/dev/null")
    slurm(cluster, *urgent, "--wrap", "true")
    shown = wait_for_end(cluster, job, 120)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    assert "workers ended with code 143: SLURM ends the job" in logs(tmp_path)


RESOLVE = """
import os
from trainer.distribution.cluster import resolve
cluster = resolve(os.environ)
print(cluster.rank, cluster.size, *cluster.addresses)
"""


def test_tasks_of_srun_find_each_other_and_who_is_not_one_is_alone(
    cluster: Mapping[str, str], tmp_path: Path
) -> None:
    resolve = (sys.executable, "-c", RESOLVE)
    environment = {**cluster, "PYTHONPATH": str(REPOSITORY)}
    block = ("srun", "--nodes=2", "--ntasks=3", "--overcommit", "--distribution=block")
    first, second, third = sorted(slurm(environment, *block, *resolve).splitlines())
    rank, size, *addresses = first.split(" ")
    assert (rank, size) == ("0", "3")
    assert second.split(" ") == ["1", "3", *addresses] and third.split(" ") == [
        "2",
        "3",
        *addresses,
    ]
    assert sorted({a.split(":")[0] for a in addresses}) == ["127.0.0.2", "127.0.0.3"]
    ports = [int(a.split(":")[1]) for a in addresses]
    assert ports == [ports[0], ports[0] + 1, ports[0] + 2]
    # In an allocation of two tasks, but not in a step of them.
    assert slurm(environment, "salloc", "--quiet", "--ntasks=2", *resolve) == "0 1"
    log = tmp_path / "log"
    wrapped = f"{sys.executable} -c '{RESOLVE}'"
    batch = ("sbatch", "--wait", "--quiet", "--ntasks=2", f"--output={log}", "--wrap", wrapped)
    slurm(environment, *batch)
    assert log.read_text() == "0 1\n"


@pytest.mark.parametrize(
    "text", ["127.0.0.[2-3]", "n[01-03,7],gpu1", "a[1-2]b[3-4]", "a[08-11,001]-ib,x", "n1,n1"]
)
def test_lists_of_nodes_mean_what_slurm_says(cluster: Mapping[str, str], text: str) -> None:
    theirs = slurm(cluster, "scontrol", "show", "hostnames", text).splitlines()
    assert expand_hosts(text, "X") == theirs


def test_the_daemons_know_the_job_that_was_asked_for(
    cluster: Mapping[str, str], tmp_path: Path
) -> None:
    job = launch(cluster, tmp_path, "--time_limit=30", "--", "--help")
    shown = wait_for_end(cluster, job, 60)
    assert (shown["JobState"], shown["Requeue"], shown["TimeLimit"]) == (
        "COMPLETED",
        "1",
        "00:30:00",
    )
    assert show_job(cluster, job)["NumTasks"] == "2"
