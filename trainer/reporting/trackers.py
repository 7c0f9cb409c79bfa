"""Sends a run's figures to TensorBoard, MLflow, or Weights & Biases.

A tracker gets the start of a run, each line of metrics, and the end; it can read the run's folder
for more. Only the chief has trackers. Their errors never end a training: the first error of a
tracker is logged, and the tracker is off from then on.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.distribution.preemption import Preempted
from trainer.reporting import predictions

# Names in --track -> package that it needs (the extra of the same name installs it).
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
PROJECTED_WORDS = 5_000


class Tracker(Protocol):
    """Follows a run."""

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Starts or resumes the run in `folder` with these flags."""

    def scalars(self, part: str, step: int, values: Mapping[str, float]) -> None:
        """Takes the values after `step` of "pretrain", "warm", "scratch" or "finetune"."""

    def end(self, status: str, report: Mapping[str, Any]) -> None:
        """Ends the run, or this start of it.

        Args:
            status: "finished"; "killed", by TERM; or "failed", by an error.
            report: report.json of a finished run; else empty.
        """


class Guarded:
    """A tracker whose errors are logged: an unreachable server must not end a training."""

    def __init__(self, name: str, tracker: Tracker, log: Callable[[str], None]):
        self._name = name
        self._tracker: Tracker | None = tracker
        self._log = log

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._tell("begin", folder, config)

    def scalars(self, part: str, step: int, values: Mapping[str, float]) -> None:
        self._tell("scalars", part, step, values)

    def end(self, status: str, report: Mapping[str, Any]) -> None:
        self._tell("end", status, report)
        self._tracker = None

    def _tell(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:  # whatever a foreign client raises
            self._tracker = None
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            off = f"--track={self._name} is off from here on"
            self._log(f"warning: {off}; the run continues: {why}")


def faults_of(track: str) -> list[str]:
    """Returns a line for each fault in the value of --track."""
    faults = []
    for name in names_of(track):
        if name not in PACKAGES:
            faults.append(f"--track={track}: {name!r} is not one of {', '.join(PACKAGES)}")
        elif importlib.util.find_spec(PACKAGES[name]) is None:
            faults.append(
                f"--track={track}: {name} is not installed: pip install -e '.[{name}]' "
                "in a clone of warmstate"
            )
    return faults


def names_of(track: str) -> list[str]:
    """Returns the names in the value of --track."""
    return [name.strip() for name in track.split(",") if name.strip()]


def make_trackers(track: str, log: Callable[[str], None]) -> list[Tracker]:
    """Returns the trackers that --track names; `log` gets their errors."""
    kinds: dict[str, type[Tracker]] = {
        "tensorboard": TensorBoard,
        "mlflow": MLflow,
        "wandb": WeightsAndBiases,
    }
    return [Guarded(name, kinds[name](), log) for name in names_of(track)]


@contextmanager
def following(
    trackers: Sequence[Tracker], folder: Path, config: Mapping[str, Any]
) -> Iterator[None]:
    """Starts the trackers, and ends them if the run is left by an error or TERM.

    A run that finishes ends them itself, with its report.
    """
    for tracker in trackers:
        tracker.begin(folder, config)
    try:
        yield
    except BaseException as error:
        killed = isinstance(error, Preempted | KeyboardInterrupt)
        for tracker in trackers:
            tracker.end("killed" if killed else "failed", {})
        raise


class TensorBoard:
    """Writes scalars, flags, texts and embeddings to RUN/tensorboard."""

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}
        from tensorboard.plugins.hparams import api

        with self._writer("run").as_default():
            api.hparams({k: v for k, v in config.items() if isinstance(v, int | float | str)})

    def _writer(self, part: str) -> Any:
        import tensorflow as tf

        if part not in self._writers:
            folder = self._folder / "tensorboard" / part
            self._writers[part] = tf.summary.create_file_writer(str(folder))
        return self._writers[part]

    def scalars(self, part: str, step: int, values: Mapping[str, float]) -> None:
        import tensorflow as tf

        with self._writer(part).as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step=int(step))

    def end(self, status: str, report: Mapping[str, Any]) -> None:
        if report:
            self._write_results(report)
        for writer in self._writers.values():
            writer.close()

    def _write_results(self, report: Mapping[str, Any]) -> None:
        import tensorflow as tf

        with self._writer("run").as_default():
            for name, value in report.get("test_error_percent", {}).items():
                tf.summary.scalar(f"test_error_percent/{name}", value, step=0)
            own = self._folder / "predictions"
            for folder in filter(Path.is_dir, (own, *self._folder.glob("*/predictions"))):
                found = predictions.read(folder).info
                for i, example in enumerate(found["examples"]):
                    tag = f"{predictions.start_of(found)}/document {i + 1}"
                    tf.summary.text(tag, as_text(example), step=0)
        write_projector(self._folder)


def as_text(example: Mapping[str, Any]) -> str:
    """Returns a document of predictions.json as text for TensorBoard."""
    words = "".join(example["pieces"])
    return (
        f"label {example['label']}, predicted {example['predicted']} "
        f"at {100 * example['probability']:.1f} %\n\n    {words}"
    )


def write_projector(folder: Path) -> None:
    """Writes the embeddings of the most frequent words for TensorBoard's projector.

    Args:
        folder: The run's. An encoder bundle in it, or in its part "pretrain", has the embeddings;
            without one nothing is written.
    """
    from data_pipelines.tokenizers.vocabulary import vocabulary_lines
    from trainer.safe_files import read_sealed, read_tensors

    found = [f for f in (folder / "encoder", folder / "pretrain" / "encoder") if f.is_dir()]
    if not found:
        return
    info = read_sealed(found[0] / "encoder.json")
    table = read_tensors(found[0] / "encoder.safetensors", info["tensors"])["embeddings"]
    lines = vocabulary_lines(found[0] / "vocab.txt")
    words, rows = lines[:PROJECTED_WORDS], table[len(table) - len(lines) :][:PROJECTED_WORDS]
    out = folder / "tensorboard" / "run"
    out.mkdir(parents=True, exist_ok=True)
    np.savetxt(out / "embeddings.tsv", rows, "%.5g", delimiter="\t")
    (out / "words.tsv").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    (out / "projector_config.pbtxt").write_text(
        'embeddings {\n  tensor_name: "embeddings"\n  tensor_path: "embeddings.tsv"\n'
        '  metadata_path: "words.tsv"\n}\n'
    )


class MLflow:
    """Records a run in MLflow, at $MLFLOW_TRACKING_URI or else in a local store."""

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        # By default it waits minutes for an unreachable server, longer than the other workers wait
        # for this one.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        self._folder = folder
        self._mlflow = mlflow
        self._run = mlflow.start_run(run_name=folder.name)
        mlflow.log_params(dict(config))

    def scalars(self, part: str, step: int, values: Mapping[str, float]) -> None:
        named = {f"{part}/{name}": value for name, value in values.items()}
        self._mlflow.log_metrics(named, step=int(step))

    def end(self, status: str, report: Mapping[str, Any]) -> None:
        files = [self._folder / name for name in ("report.json", "report.html") if report]
        for path in filter(Path.is_file, files):
            self._mlflow.log_artifact(str(path))
        self._mlflow.end_run(status.upper())


class WeightsAndBiases:
    """Records a run in Weights & Biases, by $WANDB_PROJECT and $WANDB_MODE (offline works)."""

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(name=folder.name, dir=str(folder), config=dict(config))

    def scalars(self, part: str, step: int, values: Mapping[str, float]) -> None:
        # Each stage counts from step 1, but W&B wants rising steps: each part has its own counter.
        self._run.log({f"{part}/{n}": v for n, v in values.items()} | {f"{part}/step": step})

    def end(self, status: str, report: Mapping[str, Any]) -> None:
        self._run.summary.update({"test_error_percent": report.get("test_error_percent", {})})
        if status == "killed":
            self._run.mark_preempting()
        self._run.finish(exit_code={"finished": 0, "killed": 143, "failed": 1}[status])


def tell(trackers: Sequence[Tracker], folder: Path, stage: str, line: Mapping[str, Any]) -> None:
    """Sends a line of a part's metrics.jsonl to the trackers.

    Args:
        folder: The part's.
        stage: "pretrain" or "finetune".
    """
    part = folder.name if folder.name in ("pretrain", "warm", "scratch") else stage
    values = {
        name: float(value)
        for name, value in line.items()
        if name not in ("stage", "step", "unix_time", "heartbeat")
        and isinstance(value, int | float)
    }
    for tracker in trackers if values else ():
        tracker.scalars(part, line["step"], values)
