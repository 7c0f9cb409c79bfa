"""A real SLURM of two nodes on this machine, of Debian's slurmctld, slurmd, slurm-client, munge.

Each daemon runs in the foreground as a child, with all its files in one folder and its own port:
nothing of the machine's own configuration is read or changed. A node is named by a loopback address
of its own, so that nodes resolve as on a cluster.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = "127.0.0.[2-3]"
_START_SECONDS = 60.0
# A job that is requeued waits until its old credential has expired (slurm.conf(5): 120
# seconds), and then for the scheduler (every 30 or 60 seconds).
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
SchedulerParameters=bf_interval=1,sched_interval=1
KillWait={kill_wait_seconds}
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[1]} CPUs=1 RealMemory=2000
NodeName=127.0.0.3 NodeHostname={host} NodeAddr=127.0.0.3 Port={ports[2]} CPUs=1 RealMemory=2000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=120 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=120 PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str:
    """Returns why no such cluster can run here; empty if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return (
            f"{', '.join(missing)} missing (Debian: slurmctld slurmd slurm-client munge, "
            "without their services)"
        )
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


@contextlib.contextmanager
def slurm_cluster(kill_wait_seconds: int) -> Iterator[Mapping[str, str]]:
    """Yields the environment in which `sbatch` and the others speak to a new cluster of two nodes.

    When the block ends, so do all jobs and daemons.

    Args:
      kill_wait_seconds: from TERM to KILL.

    Raises:
      RuntimeError: the nodes did not become idle; with the daemons' last lines.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm")))
        folder.chmod(0o755)  # munged is not root
        _configure(folder, kill_wait_seconds)
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        environment = ours | {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        _start_munged(stack, folder)
        for command in (("slurmctld", "-D"), *(("slurmd", "-D", "-N", n) for n in _nodes())):
            _start(stack, command, folder / "log", env=environment)
        _wait_until_idle(environment, folder / "log")
        stack.callback(_end_jobs, environment)
        yield environment


def slurm(environment: Mapping[str, str], *command: str, timeout_seconds: float = 60) -> str:
    """Returns what the client program printed; raises CalledProcessError if it failed."""
    done = subprocess.run(
        command,
        env=environment,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        timeout=timeout_seconds,
    )
    return done.stdout.strip()


def wait_for_end(environment: Mapping[str, str], job: str, seconds: float) -> dict[str, str]:
    """Returns `scontrol show job` as a dictionary once the job has ended for good.

    Raises:
      TimeoutError: it has not within `seconds`.
    """
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        shown = show_job(environment, job)
        if shown["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            return shown
        time.sleep(0.5)
    raise TimeoutError(f"job {job} after {seconds:g} seconds: {show_job(environment, job)}")


def show_job(environment: Mapping[str, str], job: str) -> dict[str, str]:
    """Returns `scontrol show job` as a dictionary."""
    words = slurm(environment, "scontrol", "--oneliner", "show", "job", job).split(" ")
    return dict(word.split("=", 1) for word in words if "=" in word)


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _nodes() -> list[str]:
    return [f"127.0.0.{number}" for number in (2, 3)]


def _configure(folder: Path, kill_wait_seconds: int) -> None:
    (folder / "state").mkdir()
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("", 0))) for _ in range(3)]
        ports = [each.getsockname()[1] for each in listening]
    text = _CONFIGURATION.format(
        folder=folder,
        host=socket.gethostname().split(".")[0],
        ports=ports,
        kill_wait_seconds=kill_wait_seconds,
    )
    (folder / "slurm.conf").write_text(text)


def _start_munged(stack: contextlib.ExitStack, folder: Path) -> None:
    munge = folder / "munge"
    munge.mkdir(mode=0o755)
    key = munge / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    for path in (munge, key):
        shutil.chown(path, "munge", "munge")
    files = {name: munge / name for name in ("key", "log", "pid", "seed")}
    flags = [f"--{name}-file={path}" for name, path in files.items()]
    command = ["munged", "--foreground", f"--socket={munge / 'socket'}", *flags]
    _start(stack, command, folder / "log", user="munge", group="munge", extra_groups=[])
    limit = time.monotonic() + _START_SECONDS
    while not (munge / "socket").exists():
        if time.monotonic() > limit:
            raise RuntimeError(f"munged: {(folder / 'log').read_text()}")
        time.sleep(0.05)


def _start(
    stack: contextlib.ExitStack, command: Sequence[str], log: Path, **options: object
) -> None:
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [shutil.which(command[0], path=_path()), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            **options,
        )

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)


def _wait_until_idle(environment: Mapping[str, str], log: Path) -> None:
    limit = time.monotonic() + _START_SECONDS
    while time.monotonic() < limit:
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            if slurm(environment, "sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(_nodes())):
                return
        time.sleep(0.2)
    raise RuntimeError("no idle nodes:\n" + log.read_text()[-4000:])


def _end_jobs(environment: Mapping[str, str]) -> None:
    """Kills all jobs, and returns when their processes are gone: slurmd's end would leave them."""
    slurm(environment, "scancel", "--user=root", "--full", "--signal=KILL")
    slurm(environment, "scancel", "--user=root")
    limit = time.monotonic() + 60
    while slurm(environment, "squeue", "-h", "-o", "%i") and time.monotonic() < limit:
        time.sleep(0.2)
