"""--lr_range: the rates that it takes, what it suggests, and a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.integration.programs import run, train
from trainer.config import Config, rate_range
from trainer.report_page import html, run_folder
from trainer.stages import lr_range
from trainer.training.schedules import LearningRate, rate_in_range


def test_the_rate_rises_geometrically() -> None:
    stage = Config(lr_range="1e-4:1", finetune_steps=9, finetune_schedule="cosine").of_stage(
        "finetune"
    )
    rates = [float(LearningRate(stage)(tf.constant(step))) for step in range(9)]
    np.testing.assert_allclose(rates, 10.0 ** np.linspace(-4, 0, 9), rtol=1e-4)
    np.testing.assert_allclose([rate_in_range(stage, step) for step in range(9)], rates, rtol=1e-4)
    assert stage.evaluate_every_steps == stage.early_stopping == 0
    assert Config(lr_range="1e-4:1").of_stage("pretrain").schedule == "range"


@pytest.mark.parametrize("text", ["1", "1:", "0:1", "1:1", "2:1", "1e-3:1e999", "a:b", "1.2.3:4"])
def test_what_is_no_range(text: str) -> None:
    assert rate_range(text) is None
    assert rate_range("1e-5:0.5") == (1e-5, 0.5)


def test_the_suggestion_is_below_the_lowest_loss() -> None:
    stage = Config(lr_range="1e-5:1", finetune_steps=200).of_stage("finetune")
    lines = []
    for step in range(5, 201, 5):
        place = math.log10(rate_in_range(stage, step - 3))
        loss = 2 - 1.5 / (1 + math.exp(-3 * (place + 3))) + math.exp(4 * (place + 1))
        lines.append({"step": step, "loss": loss})
    lines.insert(3, {"step": 20, "skipped_steps": 1})
    found = lr_range.points(lines, stage)
    assert len(found) == 40 and 1e-3 < lr_range.suggestion(found) < 1e-2
    report = {"stage": "finetune", "suggestion": 0.003, "points": found}
    assert (
        lr_range.table(report).splitlines()[-1].startswith("Try --finetune_learning_rate=0.003: ")
    )
    empty = {**report, "suggestion": None, "points": []}
    assert lr_range.table(empty).endswith("no loss was finite")


def test_a_run_reports_the_losses_and_writes_no_bundle(small_store: Path, tmp_path: Path) -> None:
    flags = (f"--store={small_store}", "--lr_range=1e-3:30", "--optimizer=sgd")
    flags = (*flags, "--stage=finetune", "--init_weights=random", "--initial_state=zero")
    printed = train(1, *flags, "--finetune_steps=60", f"--run_dir={tmp_path}/a")
    assert "Try --finetune_learning_rate=" in printed and "validation" not in printed
    report = json.loads((tmp_path / "a" / "report.json").read_text())["lr_range"]
    rates = [point["learning_rate"] for point in report["points"]]
    np.testing.assert_allclose(rates, np.geomspace(1e-3, 30, 60), rtol=1e-6)
    assert report["points"][-1]["smoothed"] > min(p["smoothed"] for p in report["points"])
    assert not (tmp_path / "a" / "classifier").exists()
    page = html.page([run_folder.read(tmp_path / "a")], made_at=0)
    assert "Loss while the learning rate rises" in page
    assert f"{report['suggestion']:g}</td>" in page
    done = run(1, *flags, "--stage=all", "--steps_per_call=2", f"--run_dir={tmp_path}/b")
    assert done.returncode == 2
    assert "--lr_range=1e-3:30 with --stage=all: use --stage=pretrain" in done.stderr
    assert "--lr_range=1e-3:30 with --steps_per_call=2" in done.stderr
