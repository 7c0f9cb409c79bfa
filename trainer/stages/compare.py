"""--stage=all: pretrain, fine-tune from the encoder and from scratch, and compare."""

import contextlib
import dataclasses
from typing import Any

from trainer.stages import label_curve
from trainer.stages.evaluate import evaluate
from trainer.stages.finetune import finetune
from trainer.stages.pretrain import pretrain
from trainer.training.run import Run


def compare(run: Run) -> dict[str, Any]:
    """Runs the whole job in the run's folder, or the part of it that --starts names.

    Returns:
        The report: pretrain, warm, scratch (as the stages return them), broadcast,
        test_error_percent of the starts, and with --label_counts a row a classifier, `labels`.
        Each classifier reads the test split once, at its end.
    """
    if not run.config.label_counts:
        return _compare(run)
    with contextlib.closing(label_curve.LinearModels(run)) as linear_models:
        report = _compare(run)
        report["labels"] = label_curve.rows(run, report) + linear_models.rows()
    return report


def _compare(run: Run) -> dict[str, Any]:
    config, folder = run.config, run.folder
    starts = config.compared_starts
    report: dict[str, Any] = {}
    for name, its_config in config.parts().items():
        part = dataclasses.replace(run, config=its_config)
        if name == "pretrain" and "warm" in starts:
            report["pretrain"] = pretrain(part, folder / name)
        elif name in starts:
            report[name] = finetune(part, folder / name)
    if "broadcast" in report.get("warm", {}):
        report["broadcast"] = report["warm"].pop("broadcast")
    report["test"] = {
        name: evaluate(run, folder / name / "classifier", "test", folder / name) for name in starts
    }
    report["test_error_percent"] = {
        name: round(values["error_percent"], 3) for name, values in report["test"].items()
    }
    return report
