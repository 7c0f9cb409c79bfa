"""Every kind of write of the product, small: the state before it, the write, and how it is read.

`read` returns what a program that comes later finds, as text. It raises if that is damaged or
mixed: then the write is not safe.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import durable
from data_pipelines.errors import InputError
from data_pipelines.prepare import PrepareConfig, ensure_store
from data_pipelines.store.token_store import TokenStore
from launch.local import jobs
from tests.integration.damage import REPOSITORY, truncate
from trainer.config import Config
from trainer.distribution import run_lock
from trainer.distribution.tf_distribute import one_device
from trainer.inference import prediction_files
from trainer.models import bundle
from trainer.report_page import html
from trainer.reporting import environment, predictions, report_file
from trainer.reporting.metrics_file import Metrics
from trainer.reporting.predictions import Predictions
from trainer.safe_files import read_json, replace_text
from trainer.stages import run_stage
from trainer.training import precision
from trainer.training.checkpoint import Checkpointer


@dataclasses.dataclass(frozen=True)
class Write:
    """One kind of write, below a folder.

    Attributes:
        before: Makes the state before the write.
        write: May raise InputError or OSError if it cannot write.
        read: Returns what is found; equal texts mean that the same is found.
        is_kept: Whether the disk has the new content when `write` returns.
    """

    before: Callable[[Path], Any]
    write: Callable[[Path], Any]
    read: Callable[[Path], str]
    is_kept: bool = True


def nothing(folder: Path) -> None:
    """Makes nothing."""


def quiet(line: str) -> None:
    """Prints nothing."""


# ---- Checkpoints ----


def checkpointer(folder: Path, **settings: Any) -> Checkpointer:
    """Returns what saves and restores arrays alone: variables would need TensorFlow's threads."""
    found = Checkpointer(folder / "checkpoints", one_device(), {}, quiet, **settings)
    found.flushed_first = [folder / "metrics.jsonl"]
    return found


def save(folder: Path, *steps: int, **settings: Any) -> None:
    """Saves the checkpoints of these steps, in which all numbers are the step."""
    checkpoints = checkpointer(folder, **settings)
    for step in steps:
        arrays = {"weights": np.full(60, step, np.float32), "steps": np.full(1, step)}
        checkpoints.save(step, {"step": step}, arrays, float(step))
    checkpoints.wait()


def restored(folder: Path) -> str:
    """Returns the step that a run resumes from; AssertionError if two steps are mixed."""
    found = checkpointer(folder).restore()
    if found is None:
        return "none"
    step, notes, arrays = found
    assert notes == {"step": step}
    assert {number for array in arrays.values() for number in array.tolist()} == {step}
    return f"step {step}"


def damage_newest(folder: Path) -> None:
    """Saves two checkpoints and damages the second."""
    save(folder, 1, 2)
    truncate(folder / "checkpoints" / "step-00000002" / "state.json")


def log_and_save(folder: Path, *steps: int) -> None:
    """Writes a line of metrics.jsonl before each checkpoint, as the loop does."""
    for step in steps:
        Metrics(folder / "metrics.jsonl", "pretrain").write(step, loss=1.0)
        save(folder, step)


def restored_with_metrics(folder: Path) -> str:
    """Returns the step; AssertionError if the line of that step is lost."""
    found = restored(folder)
    last = 0 if found == "none" else int(found.removeprefix("step "))
    assert [line["step"] for line in metric_lines(folder)][:last] == [*range(1, last + 1)]
    return found


# ---- Bundles and predictions ----


def save_bundle(folder: Path, name: str, number: int) -> None:
    """Writes a bundle in which all are this number."""
    vocab = REPOSITORY / "tests" / "faults" / "words.txt"
    tensors = {"a": np.full(40, number, np.float32), "b": np.full(3, number, np.int64)}
    info = {"number": number}
    bundle.save(folder / name, name, tensors, info, None if name == "task" else vocab)


def read_bundle(folder: Path, name: str) -> str:
    """Returns its number; raises if its files do not belong together."""
    if not (folder / name).exists():
        return "none"
    info = read_json(folder / name / f"{name}.json")
    path = folder / name / f"{name}.safetensors"
    tensors = bundle.read_tensors(path, info["tensors"])
    assert bundle.digest(tensors) == info["tensors_sha256"]
    assert {number for array in tensors.values() for number in array} == {info["number"]}
    if name != "task":
        assert (folder / name / "vocab.txt").read_text().endswith("the\n")
    return str(info["number"])


def save_without_exchange(folder: Path, name: str, number: int) -> None:
    """Writes a bundle as on a file system that cannot exchange two names."""
    durable._exchanged = lambda one, other: False
    save_bundle(folder, name, number)


def read_without_exchange(folder: Path, name: str) -> str:
    """Returns its number, also if only the copy is there that the next write puts back."""
    if (folder / name).exists() or not (folder / f".{name}.replaced").exists():
        return read_bundle(folder, name)
    (folder / f".{name}.replaced").rename(folder / name)
    return read_bundle(folder, name)


def save_predictions(folder: Path, number: int) -> None:
    """Writes predictions whose logits are this number."""
    label = np.zeros(3, np.int32)
    states = dict.fromkeys(("state/h", "state/c"), np.ones((3, 2), np.float32))
    tensors = {"document": np.arange(3), "label": label, "state/label": label, **states}
    tensors |= {"logits": np.full((3, 1), number, np.float32)}
    predictions.write(folder / "predictions", Predictions(tensors, {"classes": 2, "examples": []}))


def read_predictions(folder: Path) -> str:
    """Returns their number."""
    found = predictions.read(folder / "predictions").tensors["logits"]
    assert len({*found.ravel().tolist()}) == 1
    return str(found[0, 0])


# ---- Files of a run ----


def start_run(folder: Path, seed: int) -> None:
    """Writes what a run writes when it starts."""
    environment.describe = dict  # versions, which take seconds to find
    run_stage.remember_config(Config(run_dir=str(folder / "run"), seed=seed))


def read_start(folder: Path) -> str:
    """Returns the seeds of both files; a next start writes both again."""
    path = folder / "run" / "config.json"
    found = read_json(path)["seed"] if path.exists() else "none"
    path = folder / "run" / "config.cfg"
    lines = path.read_text().splitlines() if path.exists() else ["--seed=none"]
    environment_ = folder / "run" / "environment.json"
    assert not environment_.exists() or read_json(environment_) == {}
    (flag,) = [line for line in lines if line.startswith("--seed=")] or ["--seed=0"]
    last = flag.removeprefix("--seed=")
    return last if last == str(found) else "none" if "none" in (found, last) else "1"


def write_page(folder: Path, steps: int) -> None:
    """Writes report.html of a run of so many steps."""
    html.time.time = lambda: 1e9
    start_run(folder, 1)
    write_metrics(folder / "run", steps)
    html.write([folder / "run"], folder / "report.html")


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file, "none" if it is missing."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines that a resumed run keeps."""
    path = folder / "metrics.jsonl"
    Metrics(path, "pretrain").forget_after(10**9)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_metrics(folder: Path, *steps: int) -> None:
    """Appends a line for each step, unless it is the last one already: as a resumed run does."""
    for step in steps:
        metrics = Metrics(folder / "metrics.jsonl", "pretrain")
        metrics.forget_after(step - 1)
        metrics.write(step, loss=1.0)


def read_metrics(folder: Path) -> str:
    """Returns the steps that are there."""
    return str([line["step"] for line in metric_lines(folder)])


def choose_precision(folder: Path) -> None:
    """Chooses a precision and keeps it."""
    precision._faster = lambda sizes, log: "float32"  # the measurement
    precision.resolved(Config(precision="auto"), one_device(), folder, quiet)


def write_table(folder: Path, rows: int) -> None:
    """Writes a table of predictions, as predict does."""
    with prediction_files.opened(f"csv:{folder}/out.csv") as file:
        for row in range(rows):
            file.write(f"{row},{rows}\n" * 1000)


def hold_lock(folder: Path) -> None:
    """Takes the lock of a run's folder, and lets go of it."""
    with run_lock.held(folder / "run", quiet, {}):
        pass


def write_job(folder: Path, workers: int) -> None:
    """Writes the record of a local job."""
    job = jobs.Job(["true"], workers, "host", 1, 1, 0.0)
    jobs._write(folder, job)


def text(name: str, folder: Path) -> str:
    """Returns a file's text, "none" if it is missing."""
    path = folder / name
    return path.read_text() if path.exists() else "none"


# ---- Stores ----


def write_rows(folder: Path) -> None:
    """Writes a table of a few documents."""
    rows = [f"{'good' if n % 2 else 'bad'} film {n % 3},{n % 2},{n % 3}\n" for n in range(60)]
    (folder / "rows.csv").write_text("text,label,author\n" + "".join(rows))


def prepare(folder: Path) -> None:
    """Builds a store of them, or opens it."""
    source = folder / "rows.csv"
    os.utime(source, (1e9, 1e9))  # drafts are of a file of that time
    config = PrepareConfig(source=f"csv:train={source}", tokenizer="byte", context_key="author")
    ensure_store(config, folder / "store", quiet)


def read_store(folder: Path) -> str:
    """Returns "whole", "none", or raises if it is damaged."""
    if not (folder / "store" / "manifest.json").exists():
        assert not (folder / "store").exists()
        return "none"
    TokenStore(folder / "store").verify()
    return "whole"


def _bundles() -> dict[str, Write]:
    def of(name: str, write: Callable = save_bundle, read: Callable = read_bundle) -> Write:
        one = functools.partial(write, name=name, number=1)
        return Write(one, functools.partial(write, name=name, number=2),
                     functools.partial(read, name=name))  # fmt: skip

    first = functools.partial(save_bundle, name="encoder", number=1)
    read = functools.partial(read_bundle, name="encoder")
    return {
        "encoder bundle, the first": Write(nothing, first, read),
        **{f"{name} bundle, replaced": of(name) for name in
           ("encoder", "classifier", "decoder", "task")},
        "encoder bundle, replaced without an exchange":
            of("encoder", save_without_exchange, read_without_exchange),
    }  # fmt: skip


def _partial(function: Callable, **given: Any) -> Callable[[Path], Any]:
    return functools.partial(function, **given)


WRITES = {
    "checkpoint, the first": Write(nothing, lambda f: save(f, 1), restored),
    "checkpoint, one more": Write(lambda f: save(f, 1, 2), lambda f: save(f, 3), restored),
    "checkpoint, the same step again": Write(lambda f: save(f, 1), lambda f: save(f, 1), restored),
    "checkpoint, with the best": Write(
        lambda f: save(f, 1, 2, 3, keep_best=1),
        lambda f: save(f, 4, keep_best=1), restored,
    ),
    "checkpoint, and the lines before it": Write(
        lambda f: log_and_save(f, 1), lambda f: log_and_save(f, 2), restored_with_metrics),
    "damaged checkpoint, set aside": Write(damage_newest, restored, restored),
    "checkpoints, forgotten": Write(
        lambda f: save(f, 1, 2), lambda f: checkpointer(f).forget(), restored),
    **_bundles(),
    "predictions": Write(
        lambda f: save_predictions(f, 1), lambda f: save_predictions(f, 2), read_predictions),
    "config.json, config.cfg, environment.json, the first": Write(
        nothing, lambda f: start_run(f, 1), read_start),
    "config.json, config.cfg, environment.json": Write(
        lambda f: start_run(f, 1), lambda f: start_run(f, 2), read_start),
    "report.json": Write(
        lambda f: report_file.write(f, {"n": 1}), lambda f: report_file.write(f, {"n": 2}),
        lambda f: str(read_json(f / "report.json"))),
    "report.html": Write(
        lambda f: write_page(f, 1), lambda f: write_page(f, 2),
        lambda f: digest_of(f / "report.html"),
    ),
    "metrics.jsonl, a line": Write(
        lambda f: write_metrics(f, 1, 2), lambda f: write_metrics(f, 3), read_metrics,
        is_kept=False),
    "metrics.jsonl, cut at a resume": Write(
        lambda f: write_metrics(f, 1, 2, 3),
        lambda f: Metrics(f / "metrics.jsonl", "pretrain").forget_after(2), read_metrics),
    "precision.txt": Write(nothing, choose_precision, lambda f: precision._remembered(
        f / "precision.txt")),
    "table of predictions": Write(
        lambda f: write_table(f, 2), lambda f: write_table(f, 3), lambda f: text("out.csv", f)),
    "run.lock": Write(nothing, hold_lock, lambda f: str(hold_lock(f)), is_kept=False),
    "token store": Write(write_rows, prepare, read_store),
    "job of the local launcher": Write(
        lambda f: write_job(f, 1), lambda f: write_job(f, 2), lambda f: text("job.json", f),
        is_kept=False),
}  # fmt: skip

__all__ = ["WRITES", "InputError", "Write", "replace_text"]
