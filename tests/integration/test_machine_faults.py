"""What a machine does to a run: its memory ends, its disk becomes read-only, its clock jumps."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import forked
from tests.integration.jobs import Job
from tests.integration.programs import ENVIRONMENT, REPOSITORY, command, metrics, train
from tests.processes import ended

pytestmark = pytest.mark.slow("a run for each; quick: tests/faults, where a write fails alone")

FLAGS = ("--stage=pretrain", "--pretrain_steps=120", "--checkpoint_every_steps=4")
CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def running(*flags: str, **variables: str) -> Iterator[Job]:
    """Yields a run of one worker, which is ended if it still runs."""
    # A preloaded library needs a start by exec.
    start = subprocess.Popen if "LD_PRELOAD" in variables else forked.Popen
    process = start(
        command(1, *flags),
        cwd=REPOSITORY,
        env=ENVIRONMENT | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with ended(process, 400):
        yield Job(process)


@pytest.fixture(scope="module")
def flags(small_store: Path) -> tuple[str, ...]:
    return (*FLAGS, f"--store={small_store}")


@pytest.fixture(scope="module")
def whole(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    train(1, *flags, f"--run_dir={folder}")
    return folder


def assert_same(whole: Path, disturbed: Path) -> None:
    """Compares every loss and the bundles."""
    assert metrics(whole) == metrics(disturbed)
    for name in ("encoder", "decoder"):
        bundles = [f / name / f"{name}.safetensors" for f in (whole, disturbed)]
        assert bundles[0].read_bytes() == bundles[1].read_bytes(), name


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """Yields a new control group in which the memory can be bounded."""
    parent = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    group = parent / f"warmstate-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.max" if parent == CGROUPS else "memory.limit_in_bytes")
        limit.write_text(str(64 << 20))  # of what comes, not of what a process brings
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"control groups of memory cannot be made here: {error}")
    yield group
    limit_of_wait = time.monotonic() + 30
    while (group / "cgroup.procs").read_text() and time.monotonic() < limit_of_wait:
        time.sleep(0.05)
    group.rmdir()


def kills_in(group: Path) -> int:
    """Returns how many processes of the group the kernel has killed."""
    files = [group / "memory.events", group / "memory.oom_control"]
    lines = next(f.read_text() for f in files if f.exists()).splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def test_a_run_that_the_kernel_kills_for_its_memory_resumes(
    flags: tuple[str, ...], whole: Path, memory_group: Path, tmp_path: Path
) -> None:
    run = (*flags, f"--run_dir={tmp_path}/run")
    with running(*run) as job:
        job.wait_for("pretrain step 9/")
        (memory_group / "cgroup.procs").write_text(str(job.process.pid))
        # Another program of the group takes all that there is; the kernel kills the largest.
        takes_all = f"echo $$ > {memory_group}/cgroup.procs; exec tail /dev/zero"
        other = subprocess.Popen(["sh", "-c", takes_all])
        assert job.finish() == -signal.SIGKILL, job.lines
        other.kill()
        other.wait()
    assert kills_in(memory_group) >= 1
    train(1, *run)
    assert_same(whole, tmp_path / "run")


def test_a_run_with_too_many_open_files_exits_with_75_and_resumes(
    flags: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    run = (*flags, f"--run_dir={tmp_path}/run")
    with running(*run) as job:
        job.wait_for("pretrain step 9/")
        psutil.Process(job.process.pid).rlimit(psutil.RLIMIT_NOFILE, (3, 3))
        assert job.finish() == 75, job.lines
    assert any(line.startswith("error: ") and "Too many open files" in line for line in job.lines)
    train(1, *run)
    assert_same(whole, tmp_path / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yields the folder of a small disk with a file system."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    if not (make := shutil.which("mkfs.ext4") or shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")):
        pytest.skip("needs the program mkfs.ext4 (Debian: e2fsprogs)")
    with image.open("wb") as file:
        file.truncate(64 << 20)
    folder.mkdir()
    subprocess.run([make, "-q", image], check=True)
    done = mount(image, folder)
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def mount(image: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Mounts the file system in a file."""
    return subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True)


def test_a_disk_that_becomes_read_only_stops_a_run_which_resumes(
    flags: tuple[str, ...], whole: Path, disk: Path
) -> None:
    run = (*flags, f"--run_dir={disk}/run")
    with running(*run) as job:
        job.wait_for("pretrain step 9/")
        # What ext4 does when its disk fails: nothing that is not on it yet will be.
        subprocess.run(["mount", "-o", "remount,abort", disk], check=True)
        assert job.finish() == 2, job.lines
    said = [line for line in job.lines if line.startswith("error: ")]
    assert len(said) == 1 and "cannot be written" in said[0], job.lines
    assert not any("Traceback" in line for line in job.lines)
    subprocess.run(["umount", disk], check=True)
    assert not mount(disk.parent / "image", disk).returncode
    train(1, *run)
    assert_same(whole, disk / "run")


def test_a_clock_that_jumps_changes_nothing(
    flags: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler")
    library, clock = tmp_path / "clock.so", tmp_path / "clock"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-Werror", "-o", library, source, "-ldl"], check=True
    )
    clock.write_text("0")
    run = (*flags, f"--run_dir={tmp_path}/run", "--stall_seconds=300")
    preloaded = {"LD_PRELOAD": str(library), "WARMSTATE_TEST_CLOCK": str(clock)}
    jumps = {9: -3600, 30: 400 * 24 * 3600, 60: 0}
    with running(*run, **preloaded) as job:
        for step, seconds in jumps.items():
            job.wait_for(f"pretrain step {step}/")
            clock.write_text(str(seconds))
        assert job.finish() == 0, job.lines
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["unix_time"] for line in lines]
    assert max(times) - min(times) > 300 * 24 * 3600  # it did jump
    assert_same(whole, tmp_path / "run")
    page = [sys.executable, "-m", "trainer.report_page.html", str(tmp_path / "run")]
    assert not forked.run(page, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True).returncode
