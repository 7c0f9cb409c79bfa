"""Where the suite's time goes: measured by a pytest plugin, and the table in CONTRIBUTING.md.

    python -m pytest -p tests.timing --timing=build/timing.json      (what `make timing` runs)
    python -m tests.timing build/timing.json

Seconds of CPU depend less on what else the machine does than seconds of the clock do.
"""

import argparse
import ast
import collections
import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
TESTS = Path(__file__).resolve().parent
SECTION = r"(<!-- {0} -->\n).*?(?=<!-- /{0} -->)"
KINDS = ("seconds", "cpu_seconds", "processes", "builds", "graphs")


class Counters:
    """What one process has started and traced so far."""

    def __init__(self) -> None:
        self.processes = self.builds = self.graphs = 0
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("subprocess.Popen", "os.posix_spawn"):
            self.processes += 1
            self.builds += "g++" in os.path.basename(str(arguments[0]))
        elif event in ("os.fork", "os.forkpty"):
            self.processes += 1

    def count_graphs(self) -> None:
        """Counts the graphs that are traced from here on."""
        from tensorflow.python.framework import func_graph

        trace = func_graph.func_graph_from_py_func

        @functools.wraps(trace)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.graphs += 1
            return trace(*arguments, **named)

        func_graph.func_graph_from_py_func = counted

    def now(self) -> dict[str, float]:
        """Returns the counts, and the seconds of this process and of those that it waited for."""
        times = os.times()
        cpu = times.user + times.system + times.children_user + times.children_system
        cpu += forked.Popen.cpu_seconds
        counts = (time.perf_counter(), cpu, self.processes, self.builds, self.graphs)
        return dict(zip(KINDS, counts, strict=True))


class Timing:
    """The plugin: a worker of xdist sends each test's figures with its report."""

    def __init__(self, path: Path, is_worker: bool) -> None:
        self.path, self.is_worker = path, is_worker
        self.counters = Counters()
        self.tests: dict[str, dict[str, float]] = {}
        self.started = time.perf_counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if "tensorflow.python" in sys.modules and not hasattr(self, "graphs_are_counted"):
            self.counters.count_graphs()
            self.graphs_are_counted = True
        self.before = self.counters.now()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if call.when == "teardown":
            now = self.counters.now()
            spent = {kind: round(now[kind] - self.before[kind], 3) for kind in KINDS}
            report.user_properties.append(("timing", spent))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.tests[report.nodeid] = dict(report.user_properties)["timing"]

    def pytest_sessionfinish(self) -> None:
        if not self.is_worker:
            elapsed = round(time.perf_counter() - self.started, 1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(
                json.dumps({"elapsed_seconds": elapsed, "tests": self.tests}, indent=0)
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --timing."""
    parser.addoption("--timing", type=Path, metavar="FILE", help="write each test's costs there")


def pytest_configure(config: pytest.Config) -> None:
    """Starts to count, if --timing is given."""
    if path := config.getoption("--timing"):
        config.pluginmanager.register(Timing(path, hasattr(config, "workerinput")))


def folder_of(test: str) -> str:
    """Returns the row of a test: its folder, at most two deep."""
    parts = test.split("::")[0].split("/")[1:-1]
    return "/".join(parts[:2]) or "tests"


def table(measured: dict[str, Any]) -> str:
    """Returns rows of sums by folder, the most CPU first."""
    sums: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for test, spent in measured["tests"].items():
        for row in (folder_of(test), "all"):
            sums[row].update({"tests": 1, **spent})
    order = sorted(sums, key=lambda row: (row == "all", -sums[row]["cpu_seconds"]))
    lines = [
        "| tests of | tests | seconds | CPU seconds | processes | C++ builds | graphs traced |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in order:
        figures = [f"{sums[row][kind]:,.0f}" for kind in ("tests", *KINDS)]
        lines.append(f"| {row} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def slow_tests() -> Iterator[tuple[str, str, str]]:
    """Yields file, function ("" for all of a file) and reason of what is marked slow."""
    for path in sorted(TESTS.rglob("test_*.py")):
        name = str(path.relative_to(TESTS))
        for statement in ast.parse(path.read_text()).body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.slow":
                    function = getattr(statement, "name", "")
                    yield name, function, ast.literal_eval(node.args[0])


def slow_table() -> str:
    """Returns the list of what is left to `make test-all`."""
    lines = ["| left to `make test-all` | why |", "|---|---|"]
    for file, function, why in slow_tests():
        lines.append(f"| {file}{': ' if function else ''}{function} | {why} |")
    return "\n".join(lines) + "\n"


def write_section(name: str, text: str) -> None:
    """Puts text between <!-- name --> and <!-- /name --> of the page."""
    pattern = re.compile(SECTION.format(name), re.DOTALL)
    page, found = pattern.subn(lambda match: match[1] + text, PAGE.read_text())
    assert found == 1, f"{PAGE} has no <!-- {name} --> ... <!-- /{name} -->"
    PAGE.write_text(page)


def main() -> None:
    """Writes both tables into CONTRIBUTING.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path)
    measured = json.loads(parser.parse_args().measured.read_text())
    elapsed = f"By the clock, all of it: {measured['elapsed_seconds']:.0f} s."
    write_section("timing", f"{table(measured)}\n\n{elapsed}\n")
    write_section("slow", slow_table())


if __name__ == "__main__":
    main()
