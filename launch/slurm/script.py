"""A batch script for SLURM: one task a worker, and the job goes back to the queue until it is done.

The trainer finds its peers in what `srun` sets (trainer/distribution/cluster.py).
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

SAVE_SECONDS = 60  # before the time limit; SLURM may take up to 60 seconds more
WAIT_SECONDS = 120  # for the others after the first worker's end, above the collective timeout
NAME = r"[A-Za-z0-9][\w.-]*"
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # sbatch(1), --time

_PARTITION = flags.DEFINE_string("partition", None, "slurm: where the job may run")
_ACCOUNT = flags.DEFINE_string("account", None, "slurm: who pays")
_TIME_LIMIT = flags.DEFINE_string(
    "time_limit",
    None,
    "slurm: of one sitting (minutes, hours:minutes:seconds or days-hours); a job that is not done "
    "by then goes back into the queue",
)
_CPUS_PER_WORKER = flags.DEFINE_string("cpus_per_worker", None, "slurm: cores for each worker")
_FLAGS = (_PARTITION, _ACCOUNT, _TIME_LIMIT, _CPUS_PER_WORKER)


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM; what is None is left to the cluster.

    Attributes:
      workers: tasks.
      folder: the tasks' working folder, and where the logs are.
      max_restarts: how often the job may have been started again when a failure puts it back into
        the queue; its time limit and a preemption always do.
      time_limit: as sbatch reads it: minutes, hours:minutes:seconds, days-hours.
    """

    workers: int
    folder: Path
    name: str = "warmstate"
    max_restarts: int = 0
    cpus_per_worker: int | None = None
    gpus_per_worker: int | None = None
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None

    @property
    def log_folder(self) -> Path:
        """Where <job>.log is, and <job>-worker-<rank>.log."""
        return self.folder / "slurm-logs"


def script(command: Sequence[str], job: Job) -> str:
    """Returns the batch script that runs `command` as `job.workers` tasks."""
    return _TEMPLATE.format(
        options="\n".join(f"#SBATCH {option}" for option in _options(job)),
        threads=_THREADS.format(job.cpus_per_worker) if job.cpus_per_worker else "",
        srun=" \\\n    ".join([*_srun(job), shlex.join(command)]),
        max_restarts=job.max_restarts,
    )


def submit(command: Sequence[str], job: Job) -> tuple[int, str]:
    """Gives the script to `sbatch`, prints the job's number; returns sbatch's code and that."""
    # SLURM makes no folder for a log, and ends a job that cannot write its own without a word.
    job.log_folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["sbatch", "--parsable"], input=script(command, job), text=True, stdout=subprocess.PIPE
    )
    number = done.stdout.strip().split(";")[0]
    if done.returncode == 0:
        print(
            f"job {number}\n"
            f"  state: squeue --job={number}\n"
            f"  lines: tail -F {shlex.quote(str(job.log_folder))}/{number}-worker-0.log\n"
            f"  end:   scancel {number}",
            flush=True,
        )
    return done.returncode, number


def job_of_flags(
    name: str | None, workers: int, gpus_per_worker: int | None, max_restarts: int
) -> Job:
    """Returns the job that the flags ask for; `value_faults` must have found nothing."""
    cpus = _CPUS_PER_WORKER.value
    return Job(
        workers=workers,
        folder=Path.cwd(),
        **({} if name is None else {"name": name}),
        max_restarts=max_restarts,
        cpus_per_worker=None if cpus is None else int(cpus),
        gpus_per_worker=gpus_per_worker,
        partition=_PARTITION.value,
        account=_ACCOUNT.value,
        time_limit=_TIME_LIMIT.value,
    )


def value_faults(name: str | None, will_submit: bool) -> list[str]:
    """Returns one line for each flag of this module, or place, with which no job can be made."""
    found = []
    if name is not None and (name.isdecimal() or not re.fullmatch(NAME, name)):
        found.append(f"--name={name}: must be letters, digits, . - and _, and not a number")
    cpus, limit = _CPUS_PER_WORKER.value, _TIME_LIMIT.value
    if cpus is not None and not re.fullmatch(r"[1-9]\d*", cpus):
        found.append(f"--cpus_per_worker={cpus}: must be a whole number, 1 or more")
    for flag in (_PARTITION, _ACCOUNT):
        if flag.value is not None and not re.fullmatch(r"[\w.,@+-]+", flag.value):
            found.append(f"--{flag.name}={flag.value}: must be letters, digits and any of .,@+-_")
    if limit is not None and not _TIME.fullmatch(limit):
        found.append(f"--time_limit={limit}: must be minutes, hours:minutes:seconds or days-hours")
    if re.search(r"[%\s\"'\\]", str(Path.cwd())):
        found.append(f"--platform=slurm: blanks, quotes, % or \\ in the folder's name {Path.cwd()}")
    if will_submit and not os.access(Path.cwd(), os.W_OK):
        found.append(f"--platform=slurm: logs go to {Path.cwd()}, which cannot be written")
    if will_submit and shutil.which("sbatch") is None:
        found.append("--platform=slurm: there is no sbatch here; --dry_run prints the script")
    return found


def given_flags() -> list[str]:
    """Returns this module's flags that were given, for platforms that have no use for them."""
    return [f"--{flag.name}={flag.value}" for flag in _FLAGS if flag.value is not None]


def _options(job: Job) -> list[str]:
    given = {
        "--cpus-per-task": job.cpus_per_worker,
        "--gpus-per-task": job.gpus_per_worker,
        "--partition": job.partition,
        "--account": job.account,
        "--time": job.time_limit,
    }
    return [
        f"--job-name={job.name}",
        f"--ntasks={job.workers}",
        *(f"{name}={value}" for name, value in given.items() if value is not None),
        "--requeue",
        f"--signal=TERM@{SAVE_SECONDS}",
        "--open-mode=append",
        f"--chdir={job.folder}",
        f"--output={job.log_folder}/%j.log",
    ]


def _srun(job: Job) -> list[str]:
    # srun does not take --cpus-per-task over from sbatch.
    cpus = [f"--cpus-per-task={job.cpus_per_worker}"] if job.cpus_per_worker else []
    return [
        f"srun --ntasks={job.workers} --distribution=block",
        f"--kill-on-bad-exit=0 --wait={WAIT_SECONDS}",
        *cpus,
        f"--open-mode=append --output={job.log_folder}/%j-worker-%t.log",
    ]


_THREADS = """\
export TF_NUM_INTRAOP_THREADS={0} TF_NUM_INTEROP_THREADS={0} OMP_NUM_THREADS={0}
"""

# Not --kill-on-bad-exit: it sends TERM to the other workers when one fails, and their 143 would
# look like a preemption. --wait kills who still runs, long after it should have noticed itself.
_TEMPLATE = """\
#!/bin/bash
{options}

# When SLURM itself ends the job (scancel, requeue, preemption), this script gets TERM as well; near
# the time limit, and in the grace time of a preemption, only the workers. They save, and exit
# with 143.
slurm_ends_it=
trap 'slurm_ends_it=1' TERM

unset TF_CONFIG HOROVOD_RANK HOROVOD_SIZE  # of whatever submitted this
export TF_CPP_MIN_LOG_LEVEL="${{TF_CPP_MIN_LOG_LEVEL:-2}}"
{threads}
{srun}
code=$?  # the highest of the workers'

# With the same number it starts again, and goes on from the last checkpoint.
restarts="${{SLURM_RESTART_COUNT:-0}}"
preempted="$(scontrol show job "$SLURM_JOB_ID" | grep -o 'PreemptTime=[0-9].*')"
if [ "$slurm_ends_it" ] || [ "$preempted" ]; then
    echo "workers ended with code $code: SLURM ends the job"
elif [ "$code" -eq 143 ]; then
    echo "workers were told to stop, and have saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "$restarts" -lt {max_restarts} ]; then
    echo "workers ended with code $code, $restarts of {max_restarts} restarts: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
