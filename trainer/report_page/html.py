"""Writes report.html: the results of a run, or a comparison of several, in one offline file.

  python -m trainer.report_page.html RUN_DIR [RUN_DIR ...] [--out=FILE]

It reads the files in the run's folder, so it also works for a run in progress or interrupted.
"""

import argparse
import base64
import hashlib
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from data_pipelines.errors import USAGE_EXIT_CODE
from trainer.report_page import run_folder, sections
from trainer.report_page.markup import Markup, tag
from trainer.report_page.run_folder import RunFolder
from trainer.report_page.verdict import outcome, verdict
from trainer.safe_files import replace_text


def page(runs: Sequence[RunFolder], made_at: float) -> str:
    """Returns the report as ASCII.

    Args:
        made_at: Unix time.
    """
    outcomes = [outcome(run) for run in runs]
    said = verdict(runs, outcomes)
    parts = [
        ("Runs", sections.runs_table(runs, outcomes)),
        ("Labels", sections.labels(runs)),
        ("Learning", sections.learning(runs)),
        ("Learning rate range", sections.learning_rate_range(runs)),
        ("Throughput", sections.throughput(runs)),
        ("Learned states", sections.learned_states(runs)),
        ("Where documents end", sections.final_states(runs)),
        ("Mistakes", sections.mistakes(runs)),
        ("Calibration", sections.calibrations(runs)),
        ("Documents", sections.documents(runs)),
        ("Settings", sections.settings(runs)),
        ("Environment", sections.environments(runs)),
        ("Missing", sections.missing(runs)),
    ]
    parts = [(title, body) for title, body in parts if body]
    names = ", ".join(run.name for run in runs)
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(made_at))
    script = _file("page.js")
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag(
            "header",
            tag("p", tag("span", "warmstate"), f" report of {names}", class_="eyebrow"),
            tag("h1", said.title),
            tag("p", said.text, class_="lead"),
            tag("p", said.caution, class_="caution") if said.caution else None,
            sections.status(runs),
        ),
        tag(
            "nav",
            tag("ul", [tag("li", tag("a", title, href=f"#{_id(title)}")) for title, _ in parts]),
            aria_label="Sections",
        ),
        tag(
            "main",
            sections.verdict_picture(outcomes),
            [
                tag("section", tag("h2", title), content, id=_id(title), aria_label=title)
                for title, content in parts
            ],
            id="content",
        ),
        tag("footer", tag("p", f"Made on {written} from {names}.")),
        tag("p", class_="spoken", role="status", aria_live="polite"),
        tag("script", script),
    )
    whole = tag("html", _head(f"{said.title} - {names}", script), body, lang="en")
    return f"<!doctype html>\n{whole}\n".encode("ascii", "xmlcharrefreplace").decode()


def _head(title: str, script: Markup) -> Markup:
    style = _file("page.css")
    policy = f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        # Reviews are untrusted text. They are escaped; this policy would stop scripts in them too.
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )


def _file(name: str) -> Markup:
    return Markup((resources.files(__package__) / name).read_text(encoding="ascii"))


def write(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of the runs in `folders` to the file `out`.

    Raises:
        FileNotFoundError: A folder holds no run.
        OSError: The file cannot be written.
    """
    replace_text(out, page([run_folder.read(folder) for folder in folders], time.time()))


def _id(title: str) -> str:
    return title.lower().replace(" ", "-")


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a report; returns the exit code: 2 for a missing run or an unwritable file."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report_page.html",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="a run's folder, its --run_dir")
    parser.add_argument(
        "--out", type=Path, help="file to write; default: report.html in the folder of the run"
    )
    options = parser.parse_args(argv)
    if options.out is None and len(options.run_dir) > 1:
        parser.error("several runs need --out=FILE")
    out = options.out or options.run_dir[0] / "report.html"
    try:
        write(options.run_dir, out)
    except OSError as error:
        why = str(error) if error.errno is None else f"{error.filename}: {error.strerror}"
        print(f"error: {why}", file=sys.stderr)
        return USAGE_EXIT_CODE
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
