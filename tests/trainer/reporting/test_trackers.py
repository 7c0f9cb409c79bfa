import json
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.errors import InputError
from tests.trainer.report_page.test_html import write_run
from trainer.distribution.preemption import Preempted
from trainer.reporting import trackers
from trainer.reporting.metrics_file import Metrics
from trainer.safe_files import sealed, specs, tensor_parts

WORDS = ["good", "bad", "film"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Returns the folder of a run that has ended, with an encoder of three words."""
    folder = write_run(tmp_path / "run", " film")
    encoder = folder / "pretrain" / "encoder"
    table = {"embeddings": np.arange(12, dtype=np.float32).reshape(6, 2)}
    (encoder / "encoder.json").write_bytes(sealed({"tensors": specs(table)}))
    (encoder / "encoder.safetensors").write_bytes(b"".join(map(bytes, tensor_parts(table))))
    (encoder / "vocab.txt").write_text("\n".join(["<pad>", "<unk>", "<eos>", *WORDS, ""]))
    return folder


def make(name: str) -> trackers.Tracker:
    """Returns a tracker that may not fail."""

    def fail(line: str) -> None:
        raise AssertionError(line)

    return trackers.make_trackers(name, fail)[0]


def follow(tracker: trackers.Tracker, folder: Path) -> None:
    """Tells the tracker of two steps and of the end."""
    tracker.begin(folder, {"seed": 3, "units": 40, "stage": "all"})
    for part in ("pretrain", "warm"):
        metrics = Metrics(folder / part / "metrics.jsonl", "pretrain", [tracker])
        for step in (10, 20):
            metrics.write(step, loss=1 / step, tokens_per_second=5.0)
    (folder / "report.html").write_text("page")
    tracker.end("finished", {"test_error_percent": {"warm": 12.5}})


class Notes:
    """A tracker that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def begin(self, folder: Path, config: dict) -> None:
        self.told.append(("begin", config["seed"]))

    def scalars(self, part: str, step: int, values: dict) -> None:
        self.told.append((part, step, values))

    def end(self, status: str, report: dict) -> None:
        self.told.append((status, report.get("test_error_percent")))


def test_a_tracker_is_told_what_metrics_jsonl_holds(run: Path) -> None:
    notes = Notes()
    follow(notes, run)
    assert notes.told == [
        ("begin", 3),
        ("pretrain", 10, {"loss": 0.1, "tokens_per_second": 5.0}),
        ("pretrain", 20, {"loss": 0.05, "tokens_per_second": 5.0}),
        ("warm", 10, {"loss": 0.1, "tokens_per_second": 5.0}),
        ("warm", 20, {"loss": 0.05, "tokens_per_second": 5.0}),
        ("finished", {"warm": 12.5}),
    ]


class ServerAway(Notes):
    """A tracker that notes what it is told, and raises from the `calls`-th call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __getattribute__(self, name: str) -> Any:
        if name in ("begin", "scalars", "end"):
            self.calls -= 1
            if self.calls < 0:
                raise ConnectionError("the server\nis away")
        return super().__getattribute__(name)


@pytest.mark.parametrize("calls", range(6))
def test_the_first_error_of_a_tracker_is_logged_and_it_is_told_no_more(
    run: Path, calls: int
) -> None:
    lines: list[str] = []
    away = ServerAway(calls)
    follow(trackers.Guarded("mlflow", away, lines.append), run)
    assert len(away.told) == calls and away.calls == -1
    assert lines == [
        "warning: --track=mlflow is off from here on; the run continues: "
        "ConnectionError: the server is away"
    ]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Preempted("TERM"), "killed"),
        (KeyboardInterrupt(), "killed"),
        (InputError("not finite"), "failed"),
        (MemoryError(), "failed"),
    ],
)
def test_a_run_that_does_not_finish_is_closed(run: Path, error: BaseException, status: str) -> None:
    notes = Notes()
    with pytest.raises(type(error)), trackers.following([notes], run, {"seed": 3}):
        raise error
    assert notes.told == [("begin", 3), (status, None)]


def test_a_run_that_finishes_is_closed_once(run: Path) -> None:
    notes = Notes()
    guarded = trackers.Guarded("notes", notes, pytest.fail)
    raised = pytest.raises(OSError, match="of what comes after")
    with raised, trackers.following([guarded], run, {"seed": 3}):
        guarded.end("finished", {"test_error_percent": {}})
        raise OSError("of what comes after")
    assert notes.told == [("begin", 3), ("finished", {})]


def test_tensorboard_where_it_cannot_write_ends_nothing(run: Path) -> None:
    pytest.importorskip("tensorboard")
    (run / "tensorboard").write_text("a file in the place of the folder")
    lines: list[str] = []
    follow(trackers.make_trackers("tensorboard", lines.append)[0], run)
    (line,) = lines
    assert line.startswith("warning: --track=tensorboard is off from here on") and "\n" not in line


@pytest.mark.parametrize("status", ["killed", "failed"])
def test_tensorboard_keeps_what_a_run_came_to_that_did_not_finish(run: Path, status: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make("tensorboard")
    tracker.begin(run, {"seed": 3})
    tracker.scalars("warm", 1, {"loss": 0.5})
    tracker.end(status, {})
    events = EventAccumulator(str(run / "tensorboard" / "warm"))
    events.Reload()
    assert [event.step for event in events.Tensors("loss")] == [1]


def test_names_that_are_wrong_or_not_installed_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    first, second = trackers.faults_of("tensorbord, mlflow")
    assert "'tensorbord' is not one of tensorboard, mlflow, wandb" in first
    assert "pip install -e '.[mlflow]'" in second
    assert trackers.faults_of("") == [] and trackers.make_trackers("", print) == []


def test_tensorboard_reads_scalars_flags_texts_and_embeddings(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(make("tensorboard"), run)
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
    follow(make("mlflow"), run)
    (kept,) = mlflow.MlflowClient().search_runs(["0"])
    assert kept.data.params["seed"] == "3"
    assert kept.data.metrics["warm/loss"] == pytest.approx(0.05)
    assert kept.info.status == "FINISHED"
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(kept.info.run_id)}
    assert names == {"report.json", "report.html"}
    killed = make("mlflow")
    killed.begin(run, {"seed": 4})
    killed.end("killed", {})
    ended = mlflow.MlflowClient().search_runs(["0"], "params.seed = '4'")
    assert [again.info.status for again in ended] == ["KILLED"]


def test_a_server_of_mlflow_that_is_away_costs_seconds(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # nobody listens there once it is closed
    for name in ("MAX_RETRIES", "TIMEOUT"):  # what `begin` sets goes with the test
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "")
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
    lines: list[str] = []
    began = time.monotonic()
    follow(trackers.make_trackers("mlflow", lines.append)[0], run)
    assert len(lines) == 1 and "--track=mlflow is off" in lines[0]
    assert time.monotonic() - began < 60


def test_wandb_works_offline(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    follow(make("wandb"), run)
    assert list((run / "wandb").glob("offline-run-*"))
    assert json.loads((run / "report.json").read_text())["stage"] == "all"
    for status in ("killed", "failed"):
        stopped = make("wandb")
        stopped.begin(run, {"seed": 3})
        stopped.end(status, {})
