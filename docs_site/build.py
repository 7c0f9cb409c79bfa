"""Builds the documentation site into build/site: `make docs`.

The pages are README.md, docs/, k8s/README.md, the changelog and how to contribute, with their links
turned to each other; and a reference, made from the flags and from the docstrings. A warning is an
error.
"""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
BUILD = REPOSITORY / "build"
PAGES = BUILD / "pages"
# Pages that do not lie in docs/, and where they go.
MOVED = {
    "README.md": "index.md",
    "k8s/README.md": "kubernetes.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
# What a page is for; those of docs/ that are in no list come under "More".
SECTIONS = {
    "Start": ["index.md", "tutorial.md"],
    "How to": [
        "data-sources.md", "data-preparing.md", "pretraining.md", "fine-tuning.md",
        "initialising-lstm-state.md", "report.md", "using-a-classifier.md", "python-api.md",
        "horovod.md", "slurm.md", "kubernetes.md", "elastic.md",
    ],
    "How it works": [
        "how-it-works.md", "where-things-are.md", "data-batches.md", "distribution.md",
        "faults.md", "reliability.md",
        "learned-states.md", "learned-states-imdb.md", "label-efficiency.md", "reproduction.md",
        "performance.md", "gpu.md",
        "decisions.md",
    ],
    "Project": ["changelog.md", "contributing.md", "licences.md"],
}  # fmt: skip
PACKAGES = ("warmstate", "data_pipelines", "trainer", "launch")


def main() -> int:
    """Builds the site; returns the exit code of ProperDocs."""
    shutil.rmtree(PAGES, ignore_errors=True)
    copy_pages()
    reference = write_reference()
    config = yaml.safe_load((REPOSITORY / "docs_site" / "properdocs.yml").read_text())
    config |= {"docs_dir": "pages", "site_dir": "site", "nav": navigation(reference)}
    path = BUILD / "properdocs.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "-f", str(path)]
    return subprocess.run(command).returncode


def copy_pages() -> None:
    """Copies pages and pictures to where ProperDocs reads them."""
    shutil.copytree(REPOSITORY / "docs", PAGES)
    for source, target in MOVED.items():
        shutil.copyfile(REPOSITORY / source, PAGES / target)
    sources = {PAGES / target: REPOSITORY / source for source, target in MOVED.items()}
    for page in PAGES.rglob("*.md"):
        source = sources.get(page, REPOSITORY / "docs" / page.relative_to(PAGES))
        page.write_text(turned(page.read_text(encoding="utf-8"), source), encoding="utf-8")


def turned(text: str, source: Path) -> str:
    """Returns a page whose links lead to pages of the site; those to other files are text.

    Args:
      source: where the page is in the repository.
    """

    def turn(match: re.Match[str]) -> str:
        whole, words, target = match[0], match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return whole
        file, _, anchor = target.partition("#")
        place = (source.parent / file).resolve()
        if not place.is_relative_to(REPOSITORY):
            return words.strip("![]")
        name = place.relative_to(REPOSITORY).as_posix()
        outside = name not in MOVED and not name.startswith("docs/")
        if outside or not place.exists():  # tests/docs/test_commands.py finds those that should
            return words[words.index("[") + 1 : -1]
        inside = MOVED.get(name, name.removeprefix("docs/"))
        here = MOVED.get(source.relative_to(REPOSITORY).as_posix())
        here = here or source.relative_to(REPOSITORY / "docs").as_posix()
        relative = os.path.relpath(inside, Path(here).parent)
        return f"{words}({relative}{'#' + anchor if anchor else ''})"

    text = re.sub(r"(!?\[[^\]\n]*\])\(([^)\s]+)\)", turn, text)
    # Pictures of README.md, which are HTML there.
    return re.sub(r'((?:src|srcset)=")docs/', r"\1", text)


def write_reference() -> list[str]:
    """Writes the reference; returns its pages, in order."""
    folder = PAGES / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flags.md").write_text(flags_page(), encoding="utf-8")
    written = ["reference/flags.md"]
    for package in PACKAGES:
        for place in [REPOSITORY / package, *sorted((REPOSITORY / package).rglob("*/"))]:
            modules = sorted(place.glob("*.py"))
            if not modules or "__pycache__" in place.parts:
                continue
            name = ".".join(place.relative_to(REPOSITORY).parts)
            lines = [f"# {name}\n"]
            for module in modules:
                stem = "" if module.stem == "__init__" else f".{module.stem}"
                said = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
                if said and "[--" in said:  # a program's usage, whose brackets are no links
                    lines.append(f"## {name}{stem}\n\n```text\n{said}\n```\n")
                elif said and module.stem != "__main__":
                    lines.append(f"::: {name}{stem}\n")
            if len(lines) > 1:
                (folder / f"{name}.md").write_text("\n".join(lines))
                written.append(f"reference/{name}.md")
    return written


def flags_page() -> str:
    """Returns the trainer's flags, by group, from its one dataclass."""
    from trainer.config import Config

    lines = [
        "# Flags of the trainer",
        "",
        "`python -m trainer.main --NAME=VALUE`, or a line each in a file that `--flagfile=FILE`",
        "names; later ones win.",
    ]
    group = ""
    for item in dataclasses.fields(Config):
        if item.metadata["group"] != group:
            group = item.metadata["group"]
            lines += ["", f"## {group}", "", "| flag | default | values | |", "|---|---|---|---|"]
        kind = item.type if isinstance(item.type, str) else item.type.__name__
        bounds = item.metadata["bounds"].items()
        limits = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in bounds if v is not None)
        values = ", ".join(f"`{c}`" for c in item.metadata["choices"]) or f"{kind} {limits}".strip()
        default = f"`{item.default}`" if item.default != "" else ""
        told = item.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `--{item.name}` | {default} | {values} | {told} |")
    return "\n".join(lines) + "\n"


def navigation(reference: list[str]) -> list[dict]:
    """Returns the site's navigation: every page is in it once."""
    present = {page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.md")}
    sections = {
        title: [page for page in pages if page in present] for title, pages in SECTIONS.items()
    }
    listed = {page for pages in sections.values() for page in pages} | set(reference)
    if more := sorted(present - listed):
        sections["More"] = more
    sections["Reference"] = reference
    titled = {page: Path(page).stem for page in reference[1:]}
    return [
        {title: [{titled[page]: page} if page in titled else page for page in pages]}
        for title, pages in sections.items()
        if pages
    ]


if __name__ == "__main__":
    sys.exit(main())
