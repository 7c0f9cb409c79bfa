"""The loop's bookkeeping by itself: what is due, counted, kept and remembered."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import loop_settings
from trainer.distribution.tf_distribute import one_device
from trainer.training.checkpoint import Checkpointer
from trainer.training.health import NonFiniteError
from trainer.training.progress import Progress, steps_until_due
from trainer.training.task import Task
from trainer.training.train_step import Outcome

BATCHES = loop_settings.TokenBatches(np.ones((8, 2, 2)))


class Kept:
    """A task of one weight, its progress, and the lines of its log."""

    def __init__(self, folder: Path, metrics: list[dict[str, float]], **flags: Any):
        stage = loop_settings.stage(steps=8, evaluate_every_steps=2, **flags)
        self.folder = folder
        self.lines: list[str] = []
        run = loop_settings.run(one_device(), log=self.lines.append, **flags)
        self.weight = keras.Variable(0.0)
        evaluations = iter(metrics)
        self.task = Task(
            "finetune", folder, stage, {"w": self.weight}, None, lambda: next(evaluations),
            select_by="error",
        )  # fmt: skip
        self.checkpoints = Checkpointer(folder / "c", run.distributor, self.task.state, run.log)
        self.progress = Progress(run, self.task, BATCHES, self.checkpoints, None)

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]


def outcome(loss: float, norm: float = 1.0) -> Outcome:
    return Outcome(*map(tf.constant, (loss, 4.0, 0.0, [norm])))


def test_what_is_due_next() -> None:
    config = loop_settings.config(
        log_every_steps=5, checkpoint_every_steps=7, profile_steps="12:13"
    )
    stage = loop_settings.stage(steps=20, evaluate_every_steps=9)
    task = Task("pretrain", Path(), stage, {}, None, dict)
    steps, step = [], 0
    while step < 20:
        step += steps_until_due(config, task, step)
        steps.append(step)
    assert steps == [5, 7, 9, 10, 11, 13, 14, 15, 18, 20]
    assert [step for step in range(21) if task.is_evaluated(step)] == [9, 18, 20]


def test_a_status_line_is_of_the_steps_since_the_last(tmp_path: Path) -> None:
    kept = Kept(tmp_path, [])
    kept.progress.count(1, outcome(9.0), None, None)  # its time does not count, its loss does
    kept.progress.count(2, outcome(3.0), 0.5, 0.5)
    kept.progress.report(2)
    kept.progress.count(3, outcome(1.0), 2.0, 0.0)
    kept.progress.report(3)
    first, second = kept.metrics()
    assert (first["loss"], first["tokens_per_second"], first["input_wait_percent"]) == (6, 8, 50)
    assert (second["loss"], second["tokens_per_second"], second["input_wait_percent"]) == (1, 2, 0)
    assert "finetune step 2/8 · epoch 0.25 · loss 6.0000 · 8 tokens/s" in kept.lines[0]


def test_the_best_weights_are_kept_over_a_resumed_run(tmp_path: Path) -> None:
    kept = Kept(tmp_path, [{"error": 5.0}, {"error": 2.0}, {"error": 3.0}])
    for step in (2, 4, 6):
        kept.weight.assign(float(step))
        assert kept.progress.evaluation_is_due(step)
        assert kept.progress.evaluate(step) and not kept.progress.evaluation_is_due(step)
    kept.progress.save(6)
    assert kept.checkpoints.wait()
    assert [line.endswith("best so far") for line in kept.lines] == [True, True, False]

    resumed = Kept(tmp_path, [{"error": 4.0}])
    assert resumed.progress.resume() == 6
    assert float(resumed.weight) == 6.0
    assert resumed.progress.evaluate(8)
    result = resumed.progress.finish()
    assert (result.step, result.metrics, float(resumed.weight)) == (4, {"error": 2.0}, 4.0)


def test_early_stopping_counts_evaluations_without_a_better_one(tmp_path: Path) -> None:
    errors = [5.0, 2.0, 2.0, 1.0, 3.0, 3.0]
    kept = Kept(tmp_path, [{"error": error} for error in errors], early_stopping=2)
    stopped = []
    for step in range(2, 14, 2):
        kept.progress.evaluate(step)
        stopped.append(kept.progress.stops_early())
    assert stopped == [False] * 5 + [True]


def test_a_step_that_is_not_finite_is_skipped_or_stops(tmp_path: Path) -> None:
    kept = Kept(tmp_path, [], on_nonfinite="skip", max_skipped_steps=1)
    kept.progress.count(1, outcome(np.nan), 0.1, 0.0)
    assert kept.metrics()[0]["skipped_steps"] == 1
    assert "examples of the batch: 0, 1; skipped, 1 of 1" in kept.lines[0]
    with pytest.raises(NonFiniteError, match="step 2 .* w inf; examples of the batch: 10, 11;"):
        kept.progress.count(2, outcome(1.0, np.inf), 0.1, 0.0)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_the_remedy_for_gradients_that_explode_is_named(tmp_path: Path, clip_norm: float) -> None:
    kept = Kept(tmp_path, [], finetune_recurrent_clip_norm=clip_norm)
    with pytest.raises(NonFiniteError) as error:
        kept.progress.count(1, outcome(1.0, np.inf), 0.1, 0.0)
    assert ("--finetune_recurrent_clip_norm=1" in str(error.value)) == (not clip_norm)
