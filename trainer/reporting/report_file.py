"""Writes report.json, and formats the table at the end of a run."""

import json
from pathlib import Path
from typing import Any

from trainer.reporting.metrics_file import format_seconds
from trainer.safe_files import replace_text


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes `folder`/report.json atomically."""
    replace_text(folder / "report.json", json.dumps(report, indent=2) + "\n")


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
