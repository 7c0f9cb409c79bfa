"""Commands in the README and in the docs: their flags exist, and those marked runnable run.

A block is run by bash if the line before it is `<!-- runnable -->`, one after the other, in a
folder of its own for each page. (Those of Python: test_pages.py.)
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs_site.build import MOVED, SECTIONS
from warmstate.command import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        REPOSITORY / "k8s" / "README.md",
        *list((REPOSITORY / "docs").rglob("*.md")),
    ]
)
RUNNABLE = re.compile(r"<!-- runnable -->\n+```\w*\n(.*?)```", re.S)
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.S | re.M)
SHELLS = ("", "sh", "bash", "console")
OUR_PROGRAMS = ("trainer.main", "launch.main", "data_pipelines.prepare")
SCRIPT = re.compile(rf"^(?:\$ )?warmstate ({'|'.join(COMMANDS)})\b")
STANDS_FOR_MORE = re.compile(r"^(<.*|\.\.\.|TRAINER_FLAGS|FLAGS|\[.*)$")


def commands(page: Path) -> list[list[str]]:
    """Returns the words of each command in the page that starts one of our programs."""
    found = []
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    for block in (text for language, text in blocks if language in SHELLS):
        for line in block.replace("\\\n", " ").splitlines():
            line = SCRIPT.sub(lambda found: f"python -m {COMMANDS[found[1]].module}", line)
            if not any(f"-m {program}" in line for program in OUR_PROGRAMS):
                continue
            try:
                found.append(shlex.split(line.removeprefix("$ "), comments=True))
            except ValueError:  # a word of prose with an apostrophe
                continue
    return found


def unknown_flags(words: list[str]) -> list[str]:
    """Returns what the words name that is no flag of the programs that they start."""
    program = words[words.index("-m") + 1]
    words = words[words.index("-m") + 2 :]
    if program == "launch.main":
        end = words.index("--") if "--" in words else len(words)
        return wrong("launch.main", words[:end]) + wrong("trainer.main", words[end + 1 :])
    return wrong(program, words)


def wrong(program: str, words: list[str]) -> list[str]:
    known = FLAGS[program]
    names = [
        re.split(r"[=\s]", word.lstrip("-"))[0]
        for word in words
        if word.startswith("--") and len(word) > 2 and not STANDS_FOR_MORE.match(word)
    ]
    return [name for name in names if name.removeprefix("no") not in known and name not in known]


def flags_of(program: str) -> set[str]:
    """Returns the names of a program's flags."""
    from data_pipelines.flag_fields import fields_of
    from data_pipelines.prepare.command import Options
    from launch.main import TABLES
    from trainer.config import Config

    tables = {"trainer.main": [Config], "launch.main": TABLES, "data_pipelines.prepare": [Options]}
    return fields_of(tables[program]).keys() | {"flagfile", "help"}


FLAGS = {program: flags_of(program) for program in OUR_PROGRAMS}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_every_flag_in_the_docs_exists(page: Path) -> None:
    faults = {" ".join(words): bad for words in commands(page) if (bad := unknown_flags(words))}
    assert not faults


def test_an_unknown_flag_would_be_found() -> None:
    assert unknown_flags(["python", "-m", "trainer.main", "--stage=all", "--unts=3"]) == ["unts"]
    words = [
        "python",
        "-m",
        "launch.main",
        "--workers=2",
        "--stage=all",
        "--",
        "--workers=2",
        "--units=3",
    ]
    assert unknown_flags(words) == ["stage", "workers"]
    assert len(commands(REPOSITORY / "README.md")) >= 4
    assert len(commands(REPOSITORY / "docs" / "using-a-classifier.md")) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    targets += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    missing = [
        target
        for target in targets
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]
    assert not missing


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as the site and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = (
        re.sub(r"[^\w\s-]", "", h).strip().lower() for h in re.findall("^#+ (.*)", text, re.M)
    )
    return {re.sub(r"[-\s]+", "-", heading) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_anchors_of_links_are_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s:]*\.md|)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    places = {(page.parent / name if name else page, anchor) for name, anchor in links}
    assert not [f"{p.name}#{anchor}" for p, anchor in places if anchor not in anchors(p)]


def test_every_page_is_in_the_readme_and_has_a_place_on_the_site() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    listed = {page for pages in SECTIONS.values() for page in pages}
    for page in PAGES:
        name = page.relative_to(REPOSITORY).as_posix()
        assert MOVED.get(name, page.name) in listed, name
        assert name == "README.md" or f"]({name})" in readme, name


@pytest.mark.slow("runs the pages' commands; quick: their flags are parsed")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if RUNNABLE.search(page.read_text(encoding="utf-8"))],
    ids=lambda p: p.relative_to(REPOSITORY).as_posix(),
)
def test_runnable_blocks_run(page: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    for text in RUNNABLE.findall(page.read_text(encoding="utf-8")):
        command = ["bash", "-ec", text]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=600
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
