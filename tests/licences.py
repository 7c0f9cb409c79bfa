"""The licences of what constraints.txt pins, from the packages' own metadata.

`python -m tests.licences` prints the table of docs/licences.md; `--write` writes it there.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT = REPOSITORY / "docs" / "licences.md"
BEGIN, END = "<!-- licences: begin -->\n", "<!-- licences: end -->\n"
LONGEST = 60  # some packages put the whole text where the name belongs


def pinned() -> dict[str, str]:
    """Returns the version of each package in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name: version.split()[0] for name, version in pairs}


def licence_of(name: str) -> str | None:
    """Returns what an installed package says of its licence, None if it is not installed."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    if said := found.get("License-Expression"):
        return said
    classifiers = [
        line.removeprefix("License :: ").removeprefix("OSI Approved :: ")
        for line in found.get_all("Classifier") or []
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    if classifiers:
        return ", ".join(classifiers)
    said = " ".join((found.get("License") or "").split())
    return said if 0 < len(said) <= LONGEST else "see its licence file" if said else "says nothing"


def written() -> dict[str, str]:
    """Returns package -> licence, as docs/licences.md has it."""
    text = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    return dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", text, re.MULTILINE)[1:])


def table(known: dict[str, str]) -> str:
    """Returns the table; what is not installed here is taken from `known`."""
    lines = ["| package | licence |", "|---|---|"]
    for name in pinned():
        licence = licence_of(name) or known.get(name, "not installed where this was written")
        lines.append(f"| {name} | {licence} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints or writes the table."""
    if "--write" not in sys.argv:
        print(table({}))
        return
    head, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(head + BEGIN + table(written()) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
