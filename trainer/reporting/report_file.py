"""Writes report.json, and formats the tables at the end of a run."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.reporting.metrics_file import format_seconds
from trainer.safe_files import replace_text


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes `folder`/report.json atomically."""
    replace_text(folder / "report.json", json.dumps(report, indent=2) + "\n")


# Of the models in the table by number of labels, in its order.
MODELS = {
    "scratch": "from scratch",
    "tfidf": "TF-IDF",
    "nbsvm": "NBSVM",
    "svm": "linear SVM",
    "lsa": "LSA",
    "warm": "warm start",
}


def errors_by_labels(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, list[float]]]:
    """Returns the test errors of the samples, in percent, by number of labels and model.

    Args:
        rows: `labels` of report.json.
    """
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[int(row["labels"])][str(row["model"])].append(float(row["test_error_percent"]))
    return {
        labels: {model: models[model] for model in MODELS if model in models}
        for labels, models in sorted(found.items())
    }


def label_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines of the table of test errors by number of labels."""
    by_labels = errors_by_labels(rows)
    models = [name for name in MODELS if any(name in each for each in by_labels.values())]
    cells = [["labels", *(MODELS[name] for name in models)]]
    for labels, errors in by_labels.items():
        means = [f"{sum(errors[m]) / len(errors[m]):.1f} %" if m in errors else "" for m in models]
        cells.append([f"{labels:,}", *means])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    draws = max(len(values) for errors in by_labels.values() for values in errors.values())
    return [
        "Test error by number of labels",
        lines[0],
        "-" * len(lines[0]),
        *lines[1:],
        f"Means of {draws} samples below all labels. Linear models read words and pairs; "
        "TF-IDF and LSA: logistic regression.",
    ]


def comparison_table(report: dict[str, Any]) -> str:
    """Returns the table of --stage=all: both starts, and the digest that each worker holds."""
    starts = [name for name in ("scratch", "warm") if name in report]
    rows = [("", "test error", "validation", "best step", "time", "tokens/s")]

    def add(title: str, test: str, validation: str, step: int, part: dict[str, Any]) -> None:
        time, speed = format_seconds(part["seconds"]), f"{part['tokens_per_second']:,.0f}"
        rows.append((title, test, validation, str(step), time, speed))

    for name in starts:
        part, title = report[name], {"scratch": "from scratch", "warm": "warm start"}[name]
        test = f"{report['test_error_percent'][name]:.2f} %"
        add(title, test, f"{part['validation']['error_percent']:.2f} %", part["best_step"], part)
    if "pretrain" in report:
        part = report["pretrain"]
        add("pretraining", "", f"ppl {part['perplexity']:.0f}", part["steps"], part)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    for name in starts:
        if "f1_micro" in (tested := report.get("test", {}).get(name, {})):
            micro, macro = (100 * tested[f"f1_{mean}"] for mean in ("micro", "macro"))
            lines.append(f"{MODELS[name]}: F1 of labels {micro:.1f} % (micro), {macro:.1f} (macro)")
    if report.get("labels"):
        lines += ["", *label_table(report["labels"])]
    lines.append("")
    if "warm" in report:
        warm = report["warm"]
        lines.append(f"warm start: weights {warm['init_weights']}, state {warm['initial_state']}")
        for rank, value in enumerate(report["broadcast"]["digests"]):
            lines.append(f"worker {rank} holds {value}")
    lines.append(
        f"{report[starts[-1]]['labelled_documents']:,} labelled documents to train on, "
        f"{report['test'][starts[-1]]['documents']:,} to test; "
        f"all in all {format_seconds(report['wall_seconds'])}"
    )
    if report["data_note"]:
        lines.append(f"Data: {report['data_note']}.")
    return "\n".join(lines)
