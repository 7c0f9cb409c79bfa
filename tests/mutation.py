"""Do the tests notice a wrong line? Changes one thing at a time in a module and runs its tests.

    python -m tests.mutation trainer/training/checkpoint.py --out=build/mutation.json
    python -m tests.mutation --again=build/mutation.json --out=build/mutation.json
    python -m tests.mutation --table=build/mutation.json

A mutant is killed if a test fails. The tests of a module are those in the file that mirrors it, and
those in MORE_TESTS. `--again` tries only what survived, after tests were added; `--out` keeps what
it has of other mutants. `--table` writes the scores into CONTRIBUTING.md. All happens in a
copy of the checkout, so processes that tests start see the mutant too. What a mutant is: another
comparison or operator, a number one greater, a condition negated or half of it left out, a call
left out, `return None`. Texts, assertions and annotations stay as they are. The sample depends on
the seed alone.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.quiet_tensorflow import import_quietly
from tests import timing

REPOSITORY = Path(__file__).resolve().parents[1]
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.MatMult: ast.Mult,
}  # fmt: skip
MODULES = (
    "data_pipelines/batches/batch_plan.py",
    "trainer/models/lstm.py",
    "trainer/training/reduction.py",
    "trainer/training/checkpoint.py",
    "trainer/training/lazy_rows.py",
    "trainer/models/bundle.py",
    "trainer/distribution/cluster.py",
)
MORE_TESTS = {
    "trainer/training/reduction.py": ["tests/trainer/training/test_gradients.py"],
    # The compiled loops and cuDNN's path.
    "trainer/models/lstm.py": [
        "tests/trainer/test_native.py",
        "tests/trainer/models/test_cudnn.py",
    ],
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """One change of a source text: from byte `start` to byte `end` of its UTF-8."""

    line: int
    start: int
    end: int
    old: str
    new: str


class _Mutants(ast.NodeVisitor):
    """Collects all mutants of a module."""

    def __init__(self, source: str) -> None:
        self._source = source.encode()
        lines = self._source.splitlines(keepends=True)
        self._starts = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
        self.found: list[Mutant] = []
        self.visit(ast.parse(source))

    def _add(self, node: ast.AST, new: str) -> None:
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        old = self._source[start:end].decode()
        if isinstance(node, ast.expr):
            new = f"({new})"
        self.found.append(Mutant(node.lineno, start, end, old, new))

    def _visit_body(self, body: list[ast.stmt]) -> None:
        for node in body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not is_text:
                self.visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        """Visits all but annotations, decorators, docstrings, imports and what is printed."""
        skipped = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
        if isinstance(node, skipped):
            return
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            if name in ("body", "orelse", "finalbody") and isinstance(value, list):
                self._visit_body(value)
            elif isinstance(value, list):
                for each in value:
                    if isinstance(each, ast.AST):
                        self.visit(each)
            elif isinstance(value, ast.AST):
                self.visit(value)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Another comparison."""
        for index, operator in enumerate(node.ops):
            changed = [*node.ops]
            changed[index] = COMPARISONS[type(operator)]()
            new = ast.Compare(node.left, changed, node.comparators)
            self._add(node, ast.unparse(new))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Another operator."""
        texts = (ast.Constant, ast.JoinedStr)
        if isinstance(node.left, texts) and isinstance(node.op, (ast.Add, ast.Mod)):
            value = getattr(node.left, "value", "")
            if isinstance(value, str):
                return
        if new := OPERATORS.get(type(node.op)):
            self._add(node, ast.unparse(ast.BinOp(node.left, new(), node.right)))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Another operator, or nothing."""
        if new := OPERATORS.get(type(node.op)):
            self._add(node, ast.unparse(ast.AugAssign(node.target, new(), node.value)))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Half of it."""
        for index in range(len(node.values)):
            left = [value for n, value in enumerate(node.values) if n != index]
            new = left[0] if len(left) == 1 else ast.BoolOp(node.op, left)
            self._add(node, ast.unparse(new))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Without it."""
        self._add(node, ast.unparse(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """A number one greater, True for False."""
        if isinstance(node.value, bool):
            self._add(node, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self._add(node, repr(node.value + 1))

    def visit_Call(self, node: ast.Call) -> None:
        """The opposite function."""
        if isinstance(node.func, ast.Name) and (new := CALLS.get(node.func.id)):
            self._add(node.func, new)
        self.generic_visit(node)

    def _negate(self, node: ast.If | ast.While | ast.IfExp) -> None:
        if not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
            self._add(node.test, f"not ({ast.unparse(node.test)})")
        self.generic_visit(node)

    visit_If = visit_While = visit_IfExp = _negate

    def visit_Return(self, node: ast.Return) -> None:
        """None instead."""
        is_none = isinstance(node.value, ast.Constant) and node.value.value is None
        if node.value is not None and not is_none:
            self._add(node, "return None")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Nothing instead of a call."""
        if isinstance(node.value, ast.Call):
            self._add(node, "pass")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        """On with the loop."""
        self._add(node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        """Out of the loop."""
        self._add(node, "break")


def mutants(source: str) -> list[Mutant]:
    """Returns all mutants of a module."""
    return _Mutants(source).found


def apply(source: str, mutant: Mutant) -> str:
    """Returns the source with the mutant in it."""
    text = source.encode()
    return (text[: mutant.start] + mutant.new.encode() + text[mutant.end :]).decode()


def mirror(module: Path) -> Path:
    """Returns the file of a module's tests."""
    return Path("tests") / module.parent / f"test_{module.name}"


def copy_checkout(folder: Path) -> None:
    """Copies all tracked files, and links the compiled loops."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True)
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    built = REPOSITORY / "trainer/native/build"
    if built.exists():
        shutil.copytree(built, folder / "trainer/native/build")


def run_tests(tests: list[str], cpu_seconds: int, seconds: float) -> tuple[bool, str, float]:
    """Runs tests in a fork of this process.

    Returns:
        Whether they passed, the end of what they printed, and the CPU seconds.
    """
    with tempfile.TemporaryFile() as printed:
        pid = os.fork()
        if not pid:
            os.setsid()
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
            import pytest

            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow",
                                      *tests])))  # fmt: skip
        end = time.monotonic() + seconds
        while (ended := os.wait4(pid, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.05)
        if not ended[0]:
            os.killpg(pid, signal.SIGKILL)
            ended = os.wait4(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what its tests left
        printed.seek(0)
        text = printed.read().decode(errors="replace")
    return ended[1] == 0, text[-2000:], ended[2].ru_utime + ended[2].ru_stime


def sample(source: str, size: int, seed: int) -> list[Mutant]:
    """Returns mutants of a module, chosen by the seed alone, in the order of their lines."""
    everything = mutants(source)
    return sorted(random.Random(seed).sample(everything, min(size, len(everything))))


def tried(module: Path, chosen: list[Mutant]) -> Iterator[dict]:
    """Yields what became of each mutant, in a checkout that is the current folder."""
    source = module.read_text()
    tests = [str(mirror(module)), *MORE_TESTS.get(str(module), [])]
    passed, printed, cpu = run_tests(tests, 3600, 3600)
    assert passed, f"{module}: the tests fail without a mutant:\n{printed}"
    print(f"{module}: {len(chosen)} mutants, tests of {cpu:.0f} CPU seconds", flush=True)
    for mutant in chosen:
        module.write_text(apply(source, mutant))
        try:
            passed, printed, _ = run_tests(tests, int(3 * cpu) + 20, 20 * cpu + 600)
        finally:
            module.write_text(source)
        failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
        by = failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else printed[-300:]
        verdict = "SURVIVED" if passed else "killed"
        print(f"{verdict} {module}:{mutant.line}: {mutant.old!r} -> {mutant.new!r}", flush=True)
        yield {**mutant._asdict(), "killed": not passed, "by": "" if passed else by}


def chosen_mutants(given: argparse.Namespace) -> dict[Path, list[Mutant]]:
    """Returns what is to be tried, by module."""
    if given.again:
        before = json.loads(given.again.read_text())
        return {
            Path(module): [
                Mutant(*(result[field] for field in Mutant._fields))
                for result in results
                if not result["killed"]
            ]
            for module, results in before.items()
        }
    modules = given.modules or [Path(module) for module in MODULES]
    return {
        module: sample((REPOSITORY / module).read_text(), given.mutants, given.seed)
        for module in modules
    }


def table(results: dict[str, list[dict]]) -> str:
    """Returns rows of scores by module."""
    lines = ["| module | mutants | killed |", "|---|---:|---:|"]
    for module, tried_ones in sorted(results.items()):
        killed = sum(result["killed"] for result in tried_ones)
        share = 100 * killed / len(tried_ones)
        lines.append(f"| {module} | {len(tried_ones)} | {killed} ({share:.0f} %) |")
    return "\n".join(lines) + "\n"


def merged(results: list[dict], result: dict) -> list[dict]:
    """Returns results with what became of one mutant, instead of what was known of it."""
    others = [each for each in results if any(each[f] != result[f] for f in Mutant._fields)]
    return sorted([*others, result], key=lambda each: (each["start"], each["new"]))


def main() -> None:
    """Tries mutants, and writes what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", type=Path, nargs="*")
    parser.add_argument("--mutants", type=int, default=50, help="of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, metavar="FILE", help="only what survived there")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="try nothing: write its table")
    given = parser.parse_args()
    if given.table:
        return timing.write_section("mutation", table(json.loads(given.table.read_text())))
    out = given.out.resolve() if given.out else None
    chosen = chosen_mutants(given)
    sys.dont_write_bytecode = True  # two mutants of one second and one size are not one
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory(prefix="mutation.") as folder:
        copy_checkout(Path(folder))
        os.chdir(folder)
        sys.path[0] = folder
        import_quietly()
        importlib.import_module("keras")
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "data_pipelines")]:
            del sys.modules[name]  # they are imported from the copy
        results = json.loads(out.read_text()) if out and out.exists() else {}
        for module, of_module in chosen.items():
            for result in tried(module, of_module):
                results[str(module)] = merged(results.get(str(module), []), result)
                if out:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_text(json.dumps(results, indent=1))
            found = results.get(str(module), [])
            killed = sum(result["killed"] for result in found)
            print(f"{module}: {killed} of {len(found)} killed", flush=True)


if __name__ == "__main__":
    main()
