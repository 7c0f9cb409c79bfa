import json
from pathlib import Path

import numpy as np
import pytest

from trainer.report_page import run_folder
from trainer.safe_files import sealed, specs, tensor_parts

EXAMPLE = {
    "document": 7,
    "label": 1,
    "predicted": 0,
    "probability": 0.75,
    "pieces": ["good", " film"],
    "contributions": [-0.5, 0.25],
}


def write_predictions(folder: Path, changes: dict | None = None, **tensors: np.ndarray) -> None:
    """Writes the predictions of 4 documents, two of them wrong."""
    held = {
        "document": np.array([3, 0, 2, 7]),
        "label": np.array([0, 1, 0, 1], np.int32),
        "logits": np.array([[-1.0], [2.0], [3.0], [-1.0986]], np.float32),
        "state/label": np.array([0, 1, 1], np.int32),
        "state/h": np.eye(3, 5, dtype=np.float32),
        "state/c": 2 * np.eye(3, 5, dtype=np.float32),
    } | tensors
    info = {
        "split": "test",
        "classes": 2,
        "class_names": None,
        "init_weights": "encoder",
        "initial_state": "learned",
        "examples": [EXAMPLE],
        "tensors": specs(held),
    } | (changes or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.json").write_bytes(sealed(info))
    (folder / "predictions.safetensors").write_bytes(b"".join(map(bytes, tensor_parts(held))))


def write_metrics(folder: Path, *lines: dict | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(text))


def test_parts_of_a_whole_run(tmp_path: Path) -> None:
    write_metrics(tmp_path / "pretrain", {"stage": "pretrain", "step": 10, "loss": 2.5})
    write_predictions(tmp_path / "warm" / "predictions")
    found = run_folder.read(tmp_path)
    assert list(found.parts) == ["pretrain", "warm"] and not found.faults
    assert found.parts["pretrain"].metrics == [{"stage": "pretrain", "step": 10, "loss": 2.5}]
    predictions = found.parts["warm"].predictions
    assert predictions.is_wrong.tolist() == [False, False, True, True]
    assert predictions.probability_of(np.zeros(4, int))[3] == pytest.approx(0.75, abs=1e-4)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"init_weights": "random", "initial_state": "zero"}, "scratch"),
        ({"init_weights": "random", "initial_state": "mean"}, "warm"),
        ({}, "classifier"),
    ],
)
def test_a_fine_tuning_alone_is_called_by_its_start(
    tmp_path: Path, config: dict, name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_metrics(tmp_path, {"stage": "finetune", "step": 1, "loss": 0.5})
    assert list(run_folder.read(tmp_path).parts) == [name]


def test_a_half_written_line_is_left_out_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    good = {"stage": "pretrain", "step": 1, "loss": 1.0, "unix_time": 5.5}
    write_metrics(
        tmp_path,
        good,
        '{"stage": "pretrain", "step": 2, "loss": NaN}\n',
        "[1]\n",
        "[" * 100_000 + "\n",
        '{"stage": "pretrain", "st',
    )
    found = run_folder.read(tmp_path)
    assert found.parts["pretrain"].metrics == [good, {"stage": "pretrain", "step": 2}]
    assert found.last_written == 5.5
    (fault,) = found.faults
    assert "metrics.jsonl: 2 damaged lines" in fault


@pytest.mark.parametrize(
    ("changes", "tensors", "says"),
    [
        ({"classes": 3}, {}, "logits of shape (4, 1)"),
        ({"classes": 1}, {}, "'classes' is 1"),
        ({}, {"label": np.array([0, 1, 0, 2], np.int32)}, "not a class"),
        ({}, {"label": np.array([0, 1, 0], np.int32)}, "for 3 labels"),
        ({}, {"logits": np.full((4, 1), np.nan, np.float32)}, "not finite"),
        ({}, {"state/h": np.zeros((2, 5), np.float32)}, "'state/h' is of shape (2, 5)"),
        ({"examples": [EXAMPLE | {"contributions": [1.0]}]}, {}, "an example"),
        ({"examples": [EXAMPLE | {"label": 9}]}, {}, "an example"),
        ({"examples": [EXAMPLE | {"pieces": [1, 2]}]}, {}, "an example"),
        ({"examples": [EXAMPLE | {"probability": "x"}]}, {}, "an example"),
        ({"examples": [3]}, {}, "an example"),
        ({"examples": {}}, {}, "not a list"),
        ({"tensors": {}}, {}, "damaged"),
    ],
)
def test_damaged_predictions_are_told_and_left_out(
    tmp_path: Path, changes: dict, tensors: dict, says: str
) -> None:
    write_metrics(tmp_path, {"stage": "finetune", "step": 1, "loss": 0.5})
    write_predictions(tmp_path / "predictions", changes, **tensors)
    found = run_folder.read(tmp_path)
    (fault,) = found.faults
    assert says in fault
    assert found.parts["classifier"].predictions is None


def test_flags_in_a_damaged_report_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"config": [1]}')
    write_predictions(tmp_path / "predictions", {"init_weights": None})
    write_metrics(tmp_path, {"stage": "finetune", "step": 1, "loss": 0.5})
    assert run_folder.read(tmp_path).config == {}
    (tmp_path / "predictions" / "predictions.json").unlink()
    assert list(run_folder.read(tmp_path).parts) == ["classifier"]


def test_a_folder_of_something_else_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        run_folder.read(tmp_path)
