"""--lr_range: the training loss while the learning rate rises geometrically (Smith 2017).

Nothing is evaluated and no bundle is written. Too low rates leave the loss where it is, good ones
let it fall, and too high ones let it rise; the suggestion is a tenth of the rate with the lowest
smoothed loss.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.config import StageConfig
from trainer.reporting import metrics_file
from trainer.stages import finetune, pretrain
from trainer.training import loop
from trainer.training.run import Run
from trainer.training.schedules import rate_in_range

POINTS = 60
ROWS = 12  # of the printed table
SMOOTHING = 0.7  # what a smoothed loss keeps of the one before


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """Raises the learning rate over the stage's steps.

    Returns:
        For the report: stage, suggestion, and points, a list of learning_rate, loss and smoothed.
    """
    config = run.config
    stage = config.of_stage(config.stage)
    config = dataclasses.replace(
        config,
        log_every_steps=max(1, stage.steps // POINTS),
        on_nonfinite="skip",  # the rates that are too high are to be seen, not to end the run
        max_skipped_steps=stage.steps,
        keep_best=0,
    )
    run = dataclasses.replace(run, config=config)
    set_up = finetune.set_up if config.stage == "finetune" else pretrain.set_up
    _, task, batches, _ = set_up(run, folder)
    task = dataclasses.replace(task, select_by="", ranked_by="")
    loop.train(run, task, batches)
    lines = metrics_file.whole_lines(folder / "metrics.jsonl") if run.is_chief else []
    found = points(lines, stage)
    return {"stage": config.stage, "suggestion": suggestion(found), "points": found}


def points(lines: Iterable[dict[str, Any]], stage: StageConfig) -> list[dict[str, float]]:
    """Returns the rates and losses in lines of metrics.jsonl.

    A line's loss is the mean since the line before, so its rate is that of their middle.
    """
    found: list[dict[str, float]] = []
    mean, weight, before = 0.0, 0.0, 0
    for line in lines:
        if "loss" not in line:
            continue
        step, loss = line["step"], line["loss"]
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        rate = rate_in_range(stage, (before + step - 1) / 2)
        found.append({"learning_rate": rate, "loss": loss, "smoothed": mean / weight})
        before = step
    return found


def suggestion(found: Sequence[dict[str, float]]) -> float | None:
    """Returns a tenth of the rate with the lowest smoothed loss; None without points."""
    if not found:
        return None
    best = min(found, key=lambda point: point["smoothed"])
    return float(f"{best['learning_rate'] / 10:.1e}")


def table(report: dict[str, Any]) -> str:
    """Returns the printed table, and what it suggests."""
    found = report["points"]
    shown = found[:: max(1, len(found) // ROWS)]
    lines = [
        f"{p['learning_rate']:>13.1e}  {p['loss']:>8.4f}  {p['smoothed']:>8.4f}" for p in shown
    ]
    head = f"{'learning rate':>13}  {'loss':>8}  {'smoothed':>8}"
    name = f"--{report['stage']}_learning_rate"
    ending = f"Try {name}={report['suggestion'] or 0:g}: a tenth of the rate with the lowest loss"
    last = ending if found else "no loss was finite"
    return "\n".join([head, "-" * len(head), *lines, "", last])
