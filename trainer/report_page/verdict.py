"""The report's verdict: whether the warm start helped, and how certain that is."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trainer.config import FREE_ON_RESUME
from trainer.report_page.run_folder import RunFolder
from trainer.report_page.statistics import (
    Interval,
    mean_of_runs,
    paired_difference,
    proportion,
    unpaired_difference,
)
from trainer.reporting.predictions import Predictions

TITLES = {
    "pretrain": "Pretraining",
    "scratch": "From scratch",
    "warm": "Warm start",
    "classifier": "Classifier",
}


class Outcome(NamedTuple):
    """The errors of a run's classifiers, in percent of the split's documents."""

    run: str  # the run's name
    seed: int | None  # none if unknown
    split: str  # the evaluated split
    documents: int  # of the split
    errors: dict[str, Interval]  # by the part's name
    difference: Interval | None  # scratch - warm, in points; None if one is missing
    is_paired: bool  # whether the difference is taken document by document


class Verdict(NamedTuple):
    """The head of a report."""

    title: str
    text: str
    caution: str


def percent(interval: Interval) -> Interval:
    """Returns an interval of shares in percent."""
    return Interval(*(100 * value for value in interval))


def outcome(run: RunFolder) -> Outcome:
    """Returns the errors of the run's classifiers, from predictions or else from report.json."""
    predictions = {
        name: part.predictions for name, part in run.parts.items() if part.predictions is not None
    }
    tests = _reported(run)
    errors = {
        name: percent(proportion(float(each.is_wrong.sum()), len(each.label)))
        for name, each in predictions.items()
    }
    for name, (share, documents) in tests.items():
        if name not in errors:
            errors[name] = percent(proportion(share * documents, documents))
    first = next(iter(predictions.values()), None)
    documents = len(first.label) if first else next((n for _, n in tests.values()), 0)
    difference, is_paired = None, False
    if {"scratch", "warm"} <= errors.keys():
        wrong = aligned(predictions.get("scratch"), predictions.get("warm"))
        is_paired = wrong is not None
        difference = (
            percent(paired_difference(*wrong))
            if wrong
            else unpaired_difference(errors["scratch"], errors["warm"])
        )
    seed = run.config.get("seed")
    return Outcome(
        run=run.name,
        seed=seed if isinstance(seed, int) else None,
        split=str(first.info.get("split")) if first else "test",
        documents=documents,
        errors=errors,
        difference=difference,
        is_paired=is_paired,
    )


def _reported(run: RunFolder) -> dict[str, tuple[float, int]]:
    """Returns the share of errors and the number of documents by part, from report.json."""
    found = {}
    test = run.report.get("test")
    for name in ("scratch", "warm"):
        values = test.get(name) if isinstance(test, Mapping) else None
        if not isinstance(values, Mapping):
            continue
        error, documents = values.get("error_percent"), values.get("documents")
        if isinstance(error, int | float) and type(documents) is int and documents > 0:
            found[name] = (float(np.clip(error, 0, 100)) / 100, documents)
    return found


def aligned(
    first: Predictions | None, second: Predictions | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns where each is wrong, by document; None if their documents differ."""
    if first is None or second is None or first.info.get("split") != second.info.get("split"):
        return None
    orders = [np.argsort(each.tensors["document"], kind="stable") for each in (first, second)]
    for name in ("document", "label"):
        first_sorted, second_sorted = (
            each.tensors[name][order] for each, order in zip((first, second), orders, strict=True)
        )
        if not np.array_equal(first_sorted, second_sorted):
            return None
    return first.is_wrong[orders[0]], second.is_wrong[orders[1]]


def differing_flags(runs: Sequence[RunFolder]) -> list[str]:
    """Returns the flags that change a run's results and differ between the runs."""
    names = {name for run in runs for name in run.config} - FREE_ON_RESUME
    return sorted(name for name in names if len({repr(run.config.get(name)) for run in runs}) > 1)


def verdict(runs: Sequence[RunFolder], outcomes: Sequence[Outcome]) -> Verdict:
    """Returns the head of the report."""
    compared = [(each, each.difference) for each in outcomes if each.difference]
    if len(compared) > 1:
        differing = [name for name in differing_flags(runs) if name != "seed"]
        if differing:
            flags = ", ".join(f"--{name}" for name in differing[:6])
            return Verdict(
                f"{len(runs)} runs of different settings",
                f"They differ in {flags}{' and more' if len(differing) > 6 else ''}; the table "
                "below has the results of each.",
                "A mean over runs is given only if they differ in nothing but the seed.",
            )
        return _of_seeds(compared)
    if len(compared) == 1:
        return _of_pair(*compared[0])
    return _of_one(outcomes)


def _of_pair(found: Outcome, gap: Interval) -> Verdict:
    scratch, warm = found.errors["scratch"], found.errors["warm"]
    text = (
        f"Of {found.documents:,} {found.split} documents, the warm start gets {warm.value:.1f} % "
        f"wrong, training from scratch {scratch.value:.1f} %: {_points(gap)}."
    )
    caution = (
        "The interval covers the choice of test documents. Another seed changes both errors too: "
        "make a report of several runs to see by how much."
    )
    return Verdict(_title(gap), text, caution)


def _of_seeds(compared: Sequence[tuple[Outcome, Interval]]) -> Verdict:
    """Returns the verdict over at least two runs."""
    gap = mean_of_runs([difference.value for _, difference in compared])
    means = {
        name: float(np.mean([each.errors[name].value for each, _ in compared]))
        for name in ("scratch", "warm")
    }
    text = (
        f"Over {len(compared)} seeds, the warm start gets {means['warm']:.1f} % wrong on average, "
        f"training from scratch {means['scratch']:.1f} %: {_points(gap)}."
    )
    caution = (
        f"The interval is Student's over {len(compared)} runs that differ in nothing but the seed, "
        "so it covers initialisation, order and the choice of labelled documents."
    )
    return Verdict(_title(gap), text, caution)


def _of_one(outcomes: Sequence[Outcome]) -> Verdict:
    evaluated = [(each, name) for each in outcomes for name in each.errors]
    if not evaluated:
        return Verdict(
            "No classifier has been evaluated yet", "The sections below show the run so far.", ""
        )
    lines = []
    for each, name in evaluated:
        found = each.errors[name]
        lines.append(
            f"{TITLES.get(name, name)} ({each.run}): {found.value:.1f} % of {each.documents:,} "
            f"{each.split} documents are wrong (95 % interval {found.low:.1f} to {found.high:.1f})."
        )
    best, name = min(evaluated, key=lambda pair: pair[0].errors[pair[1]].value)
    title = f"{best.errors[name].value:.1f} % error"
    if len(evaluated) > 1:
        title = f"Lowest error: {best.errors[name].value:.1f} %, {best.run}"
    return Verdict(title, " ".join(lines), "A comparison needs a warm start and one from scratch.")


def _title(gap: Interval) -> str:
    if gap.low > 0:
        return "The warm start makes fewer errors"
    if gap.high < 0:
        return "The warm start makes more errors"
    return "No clear difference between warm start and scratch"


def _points(gap: Interval) -> str:
    if gap.value >= 0:
        return f"{gap.value:.1f} points less (95 % interval {gap.low:.1f} to {gap.high:.1f})"
    return f"{-gap.value:.1f} points more (95 % interval {-gap.high:.1f} to {-gap.low:.1f})"
