"""Programs side by side: each in a separate process, asked in turn, one at a time.

So PyTorch needs no place in the product's environment, no program's threads disturb another's,
and each has its own peak memory. A process that is not asked waits for a line and costs nothing.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tests.processes import children_of

Name = TypeVar("Name")
TORCH_PYTHON = Path(".venv-bench/bin/python")


class Program:
    """`python -m MODULE`, which answers requests by `answer_requests`."""

    def __init__(self, module: str, *arguments: str, python: str | Path = sys.executable):
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("BENCH_DEBUG") else None,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": "."},
        )
        self._name = f"{module} {' '.join(arguments)}"

    def ask(self, name: str, *arguments: Any) -> Any:
        """Returns what the program's function `name` returns."""
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)["answer"]
        raise RuntimeError(f"{self._name} ended with {self._process.wait()}; see BENCH_DEBUG=1")

    def close(self) -> None:
        """Ends the program."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def answer_requests(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answers `Program.ask`, in the program, until the other end closes."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps({"answer": functions[name](*arguments)}), flush=True)


def peak_megabytes() -> float:
    """Returns the largest resident set of this process so far, in MiB."""
    # Not getrusage, whose peak begins with that of the process that started this one.
    return status_megabytes("VmHWM")


def status_megabytes(field: str) -> float:
    """Returns a size of this process that Linux gives in /proc/self/status, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 1024


def descendants_megabytes(pid: int) -> float:
    """Returns the memory of the processes that a process started, and they started, in MiB.

    A page that several share counts once in all.
    """
    total = 0.0
    for child in children_of(pid):
        total += descendants_megabytes(child)
        with contextlib.suppress(OSError, TypeError):  # it has ended
            rollup = Path(f"/proc/{child}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)[1]) / 1024
    return total


def torch_is_there() -> bool:
    """Returns whether `make bench-venv` has been run."""
    if TORCH_PYTHON.exists():
        return True
    print(f"PyTorch is left out: {TORCH_PYTHON} is not there; `make bench-venv` makes it")
    return False


def in_turn(functions: Mapping[Name, Callable[[], float]], repeats: int) -> dict[Name, list[float]]:
    """Returns what each function gives, `repeats` times, taken in turn."""
    found: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            found[name].append(function())
    return found


def min_and_median(values: list[float], digits: int = 2) -> dict[str, float]:
    """Returns both, for a result."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
    }


def write_results(name: str, machine: Mapping[str, Any], results: Any) -> None:
    """Writes benchmarks/results/NAME.json."""
    out = Path("benchmarks/results") / f"{name}.json"
    out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Returns records with the same keys as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|" + "---|" * len(names))
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)
