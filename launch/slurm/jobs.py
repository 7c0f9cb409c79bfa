"""SLURM's jobs by name or number, for `launch status|logs|cancel` and --follow."""

import re
import subprocess
import sys
from pathlib import Path

from launch import log_files

_ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY",
    "DEADLINE", "BOOT_FAIL", "PREEMPTED",
)  # fmt: skip
_SACCT = ("JobID", "JobName", "State", "ExitCode", "Elapsed", "NodeList", "WorkDir")
Shown = dict[str, str]


def status(name: str) -> int:
    """Prints the state of the jobs of that name that have not ended, else of the last that has.

    Returns 1 if SLURM knows no such job, else 0.
    """
    jobs = _jobs(name)
    for job in jobs:
        why = f" ({job['Reason']})" if job["JobState"] == "PENDING" else ""
        print(f"{job['JobId']} {job['JobName']}: {job['JobState']}{why}")
        if "Restarts" in job:
            print(f"  restarts: {job['Restarts']}")
        print(f"  run time: {job['RunTime']}")
        print(f"  nodes:    {job['NodeList']}")
        if job["JobState"] in _ENDED:
            print(f"  code:     {_exit_code(job)}")
        print(f"  lines:    {_log(job)}")
    return 0 if jobs else _no_such_job(name)


def logs(name: str, should_follow: bool) -> int:
    """Prints worker 0's log, with `should_follow` until the job has ended for good."""
    jobs = _jobs(name)
    if len(jobs) != 1:
        return _not_one(name, jobs)
    if should_follow:
        return follow(jobs[0]["JobId"])
    if not _log(jobs[0]).exists():
        print(f"launch: there is no {_log(jobs[0])} yet", file=sys.stderr)
        return 1
    log_files.print_file(_log(jobs[0]))
    return 0


def cancel(name: str) -> int:
    """Ends the job, whose workers save their state first."""
    jobs = [job for job in _jobs(name) if job["JobState"] not in _ENDED]
    if len(jobs) != 1:
        return _not_one(name, jobs)
    number = jobs[0]["JobId"]
    code = subprocess.run(["scancel", number]).returncode
    if code == 0:
        print(f"job {number}: its workers save their state and stop")
    return code


def follow(number: str, quietly: bool = False) -> int:
    """Prints worker 0's log, unless `quietly`, until the job has ended for good.

    Then prints the path of the report, which is on the file system that the nodes share.

    Returns:
        The job's exit code, 128 + n for signal n.
    """
    found = _show(number)
    if found is None:
        return _no_such_job(number)
    job = found

    def is_over() -> bool:
        nonlocal job
        job = _show(number) or job
        return job["JobState"] in _ENDED

    log_files.print_file(Path("/dev/null") if quietly else _log(job), is_over)
    code = _exit_code(job)
    print(f"launch: job {number} {job['JobState']}, code {code}", file=sys.stderr)
    if code == 0 and (report := _report(job)):
        print(f"launch: report: {report}", file=sys.stderr)
    return code


def _jobs(name: str) -> list[Shown]:
    """Returns the jobs of that name or number that have not ended, else the last that has."""
    if name.isdecimal():
        numbers = [name]
    else:
        # squeue knows an ended job for MinJobAge (five minutes), sacct forever.
        command = ["squeue", "--me", "--noheader", "--states=all", "--format=%A", f"--name={name}"]
        numbers = sorted(_lines(command), key=int)
    shown = [job for job in map(_show, numbers) if job]
    living = [job for job in shown if job["JobState"] not in _ENDED]
    return living or shown[-1:] or _accounted(name)


def _show(number: str) -> Shown | None:
    """Returns `scontrol show job`; None if SLURM has forgotten the job."""
    text = "\n".join(_lines(["scontrol", "--oneliner", "show", "job", number]))
    return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", text)) or None


def _accounted(name: str) -> list[Shown]:
    """Returns the last job of that name or number in the accounting, if the cluster has one."""
    chosen = f"--jobs={name}" if name.isdecimal() else f"--name={name}"
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--starttime=now-365days"]
    found = _lines([*command, f"--format={','.join(_SACCT)}", chosen])
    if not found:
        return []
    number, job_name, state, code, elapsed, nodes, folder = found[-1].split("|")
    return [
        {
            "JobId": number,
            "JobName": job_name,
            "JobState": state.split(" ")[0],  # CANCELLED by 1000
            "ExitCode": code,
            "RunTime": elapsed,
            "NodeList": nodes,
            "StdOut": f"{folder}/slurm-logs/{number}.log",
            "WorkDir": folder,
        }
    ]


def _lines(command: list[str]) -> list[str]:
    """Returns the lines that a client program printed; none if it failed or is not installed."""
    try:
        return subprocess.run(command, text=True, capture_output=True).stdout.splitlines()
    except FileNotFoundError:
        return []


def _log(job: Shown) -> Path:
    """Returns the file of worker 0."""
    return Path(job["StdOut"].removesuffix(".log") + "-worker-0.log")


def _report(job: Shown) -> Path | None:
    """Returns report.json beside the report that worker 0 named last."""
    log = _log(job)
    text = log.read_text(errors="replace") if log.exists() else ""
    named = re.findall(r"^report: (.+)$", text, re.MULTILINE)
    return Path(job["WorkDir"], named[-1]).with_name("report.json") if named else None


def _exit_code(job: Shown) -> int:
    code, _, signal = job["ExitCode"].partition(":")
    if int(signal or 0):
        return 128 + int(signal)
    return int(code) or int(job["JobState"] in _ENDED and job["JobState"] != "COMPLETED")


def _not_one(name: str, jobs: list[Shown]) -> int:
    if not jobs:
        return _no_such_job(name)
    numbers = ", ".join(job["JobId"] for job in jobs)
    print(f"launch: {len(jobs)} jobs are named {name}; say which: {numbers}", file=sys.stderr)
    return 1


def _no_such_job(name: str) -> int:
    print(
        f"launch: SLURM has no job {name} of yours: neither in its queue, nor in the last minutes, "
        "nor in its accounting (which may be off)",
        file=sys.stderr,
    )
    return 1
