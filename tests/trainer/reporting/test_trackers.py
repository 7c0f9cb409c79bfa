import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.reporting.test_html import write_run
from trainer.reporting import trackers
from trainer.reporting.status import Metrics
from trainer.safe_files import sealed, specs, tensor_bytes

WORDS = ["good", "bad", "film"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Returns the folder of a run that has ended, with an encoder of three words."""
    folder = write_run(tmp_path / "run", " film")
    encoder = folder / "pretrain" / "encoder"
    table = {"embeddings": np.arange(12, dtype=np.float32).reshape(6, 2)}
    (encoder / "encoder.json").write_bytes(sealed({"tensors": specs(table)}))
    (encoder / "encoder.safetensors").write_bytes(tensor_bytes(table))
    (encoder / "vocab.txt").write_text("\n".join(["<pad>", "<unk>", "<eos>", *WORDS, ""]))
    return folder


def follow(tracker: trackers.Tracker, folder: Path) -> None:
    """Tells the tracker of two steps and of the end."""
    tracker.begin(folder, {"seed": 3, "units": 40, "stage": "all"})
    for part in ("pretrain", "warm"):
        metrics = Metrics(folder / part / "metrics.jsonl", "pretrain", [tracker])
        for step in (10, 20):
            metrics.write(step, loss=1 / step, tokens_per_second=5.0)
    (folder / "report.html").write_text("page")
    tracker.end({"test_error_percent": {"warm": 12.5}})


class Notes:
    """A tracker that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def begin(self, folder: Path, config: dict) -> None:
        self.told.append(("begin", config["seed"]))

    def scalars(self, part: str, step: int, values: dict) -> None:
        self.told.append((part, step, values))

    def end(self, report: dict) -> None:
        self.told.append(("end", report["test_error_percent"]))


def test_a_tracker_is_told_what_metrics_jsonl_holds(run: Path) -> None:
    notes = Notes()
    follow(notes, run)
    assert notes.told == [
        ("begin", 3),
        ("pretrain", 10, {"loss": 0.1, "tokens_per_second": 5.0}),
        ("pretrain", 20, {"loss": 0.05, "tokens_per_second": 5.0}),
        ("warm", 10, {"loss": 0.1, "tokens_per_second": 5.0}),
        ("warm", 20, {"loss": 0.05, "tokens_per_second": 5.0}),
        ("end", {"warm": 12.5}),
    ]


def test_names_that_are_wrong_or_not_installed_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    first, second = trackers.faults_of("tensorbord, mlflow")
    assert "'tensorbord' is not one of tensorboard, mlflow, wandb" in first
    assert "pip install -e '.[mlflow]'" in second
    assert trackers.faults_of("") == [] and trackers.make_trackers("") == []


def test_tensorboard_reads_scalars_flags_texts_and_embeddings(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(trackers.make_trackers("tensorboard")[0], run)
    folder = run / "tensorboard"

    def tags(part: str) -> dict[str, tuple]:
        events = EventAccumulator(str(folder / part))
        events.Reload()
        return {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}

    loss = tags("warm")["loss"]
    values = [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in loss]
    assert values == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    found = tags("run")
    assert "test_error_percent/warm" in found
    text = found["warm/document 1"][0].tensor_proto.string_val[0].decode()
    assert text.startswith("label 1, predicted 0 at 75.0 %") and text.endswith("<i> film")
    assert any("hparams" in tag for tag in found)
    rows = (folder / "run" / "embeddings.tsv").read_text().splitlines()
    words = (folder / "run" / "words.tsv").read_text().splitlines()
    assert dict(zip(words, rows, strict=True)) == {
        "good": "6\t7",
        "bad": "8\t9",
        "film": "10\t11",
    }
    assert "embeddings.tsv" in (folder / "run" / "projector_config.pbtxt").read_text()


def test_mlflow_keeps_the_run_in_a_local_store(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/store")
    follow(trackers.make_trackers("mlflow")[0], run)
    (kept,) = mlflow.MlflowClient().search_runs(["0"])
    assert kept.data.params["seed"] == "3"
    assert kept.data.metrics["warm/loss"] == pytest.approx(0.05)
    assert kept.info.status == "FINISHED"
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(kept.info.run_id)}
    assert names == {"report.json", "report.html"}


def test_wandb_works_offline(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    follow(trackers.make_trackers("wandb")[0], run)
    assert list((run / "wandb").glob("offline-run-*"))
    assert json.loads((run / "report.json").read_text())["stage"] == "all"
