"""What people read: help, faults and tables, word for word, in tests/snapshots.

A change of words shows in the diff of a snapshot, to be read aloud before it is committed:

    make snapshots
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from absl import flags

import data_pipelines.prepare.command as prepare
import launch.main
import trainer.main
from data_pipelines import flag_fields
from tests.trainer.reporting.test_report_file import REPORT
from trainer import config as configuration
from trainer import preflight
from trainer.distribution.cluster import Cluster
from trainer.report_page.statistics import Interval
from trainer.report_page.verdict import Outcome, verdict
from trainer.reporting.report_file import comparison_table
from warmstate import command

FOLDER = Path(__file__).with_name("snapshots")
WRONG_FLAGS = (
    ("--units=0", "--pretrain_steps=many", "--unitz=3", "stray"),
    ("--stage=finetune",),
    ("--pretrain_batch_size=2", "--optimizer=adamw", "--encoder_frozen_steps=5"),
    ("--source=movie_reviews", "--labelled=csv:b"),
    ("--label_gain=linear", "--pooling=concat", "--finetune_steps=0"),
    ("--stage=evaluate", "--step=3"),
    ("--stage=predict",),
)
CLOSE = {"scratch": Interval(12.0, 10.9, 13.2), "warm": Interval(11.6, 10.5, 12.8)}
FAR = {"scratch": Interval(12.0, 10.9, 13.2), "warm": Interval(9.0, 8.1, 10.0)}


def faults() -> str:
    """Returns how bad flags are answered."""
    answers = []
    for words in WRONG_FLAGS:
        values = flags.FlagValues()
        flag_fields.define([configuration.Config], values)
        found, _ = configuration.parse(["main", *words], values)
        found += preflight.faults_of(configuration.from_flags(values), Cluster(0, 3))
        answers.append("\n".join([f"$ {' '.join(words)}", *found]))
    return "\n\n".join(answers)


def verdicts() -> str:
    """Returns the heads of reports: a clear difference, none, and a single classifier."""
    found = []
    for errors, gap in ((FAR, Interval(3.0, 2.0, 4.0)), (CLOSE, Interval(0.4, -0.5, 1.3))):
        found.append(Outcome("runs/demo", 0, "test", 5056, errors, gap, True))
    found.append(Outcome("runs/a", 0, "test", 5056, {"warm": FAR["warm"]}, None, False))
    return "\n\n".join("\n".join(verdict([], [each])) for each in found)


def table() -> str:
    """Returns the tables at the end of --stage=all."""
    errors = {"scratch": (33.4, 10.9), "tfidf": (25.2, 9.3), "lsa": (17.1, 14.0), "warm": (18, 9.1)}
    rows = [
        {"model": model, "labels": labels, "draw": draw, "test_error_percent": error + draw}
        for model, both in errors.items()
        for labels, draws, error in zip((200, 17309), (3, 1), both, strict=True)
        for draw in range(draws)
    ]
    return comparison_table(REPORT | {"labels": rows})


SNAPSHOTS: dict[str, Callable[[], str]] = {
    "help_warmstate": command.overview,
    "help_warmstate_predict": lambda: command.help_of("predict"),
    "help_trainer": lambda: help_of(trainer.main.__doc__, [configuration.Config]),
    "help_prepare": lambda: help_of(prepare.TITLE, [prepare.Options]),
    "help_launch": lambda: help_of(launch.main.__doc__, launch.main.TABLES),
    "faults": faults,
    "table": table,
    "verdicts": verdicts,
}


def help_of(title: str | None, tables: list[type]) -> str:
    """Returns what a program prints for --help."""
    assert title is not None
    return flag_fields.program_help(title, tables)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_people_read_what_was_read_before(name: str) -> None:
    expected = (FOLDER / f"{name}.txt").read_text()
    assert SNAPSHOTS[name]() + "\n" == expected, "read what changed, then run make snapshots"


def test_every_snapshot_is_compared() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(SNAPSHOTS)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    for name, text in SNAPSHOTS.items():
        (FOLDER / f"{name}.txt").write_text(text() + "\n")
