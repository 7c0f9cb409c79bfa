"""The arrows point one way: between the packages, and between the rooms of each package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = {"data_pipelines.flag_fields", "data_pipelines.errors"}
FORBIDDEN = {
    "data_pipelines": {"trainer", "launch", "warmstate"},
    "trainer": {"launch", "warmstate"},
    # Of data_pipelines it may import flags and exit codes alone, which all programs share.
    "launch": {"data_pipelines", "trainer", "tensorflow", "keras", "warmstate"},
    # On top: the console script runs the programs above, the Python interface calls the stages.
    "warmstate": {"tests", "benchmarks"},
}
HOUSES = ("data_pipelines", "launch", "trainer")


def names_imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Yields, for each name that the file imports, also inside of functions, what it may be.

    `from a import b` is (a.b, a): the module a.b if there is one, else something in a.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.module) for alias in node.names)


def modules_of(package: str) -> dict[str, Path]:
    """Returns the package's modules by dotted name; a sub-package is its __init__.py."""
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (REPOSITORY / package).rglob("*.py")
    }


def arrows_of(package: str) -> dict[str, set[str]]:
    """Returns module -> the package's modules that it imports."""
    modules = modules_of(package)
    assert modules
    return {
        name: {
            found[0]
            for names in names_imported(path)
            if (found := [other for other in names if other in modules])
        }
        - {name, package}
        for name, path in modules.items()
    }


def room_of(module: str) -> str:
    """Returns a module's room: the sub-package or the top module that it is or is in."""
    return module.split(".")[1]


def floors_of(package: str) -> dict[str, int]:
    """Returns room -> floor, as the docstring of the package draws them."""
    drawing = ast.get_docstring(ast.parse((REPOSITORY / package / "__init__.py").read_text()))
    rows = re.findall(r"^ +(\d+)  (\w+(?:, \w+)*)$", drawing or "", re.M)
    assert rows
    return {room: int(floor) for floor, rooms in rows for room in rooms.split(", ")}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_imports_only_downwards(package: str) -> None:
    wrong = {
        name: bad
        for name, path in modules_of(package).items()
        if (
            bad := {n[0].split(".")[0] for n in names_imported(path) if not SHARED & {*n}}
            & FORBIDDEN[package]
        )
    }
    assert not wrong


@pytest.mark.parametrize("package", HOUSES)
def test_every_room_is_on_a_floor(package: str) -> None:
    rooms = {room_of(module) for module in arrows_of(package) if module != package}
    assert rooms == set(floors_of(package))


@pytest.mark.parametrize("package", HOUSES)
def test_rooms_import_only_from_floors_below(package: str) -> None:
    floors = floors_of(package)
    up = {
        f"{module} -> {other}"
        for module, others in arrows_of(package).items()
        for other in others
        if (here := room_of(module)) != (there := room_of(other))
        if floors[here] <= floors[there]
    }
    assert not up


@pytest.mark.parametrize("package", HOUSES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    arrows = arrows_of(package)

    def reached(module: str, seen: set[str]) -> set[str]:
        for other in arrows[module] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    assert not {module for module in arrows if module in reached(module, set())}


def test_the_documentation_draws_the_same_floors() -> None:
    text = (REPOSITORY / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| \S.*\.? \|$", text, re.M)
    assert {room: int(floor) for floor, room in rows} == floors_of("trainer")


def test_only_the_distribution_package_knows_how_workers_run() -> None:
    outside = [
        path
        for path in (REPOSITORY / "trainer").rglob("*.py")
        if "distribution" not in path.parts and "tf.distribute" in path.read_text()
    ]
    assert not outside
