"""A batch script for SLURM: one task for each worker, requeued until the job is done.

The trainer finds its peers by the variables that `srun` sets (trainer/distribution/cluster.py).
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.flag_fields import flag
from launch.platform import NAME, ClusterOptions

SAVE_SECONDS = 60  # TERM comes so long before the time limit; SLURM may be 60 seconds earlier
# From the first worker's end to KILL for the others; above the collective timeout.
WAIT_SECONDS = 120
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}", re.ASCII)  # sbatch(1), --time


@dataclass(frozen=True)
class SlurmOptions(ClusterOptions):
    """Flags of --platform=slurm; SLURM decides what is not given."""

    # fmt: off
    cpus_per_worker: int | None = flag("SLURM", None, "Number of cores for each worker.",
        at_least=1)
    partition: str | None = flag("SLURM", None, "Partition to submit to.")
    account: str | None = flag("SLURM", None, "Account to charge.")
    time_limit: str | None = flag("SLURM", None, "Time limit of one sitting: minutes, "
        "hours:minutes:seconds or days-hours. A job that needs longer goes back into the queue.")
    # fmt: on


def log_folder(folder: Path) -> Path:
    """Returns the folder of <job>.log and <job>-worker-<rank>.log."""
    return folder / "slurm-logs"


def script(command: Sequence[str], options: SlurmOptions, folder: Path) -> str:
    """Returns the batch script that runs `command` in `folder`, one task a worker."""
    cpus = options.cpus_per_worker
    return _TEMPLATE.format(
        options="\n".join(f"#SBATCH {option}" for option in _sbatch_options(options, folder)),
        threads=_THREADS.format(cpus) if cpus else "",
        srun=" \\\n    ".join([*_srun(options, folder), shlex.join(command)]),
        max_restarts=options.max_restarts or 0,
    )


def submit(command: Sequence[str], options: SlurmOptions) -> tuple[int, str]:
    """Submits the script with `sbatch`, and prints how to follow it.

    Returns:
        The exit code of sbatch, and the job's number.
    """
    here = Path.cwd()
    # SLURM makes no folder for a log, and silently ends a job that cannot write its own.
    log_folder(here).mkdir(exist_ok=True)
    text = script(command, options, here)
    done = subprocess.run(["sbatch", "--parsable"], input=text, text=True, stdout=subprocess.PIPE)
    number = done.stdout.strip().split(";")[0]
    if done.returncode == 0:
        print(
            f"job {number}\n"
            f"  state: squeue --job={number}\n"
            f"  lines: tail -F {shlex.quote(str(log_folder(here)))}/{number}-worker-0.log\n"
            f"  end:   scancel {number}",
            flush=True,
        )
    return done.returncode, number


def faults(options: SlurmOptions) -> list[str]:
    """Returns one line for each reason why the job cannot be submitted."""
    found, here = [], Path.cwd()
    name, limit = options.name, options.time_limit
    if name is not None and (name.isdecimal() or not re.fullmatch(NAME, name)):
        found.append(f"--name={name}: must be letters, digits, . - and _, and not a number")
    for flag_name in ("partition", "account"):
        value = getattr(options, flag_name)
        if value is not None and not re.fullmatch(r"[\w.,@+-]+", value, re.ASCII):
            found.append(f"--{flag_name}={value}: must be letters, digits and any of .,@+-_")
    if limit is not None and not _TIME.fullmatch(limit):
        found.append(f"--time_limit={limit}: must be minutes, hours:minutes:seconds or days-hours")
    if options.with_horovod:
        found.append(
            "--distributor=horovod: needs --platform=local or --platform=k8s; on SLURM use auto, "
            "or horovodrun in an allocation"
        )
    if re.search(r"[%\s\"'\\]", str(here)):
        found.append(f"--platform=slurm: blanks, quotes, % or \\ in the folder's name {here}")
    if not options.dry_run and not os.access(here, os.W_OK):
        found.append(f"--platform=slurm: logs go to {here}, which cannot be written")
    if not options.dry_run and shutil.which("sbatch") is None:
        found.append("--platform=slurm: there is no sbatch here; --dry_run prints the script")
    return found


def _sbatch_options(options: SlurmOptions, folder: Path) -> list[str]:
    given = {
        "--cpus-per-task": options.cpus_per_worker,
        "--gpus-per-task": options.gpus_per_worker,
        "--partition": options.partition,
        "--account": options.account,
        "--time": options.time_limit,
    }
    return [
        f"--job-name={options.name or 'warmstate'}",
        f"--ntasks={options.workers or 1}",
        *(f"{name}={value}" for name, value in given.items() if value is not None),
        "--requeue",
        f"--signal=TERM@{SAVE_SECONDS}",
        "--open-mode=append",
        f"--chdir={folder}",
        f"--output={log_folder(folder)}/%j.log",
    ]


def _srun(options: SlurmOptions, folder: Path) -> list[str]:
    # srun does not inherit --cpus-per-task from sbatch.
    cpus = [f"--cpus-per-task={options.cpus_per_worker}"] if options.cpus_per_worker else []
    output = shlex.quote(f"--output={log_folder(folder)}/%j-worker-%t.log")  # bash reads this line
    return [
        f"srun --ntasks={options.workers or 1} --distribution=block",
        f"--kill-on-bad-exit=0 --wait={WAIT_SECONDS}",
        *cpus,
        f"--open-mode=append {output}",
    ]


_THREADS = """\
export TF_NUM_INTRAOP_THREADS={0} TF_NUM_INTEROP_THREADS={0} OMP_NUM_THREADS={0}
"""

# Without --kill-on-bad-exit=0, SLURM sends TERM to the other workers when one fails, and their 143
# would look like a preemption. --wait kills workers that have not noticed the loss for long.
_TEMPLATE = """\
#!/bin/bash
{options}

# If SLURM ends the job (scancel, requeue, preemption), this script gets TERM too. Near the time
# limit, and in the grace time of a preemption, only the workers do: they save, and exit with 143.
slurm_ends_it=
trap 'slurm_ends_it=1' TERM

unset TF_CONFIG HOROVOD_RANK HOROVOD_SIZE  # of the submitting environment
{threads}
{srun}
code=$?  # the highest of the workers'

# A requeued job keeps its number, and the trainer resumes from its last checkpoint.
restarts="${{SLURM_RESTART_COUNT:-0}}"
preempted="$(scontrol show job "$SLURM_JOB_ID" | grep -o 'PreemptTime=[0-9].*')"
if [ "$slurm_ends_it" ] || [ "$preempted" ]; then
    echo "workers ended with code $code: SLURM ends the job"
elif [ "$code" -eq 143 ]; then
    echo "workers were told to stop and have saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "$restarts" -lt {max_restarts} ]; then
    echo "workers ended with code $code, $restarts of {max_restarts} restarts: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
