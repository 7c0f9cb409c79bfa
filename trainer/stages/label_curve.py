"""--label_counts: both starts and linear models with fewer labels, several samples of each number.

Up to FEW_LABELS the warm start is a linear head on the frozen encoder, fitted by logistic
regression: fine-tuning the encoder on 200 labels gained nothing (docs/decisions.md). Otherwise
everything is trained as with all labels, for at most PASSES passes over the labelled documents.
"""

import dataclasses
import json
import subprocess
import sys
from typing import Any

from trainer.config import Config
from trainer.stages.evaluate import errors_alone
from trainer.stages.finetune import finetune
from trainer.training.run import Run

FEW_LABELS = 500
PASSES = 20
EVALUATIONS = 2

Row = dict[str, Any]


def part_config(config: Config, start: str, count: int, draw: int) -> Config:
    """Returns the configuration of a classifier of `count` labels.

    Args:
        config: That of the same start with all labels.
    """
    passes = -(-PASSES * count // config.finetune_batch_size)
    steps = min(config.finetune_steps, passes)
    found = dataclasses.replace(
        config,
        finetune_documents=count,
        seed=config.seed + draw,
        finetune_steps=steps,
        finetune_evaluate_every_steps=max(1, -(-steps // EVALUATIONS)),
    )
    if count > FEW_LABELS:
        return found
    return dataclasses.replace(
        found,
        pooling="mean",
        hidden_units=0,
        finetune_steps=0 if start == "warm" else steps,
        adversarial_weight=0.0,
        virtual_adversarial_weight=0.0,
        unlabelled_batch_size=0,
    )


def rows(run: Run, report: Row) -> list[Row]:
    """Trains and tests the classifiers of --label_counts, one folder each.

    Args:
        report: That of both starts with all labels.

    Returns:
        A row a classifier, also of those in `report`: model, labels, draw, errors in percent.
    """
    found = []
    parts = {name: run.config.parts()[name] for name in run.config.compared_starts}
    for count in run.config.counts_of_labels:
        for draw in range(run.config.label_draws):
            for start, config in parts.items():
                folder = run.folder / f"{start}-{count}-{draw}"
                part = dataclasses.replace(run, config=part_config(config, start, count, draw))
                tuned = finetune(part, folder)
                tested = errors_alone(run, folder / "classifier", "test")
                found.append(_row(start, draw, tuned, tested))
    for start in parts:
        found.append(_row(start, 0, report[start], report["test"][start]))
    return found


def _row(start: str, draw: int, tuned: Row, tested: Row) -> Row:
    return {
        "model": start,
        "labels": tuned["labelled_documents"],
        "draw": draw,
        "validation_error_percent": round(tuned["validation"]["error_percent"], 3),
        "test_error_percent": round(tested["error_percent"], 3),
    }


class LinearModels:
    """The program `linear_models` for all labels and for each of --label_counts, beside a run."""

    def __init__(self, run: Run):
        """Starts it, in the chief; an earlier sitting's result is read instead."""
        config, self._log = run.config, run.log
        self._path = run.folder / "linear_models.json"
        self._process = None
        if not run.is_chief or self._path.exists():
            return
        counts = ",".join(map(str, [*config.counts_of_labels, 0]))
        command = [sys.executable, "-m", "trainer.stages.linear_models"]
        if run.store.remote:
            command.append(f"--url={run.config.store}")
        command += [f"--store={run.store.folder}", f"--labels={counts}", f"--out={self._path}"]
        command += [f"--draws={config.label_draws}", f"--seed={config.seed}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def rows(self) -> list[Row]:
        """Returns the rows of the report's table, after waiting for them; none if it failed."""
        if self._process is not None:
            if not self._path.exists():
                self._log("compare: waiting for the linear models")
            if self._process.wait():
                self._log("warning: the linear models failed, and are missing in the table")
        return json.loads(self._path.read_text()) if self._path.exists() else []

    def close(self) -> None:
        """Ends the program if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
