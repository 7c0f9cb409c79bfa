"""The arrows between the packages point one way: launch -> (processes) -> trainer -> data."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = {"data_pipelines.flag_fields"}
FORBIDDEN = {
    "data_pipelines": {"trainer", "launch", "warmstate"},
    "trainer": {"launch", "warmstate"},
    # Of data_pipelines it may import the flag system alone, which all three programs share.
    "launch": {"data_pipelines", "trainer", "tensorflow", "keras", "warmstate"},
    # On top: the console script runs the programs above, the Python interface calls the stages.
    "warmstate": {"tests", "benchmarks"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names - SHARED}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_imports_only_downwards(package: str) -> None:
    modules = list((REPOSITORY / package).rglob("*.py"))
    assert modules
    wrong = {str(m): bad for m in modules if (bad := imported(m) & FORBIDDEN[package])}
    assert not wrong


def test_only_the_distribution_package_knows_how_workers_run() -> None:
    outside = [
        path
        for path in (REPOSITORY / "trainer").rglob("*.py")
        if "distribution" not in path.parts and "tf.distribute" in path.read_text()
    ]
    assert not outside
