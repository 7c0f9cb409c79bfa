"""Fails and kills every write at every operation: nothing may be lost, mixed or left behind.

    python -m tests.faults.everywhere            all of it, in minutes
    python -m tests.faults.everywhere --write    and the table of docs/faults.md
    python -m tests.faults.everywhere --only=report.json --operations=3

A write runs in a forked process, in which injector.c counts the operations that change files. For
each operation, and each way in which it can fail, the write runs once more. Afterwards, in another
process:

- What is read is the old content or the new one; the new one if the write said that it is done.
- The same write again succeeds, and leaves the files that it leaves undisturbed, and no others.

A power failure after each operation is simulated from the log of the undisturbed write.
"""

import argparse
import ctypes
import dataclasses
import errno
import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults import power_loss

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "faults.md"
BEGIN, END = "<!-- everywhere: begin -->\n", "<!-- everywhere: end -->\n"
SOURCE = Path(__file__).with_name("injector.c")
SECONDS = 60.0  # at most, for one forked process

FAIL, SHORT, FULL, KILL_BEFORE, KILL_AFTER, TEAR = range(1, 7)  # as in injector.c


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at an operation. `is_survived`: the write must succeed all the same."""

    name: str
    action: int
    errno: int = 0
    is_survived: bool = False

    @property
    def is_kill(self) -> bool:
        return self.action in (KILL_BEFORE, KILL_AFTER, TEAR)


NO_SPACE = Fault("no space", FAIL, errno.ENOSPC)
FULL_DISK = Fault("disk full from here on", FULL)
IO_ERROR = Fault("I/O error", FAIL, errno.EIO)
INTERRUPTED = Fault("interrupted", FAIL, errno.EINTR, is_survived=True)
REFUSED = Fault("not supported", FAIL, errno.EINVAL, is_survived=True)
SHORT_WRITE = Fault("short write", SHORT, is_survived=True)
BEFORE, AFTER = Fault("killed before", KILL_BEFORE), Fault("killed after", KILL_AFTER)
TORN = Fault("killed inside", TEAR)

FAULTS = {
    "create": (NO_SPACE, FULL_DISK, IO_ERROR, INTERRUPTED, BEFORE),
    "open": (IO_ERROR, INTERRUPTED, BEFORE),
    "write": (NO_SPACE, FULL_DISK, IO_ERROR, INTERRUPTED, SHORT_WRITE, BEFORE, TORN),
    "fsync": (NO_SPACE, IO_ERROR, INTERRUPTED, BEFORE, AFTER),
    "rename": (NO_SPACE, IO_ERROR, BEFORE, AFTER),
    "exchange": (NO_SPACE, IO_ERROR, REFUSED, BEFORE, AFTER),
    "mkdir": (NO_SPACE, FULL_DISK, IO_ERROR, BEFORE),
    "unlink": (IO_ERROR, BEFORE),
    "rmdir": (IO_ERROR, BEFORE),
    "truncate": (IO_ERROR, INTERRUPTED, BEFORE),
    "close": (IO_ERROR, BEFORE),
    "link": (NO_SPACE, IO_ERROR, BEFORE, AFTER),
}


def faults_of(operation: power_loss.Operation) -> tuple[Fault, ...]:
    """Returns the ways in which it can fail."""
    is_folder = operation.kind == "fsync" and Path(operation.path).is_dir()
    return (*FAULTS[operation.kind], *((REFUSED,) if is_folder else ()))


def build(folder: Path) -> Path:
    """Compiles injector.c; returns the library."""
    library = folder / "injector.so"
    command = ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


def preloaded(module: str) -> list[int]:
    """Runs this program once more, with injector.c preloaded.

    Returns:
        [exit code]; [] if this is the second run.
    """
    if hasattr(ctypes.CDLL(None), "fault_arm"):
        gc.disable()  # a forked process would copy what the collector visits
        return []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LD_PRELOAD": str(build(Path(folder)))}
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        return [subprocess.run(command, env=environment).returncode]


def in_child(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Runs a function in a forked process.

    Returns:
        `value` that it returned, or `error` that it raised and its `kind`; nothing if it was
        killed.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        found: dict[str, Any] = {}
        try:
            found = {"value": function(*arguments)}
        except BaseException as error:
            kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ != "__main__")
            kind = "OSError" if isinstance(error, OSError) else kind
            found = {"error": traceback.format_exc(), "kind": kind}
        finally:
            getattr(ctypes.CDLL(None), "fault_disarm", lambda: 0)()
            with os.fdopen(writer, "w") as pipe:
                json.dump(found, pipe)
            os._exit(0)
    os.close(writer)
    signal.alarm(int(SECONDS))
    try:
        text = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        text = b'{"error": "it hangs", "kind": "hang"}'
    finally:
        signal.alarm(0)
        os.close(reader)
        os.waitpid(pid, 0)
    return json.loads(text) if text else {}


def _too_long(*_: Any) -> None:
    raise TimeoutError


class Writing:
    """One kind of write, in `folder`, from the same beginning each time.

    Attributes:
        operations: Of the undisturbed write.
        problems: What was found.
    """

    def __init__(self, name: str, write: Any, folder: Path):
        self._name, self._write = name, write
        self._template, self.work = folder / "template", folder / "work"
        self.problems: list[str] = []
        self._checked: set[tuple[str, bool]] = set()
        self._template.mkdir(parents=True)
        self._done(in_child(write.before, self._template))
        self.reset()
        self._old = self._read()
        self.reset()
        log = folder / "log"
        self._done(in_child(self._armed, 0, 0, 0, str(log)))
        self.operations = power_loss.read_log(log)
        disk = power_loss.Disk(self._template)
        disk.rebase(self.work)
        for operation in self.operations:
            disk.do(operation)
        if disk.seen() != power_loss.read(self.work):
            raise RuntimeError(f"{name}: injector.c does not see all that changes the files")
        self._new = self._read()
        self._done(in_child(write.write, self.work))
        self._left = self._names()

    def reset(self) -> None:
        """Makes the beginning again."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self._template, self.work, symlinks=True)

    def _names(self) -> list[str]:
        return sorted(str(path.relative_to(self.work)) for path in self.work.rglob("*"))

    def _armed(self, at: int, action: int, number: int, log: str) -> None:
        library = ctypes.CDLL(None)
        library.fault_arm(os.fsencode(self.work), log.encode(), at, action, number)
        self._write.write(self.work)
        library.fault_disarm()

    def _done(self, found: dict[str, Any]) -> str:
        if "value" not in found:
            raise RuntimeError(f"{self._name}: {found.get('error', 'killed')}")
        return str(found["value"])

    def _read(self) -> str:
        return self._done(in_child(self._write.read, self.work))

    def inject(self, number: int, fault: Fault) -> None:
        """Runs the write once with a fault at an operation, and notes what is wrong then."""
        self.reset()
        found = in_child(self._armed, number, fault.action, fault.errno, "")
        operation = self.operations[number - 1]
        where = f"{operation.kind} {operation.path.removeprefix(str(self.work))}"
        where = f"{self._name}: operation {number}, {where}, {fault.name}"
        if fault.is_kill and found:
            self.problems.append(f"{where}: was not killed: {found}")
        if fault.is_survived and "value" not in found:
            self.problems.append(f"{where}: {found.get('error', 'died')}")
        if found.get("kind", "InputError") not in ("InputError", "OSError"):
            self.problems.append(f"{where}: {found['error']}")
        self._check(where, must_be_new="value" in found)

    def lose_power(self) -> int:
        """Checks all that a disk may hold after a power failure; returns their number."""
        disk = power_loss.Disk(self._template)
        disk.rebase(self.work)
        seen: set[str] = set()
        for number in range(len(self.operations) + 1):
            if number:
                disk.do(self.operations[number - 1])
            is_done = number == len(self.operations) and self._write.is_kept
            for name, tree in disk.after_power_loss():
                seen.add(power_loss.digest(tree))
                shutil.rmtree(self.work)
                power_loss.write(tree, self.work)
                self._check(f"{self._name}: power lost after {number}, {name}", is_done)
        return len(seen)

    def _check(self, where: str, must_be_new: bool) -> None:
        """Notes what is wrong now, unless the same files were there before."""
        state = (power_loss.digest(power_loss.read(self.work)), must_be_new)
        if state in self._checked:
            return
        self._checked.add(state)
        try:
            first, again = json.loads(self._done(in_child(self._read_and_repeat)))
        except RuntimeError as error:
            self.problems.append(f"{where}: {str(error).splitlines()[-1]}")
            return
        if first not in ([self._new] if must_be_new else [self._old, self._new]):
            self.problems.append(f"{where}: found {first:.200}")
        if again != self._new:
            self.problems.append(f"{where}: then found {again:.200}")
        if self._names() != self._left:
            more = {*self._names()} ^ {*self._left}
            self.problems.append(f"{where}: other files are left: {sorted(more)}")

    def _read_and_repeat(self) -> str:
        found = [self._write.read(self.work)]
        self._write.write(self.work)
        return json.dumps([*found, self._write.read(self.work)])


def enumerate_write(name: str, write: Any, folder: Path, chosen: int | None) -> tuple[list, Any]:
    """Returns a row of the table, [name, operations, faults, power failures], and the Writing.

    Args:
        chosen: Only one operation of so many; None for all.
    """
    writing = Writing(name, write, folder)
    operations = writing.operations
    faults = 0
    for number in range(1, len(operations) + 1):
        if chosen and number % max(1, len(operations) // chosen):
            continue
        writing.reset()
        for fault in faults_of(operations[number - 1]):
            writing.inject(number, fault)
            faults += 1
    return [name, len(operations), faults, 0 if chosen else writing.lose_power()], writing


def table(rows: list[list]) -> str:
    """Returns the table of docs/faults.md."""
    total = ["all", *(sum(row[i] for row in rows) for i in (1, 2, 3))]
    lines = ["| write | operations | faults | power failures |", "|---|---:|---:|---:|"]
    lines += [f"| {n} | {o:,} | {f:,} | {p:,} |" for n, o, f, p in [*rows, total]]
    return "\n".join(lines) + "\n"


def write_rows(rows: list[list]) -> None:
    """Writes these rows into the table of docs/faults.md, in place of those of the same writes."""
    from tests.faults.writes import WRITES

    with DOCUMENT.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        lines = [line.strip("| ").split(" | ") for line in text[start:end].splitlines()[2:-1]]
        held = {n: [n, *(int(number.replace(",", "")) for number in rest)] for n, *rest in lines}
        held |= {row[0]: row for row in rows}
        ordered = [held[name] for name in WRITES if name in held]
        file.seek(0)
        file.write(text[:start] + table(ordered) + text[end:])
        file.truncate()


def rows_of(only: list[str], chosen: int | None) -> Iterator[tuple[list, list[str], float]]:
    """Yields for each kind of write its row, its problems, and the seconds that it took."""
    from tests.faults.writes import WRITES

    with tempfile.TemporaryDirectory() as folder:
        for number, (name, write) in enumerate(WRITES.items()):
            if only and name not in only:
                continue
            began = time.monotonic()
            row, writing = enumerate_write(name, write, Path(folder, str(number)), chosen)
            yield row, writing.problems, time.monotonic() - began


def main() -> int:
    """Returns the exit code: 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="a kind of write")
    parser.add_argument("--operations", type=int, help="of each kind, about so many; no power loss")
    parser.add_argument("--write", action="store_true", help="the table into docs/faults.md")
    options = parser.parse_args()
    if code := preloaded("tests.faults.everywhere"):
        return code[0]
    signal.signal(signal.SIGALRM, _too_long)
    rows, problems = [], 0
    for row, found, seconds in rows_of(options.only, options.operations):
        rows.append(row)
        problems += len(found)
        if options.write:
            write_rows([row])
        print(f"{row[0]}: {row[1]} operations, {row[2]} faults, {row[3]} power failures, "
              f"{seconds:.0f} s", *found[:9], sep="\n  ", flush=True)  # fmt: skip
    print(table(rows))
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
