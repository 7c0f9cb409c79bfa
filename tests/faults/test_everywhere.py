"""No fault at any operation of a write loses or mixes anything; and bad writes are found."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import everywhere, power_loss

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
REPOSITORY = everywhere.REPOSITORY

BAD_WRITES = """
import os, signal, sys, tempfile
from pathlib import Path
from tests.faults import everywhere

def read(folder):
    assert (text := (folder / "a").read_text()) in ("old", "new"), text
    return text

def put(folder, text, flush):
    with open(folder / "b", "w") as file:
        file.write(text)
        file.flush()
        if flush:
            os.fsync(file.fileno())
    os.rename(folder / "b", folder / "a")

class Bad:
    is_kept = True
    before = staticmethod(lambda folder: (folder / "a").write_text("old"))
    read = staticmethod(read)

class InPlace(Bad):
    write = staticmethod(lambda folder: (folder / "a").write_text("new"))

class NotFlushed(Bad):
    write = staticmethod(lambda folder: put(folder, "new", False))

class NameNotFlushed(Bad):
    write = staticmethod(lambda folder: put(folder, "new", True))

if code := everywhere.preloaded(sys.argv[1]):
    sys.exit(code[0])
signal.signal(signal.SIGALRM, everywhere._too_long)
for bad in (InPlace, NotFlushed, NameNotFlushed):
    with tempfile.TemporaryDirectory() as folder:
        _, writing = everywhere.enumerate_write(bad.__name__, bad, Path(folder, "a"), None)
        print(*writing.problems, sep="\\n")
"""


def run(module: str, *flags: str, seconds: float = 500) -> str:
    """Returns what a program of this folder prints; AssertionError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *flags],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_bad_writes_are_found(tmp_path: Path) -> None:
    (tmp_path / "bad_writes.py").write_text(BAD_WRITES)
    path = f"{REPOSITORY}:{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-m", "bad_writes", "bad_writes"],
        cwd=REPOSITORY, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for expected in (
        "InPlace: operation 2, write /a, killed before: AssertionError",
        "NotFlushed: power lost after 4, all names, no bytes: AssertionError",
        "NameNotFlushed: power lost after 5, nothing that was not flushed: found old",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)


def test_some_operations_of_some_writes() -> None:
    names = ("checkpoint, one more", "encoder bundle, replaced", "metrics.jsonl, a line")
    said = run("everywhere", "--operations=3", *(f"--only={name}" for name in names))
    assert said.count(" operations, ") == 3


@pytest.mark.slow("every fault of every write, for minutes; quick: a few of each kind of fault")
@pytest.mark.timeout(7200)
def test_every_operation_of_every_write() -> None:
    run("everywhere", seconds=7200)


def test_the_documentation_counts_every_write() -> None:
    from tests.faults.writes import WRITES

    text = everywhere.DOCUMENT.read_text()
    rows = text[text.index(everywhere.BEGIN) : text.index(everywhere.END)].splitlines()[3:-1]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*WRITES]


@pytest.mark.slow("every write on disks that are too small by a page more; quick: a few faults")
def test_a_disk_that_fills_in_the_middle_of_each_write() -> None:
    run("full_disk", seconds=1800)


@pytest.mark.slow(
    "interleavings of two masters, minutes; quick: test_checkpoint.py and test_run_lock.py"
)
def test_no_interleaving_loses_or_mixes_a_step() -> None:
    assert "kills inside a save" in run("protocol", "--examples=100", seconds=3600)


def test_a_disk_after_a_power_failure(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    disk = power_loss.Disk(tmp_path)

    def do(kind: str, path: str, other: str = "", data: bytes = b"") -> None:
        other = f"{tmp_path}/{other}" if kind == "rename" else other
        disk.do(power_loss.Operation(0, kind, 0, f"{tmp_path}/{path}".rstrip("/"), other, 0, data))

    do("create", "b")
    do("write", "b", data=b"new!")
    do("rename", "b", "a")
    assert disk.seen() == {"a": b"new!"}
    found = dict(disk.after_power_loss())
    assert found["nothing that was not flushed"] == {"a": b"old"}
    assert found["all names, no bytes"] == {"a": b""}
    assert found["all names, half of the bytes"] == {"a": b"ne"}
    do("fsync", "a")
    found = dict(disk.after_power_loss())
    assert found["nothing that was not flushed"] == {"a": b"old"}
    assert found["all names, no bytes"] == {"a": b"new!"}
    do("fsync", "")
    assert {power_loss.digest(tree) for _, tree in disk.after_power_loss()} == {
        power_loss.digest({"a": b"new!"})
    }
