"""The rendered batch script, and the script itself with a `srun` and a `scontrol` that play along.

On a real SLURM: tests/integration/test_slurm.py.
"""

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm import script as slurm
from launch.slurm.script import SlurmOptions

REPOSITORY = Path(__file__).parents[3]
TRAINER = ["python", "-m", "trainer.main", "--source=a 'b' $c"]
HOME = Path("/home/me")
LAUNCHER = [sys.executable, "-m", "launch.main", "--platform=slurm"]


def launch(
    *flags: str, folder: Path = REPOSITORY, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)} | ({"PATH": path} if path else {})
    return subprocess.run(
        [*LAUNCHER, *flags], cwd=folder, env=environ, capture_output=True, text=True, timeout=60
    )


def options(script: str) -> list[str]:
    return [line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_what_is_not_given_is_left_to_the_cluster() -> None:
    script = slurm.script(TRAINER, SlurmOptions(workers=3), HOME)
    assert options(script) == [
        "--job-name=warmstate",
        "--ntasks=3",
        "--requeue",
        "--signal=TERM@60",
        "--open-mode=append",
        "--chdir=/home/me",
        "--output=/home/me/slurm-logs/%j.log",
    ]
    assert "THREADS" not in script and "--cpus-per-task" not in script


def test_what_is_given_stands_in_the_script() -> None:
    options_given = SlurmOptions(
        workers=3,
        max_restarts=7,
        cpus_per_worker=4,
        gpus_per_worker=2,
        partition="gpu",
        account="us",
        time_limit="1-12",
    )
    script = slurm.script(TRAINER, options_given, HOME)
    wanted = ("cpus-per-task=4", "gpus-per-task=2", "partition=gpu", "account=us", "time=1-12")
    assert {f"--{option}" for option in wanted} < set(options(script))
    assert "TF_NUM_INTRAOP_THREADS=4 " in script and '"$restarts" -lt 7 ]' in script
    # The options end at the first command, or sbatch does not read them.
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert all(line.startswith("#SBATCH ") for line in lines[1 : 1 + len(options(script))])


def test_the_script_s_srun_starts_the_trainer_itself() -> None:
    given = SlurmOptions(workers=2, cpus_per_worker=4)
    script = slurm.script(TRAINER, given, HOME).replace("\\\n", " ")
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    # No shell between srun and the trainer, which must get TERM.
    assert words[-len(TRAINER) :] == TRAINER
    assert words[1 : -len(TRAINER)] == [
        "--ntasks=2",
        "--distribution=block",
        "--kill-on-bad-exit=0",
        "--wait=120",
        "--cpus-per-task=4",
        "--open-mode=append",
        "--output=/home/me/slurm-logs/%j-worker-%t.log",
    ]


def run_script(
    folder: Path, srun: str, max_restarts: int = 0, restarts: int = 0, preempted: str = "None"
) -> tuple[int, list[str]]:
    """Runs the script with `srun` as that shell code; returns its exit code and the requeues."""
    given = SlurmOptions(workers=2, max_restarts=max_restarts)
    script = folder / "script"
    script.write_text(slurm.script(TRAINER, given, folder))
    job_state = f"   PreemptEligibleTime=2026-11-24T23:42:36 PreemptTime={preempted}"
    scontrol = f'[ "$1" = show ] && echo "{job_state}" || echo "$@" >> {folder}/requeues'
    for name, body in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    process = subprocess.run(
        ["bash", str(script)],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "TF_CONFIG": "of another job",
            "SLURM_RESTART_COUNT": str(restarts),
        },
        stdout=subprocess.DEVNULL,
        timeout=30,
    )
    requeues = folder / "requeues"
    return process.returncode, requeues.read_text().splitlines() if requeues.exists() else []


@pytest.mark.parametrize(
    ("code", "max_restarts", "restarts", "requeued"),
    [
        (0, 3, 0, False),
        (143, 0, 5, True),  # the time limit: as often as it comes
        (1, 0, 0, False),
        (1, 2, 1, True),
        (75, 2, 2, False),
        (2, 3, 0, False),  # configuration
    ],
)
def test_when_the_job_goes_back_into_the_queue(
    tmp_path: Path, code: int, max_restarts: int, restarts: int, requeued: bool
) -> None:
    ended = run_script(tmp_path, f"exit {code}", max_restarts, restarts)
    assert ended == (code, ["requeue 7"] if requeued else [])


def test_what_slurm_ends_it_requeues_itself_or_not(tmp_path: Path) -> None:
    # As with scancel: the script gets TERM while the workers still save.
    ended = run_script(tmp_path, "kill -TERM $PPID; sleep 0.1; exit 143", max_restarts=3)
    assert ended == (143, [])


def test_in_the_grace_time_of_a_preemption_slurm_requeues_the_job_itself(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "exit 143", max_restarts=3, preempted="2026-11-24T23:42:42")
    assert ended == (143, [])


def test_another_job_s_tf_config_does_not_reach_the_workers(tmp_path: Path) -> None:
    assert run_script(tmp_path, 'exit "0${TF_CONFIG:+9}"') == (0, [])


def test_dry_run_prints_the_script_at_once(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = launch("--workers=2", "--dry_run", "--", "--seed=1", folder=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The processor's seconds, which other programs do not lengthen.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    command = [sys.executable, "-u", "-m", "trainer.main", "--seed=1"]
    assert done.stdout == slurm.script(command, SlurmOptions(workers=2), tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])


def test_the_launcher_submits_and_says_how_to_follow(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/bash\ncat > submitted\necho '12;cluster'\n")
    sbatch.chmod(0o755)
    done = launch("--workers=2", folder=tmp_path, path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "job 12",
        "  state: squeue --job=12",
        f"  lines: tail -F {tmp_path}/slurm-logs/12-worker-0.log",
        "  end:   scancel 12",
    ]
    assert (tmp_path / "slurm-logs").is_dir()
    assert options((tmp_path / "submitted").read_text())[1] == "--ntasks=2"


def test_all_faults_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "100 %"
    folder.mkdir()
    flags = ("--partition=a b", "--account=", "--time_limit=2h", "--cpus_per_worker=0")
    more = ("--gpus_per_worker=one", "--distributor=horovod", "--workers=-1")
    done = launch(*flags, *more, folder=folder, path="/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    faults = [line.removeprefix("launch: ") for line in done.stderr.splitlines()]
    starts = [re.split(": | must | is not ", fault)[0] for fault in faults]
    assert {*flags, *more, "--platform=slurm"} <= set(starts)
    assert starts.count("--platform=slurm") == 2  # the folder, and no sbatch


@pytest.mark.parametrize("limit", ["90", "90:00", "1:30:00", "2-12", "2-12:30", "2-12:30:00"])
def test_time_limits_that_sbatch_reads(limit: str) -> None:
    assert launch(f"--time_limit={limit}", "--dry_run").returncode == 0


def test_the_flags_of_slurm_mean_nothing_elsewhere() -> None:
    done = launch("--platform=local", "--time_limit=5", "--gpus_per_worker=1")
    assert done.returncode == 2
    for flag in ("--time_limit=5", "--gpus_per_worker=1"):
        assert f"launch: {flag}: needs --platform=slurm" in done.stderr
