"""What happens when a file of a checkpoint, a bundle or a store is damaged: every file, every way.

`python -m tests.integration.damage` prints the table of docs/faults.md; `--write` writes it there.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "faults.md"
BEGIN, END = "<!-- damage: begin -->\n", "<!-- damage: end -->\n"
NOBODY = 65534


def truncate(path: Path) -> None:
    """Cuts off the last bytes."""
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    """Flips the lowest bit of the last byte; in JSON, of the last digit."""
    data = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    data[digits[-1] if path.suffix == ".json" else -1] ^= 1
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    """Puts an empty folder in its place."""
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    """Puts a link to its good copy, elsewhere, in its place."""
    elsewhere = path.parent.parent / f"{path.name}.elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "a bit flipped": flip,
    "removed": Path.unlink,
    "a folder in its place": replace_by_folder,
    "a link in its place": replace_by_link,
    "unreadable": lambda path: path.chmod(0),
}


def make_bundle(folder: Path, name: str) -> None:
    """Writes a small bundle."""
    from trainer.distribution.variables import values_of
    from trainer.models import bundle
    from trainer.models.classifier import Classifier
    from trainer.models.encoder import Encoder

    vocab = folder / "words.txt"
    vocab.write_text("[PAD]\n[UNK]\n[END]\nthe\n")
    encoder = Encoder(4, 2, 3, seed=0)
    encoder.build()
    info = {"model": bundle.encoder_model(encoder), "vocab_sha256": "0" * 64}
    tensors = values_of(bundle.encoder_variables(encoder))
    if name == "decoder":
        info |= {"model": {"vocab_size": 4, "embedding_dim": 2, "units": 3, "tied": False}}
        info["encoder_sha256"] = "0" * 64
        tensors = {"softmax/kernel": np.ones((4, 3), np.float32), "softmax/bias": np.ones(4)}
    if name == "classifier":
        classifier = Classifier(encoder, 2, hidden_units=5)
        classifier.build()
        info["model"] = bundle.classifier_model(classifier)
        info["max_tokens"] = 10
        tensors = values_of(bundle.classifier_variables(classifier))
    bundle.save(folder / name, name, tensors, info, vocab)


def load_bundle(folder: Path, name: str) -> str:
    """Returns what a program that reads the bundle says."""
    from data_pipelines.errors import InputError
    from trainer.models import bundle

    try:
        bundle.load(folder / name, name, f"--{name}")
    except InputError as error:
        return str(error)
    return "not noticed"


def checkpointer(folder: Path, lines: list[str]):
    """Returns what saves and restores two variables."""
    import keras

    from trainer.distribution.cluster import Cluster
    from trainer.distribution.make import make_distributor
    from trainer.training.checkpoint import Checkpointer

    variables = {
        "weights": keras.Variable(np.arange(60, dtype=np.float32)),
        "steps": keras.Variable(3, dtype="int64"),
    }
    one = make_distributor("one_device", Cluster(0, 1), 10)
    return Checkpointer(folder / "checkpoints", one, variables, lines.append), variables


def make_checkpoints(folder: Path) -> None:
    """Writes two checkpoints."""
    checkpoints, variables = checkpointer(folder, [])
    for step in (1, 2):
        variables["weights"].assign(np.full(60, step, np.float32))
        checkpoints.save(step, {"seconds": 12345.0})
    checkpoints.wait()


def restore_checkpoint(folder: Path) -> str:
    """Returns what a run that resumes says; AssertionError unless it has the one before."""
    lines: list[str] = []
    checkpoints, variables = checkpointer(folder, lines)
    step, notes, _ = checkpoints.restore()
    if step == 2:
        return "not noticed"
    assert (step, notes) == (1, {"seconds": 12345.0})
    assert variables["weights"].numpy().tolist() == [1] * 60
    assert variables["steps"].numpy() == 3
    assert (folder / "checkpoints" / "step-00000002.damaged").is_dir()
    (line,) = lines
    return line


def verify_store(folder: Path) -> str:
    """Returns what a run with --verify=true says; one line for each fault."""
    from data_pipelines.errors import InputError
    from trainer.config import Config
    from trainer.distribution.cluster import Cluster
    from trainer.stages.run_stage import open_store

    if not (folder / "store" / "manifest.json").exists():
        return "(the store is made again from --source)"  # minutes of work, not for this table
    try:
        open_store(Config(store=str(folder / "store"), verify=True), Cluster(0, 1), print)
    except InputError as error:
        return str(error)
    return "not noticed"


def make_run(folder: Path) -> None:
    """Writes the files of a run beside its checkpoints."""
    from trainer.config import Config
    from trainer.reporting import predictions
    from trainer.reporting.metrics_file import Metrics
    from trainer.safe_files import replace_text

    run = folder / "run"
    run.mkdir()
    replace_text(run / "config.json", json.dumps(dataclasses.asdict(Config(run_dir="run"))))
    replace_text(run / "precision.txt", "float32\n")
    metrics = Metrics(run / "metrics.jsonl", "finetune")
    for step in (1, 2):
        metrics.write(step, loss=0.5)
    label = np.zeros(3, np.int32)
    states = dict.fromkeys(("state/h", "state/c"), np.ones((3, 2), np.float32))
    tensors = {"document": np.arange(3), "label": label, "state/label": label}
    tensors |= {"logits": np.ones((3, 1), np.float32), **states}
    found = predictions.Predictions(tensors, {"classes": 2, "examples": []})
    predictions.write(folder / "predictions", found)


def resume_run(folder: Path) -> str:
    """Returns what a run that resumes says of its small files."""
    from data_pipelines.errors import InputError
    from trainer import preflight
    from trainer.config import Config
    from trainer.distribution.tf_distribute import one_device
    from trainer.reporting.metrics_file import Metrics
    from trainer.training import precision

    run, said = folder / "run", []
    for name, means in (
        ("config.json", "(recorded again, and not compared with the flags that it began with)"),
        ("precision.txt", "(measured again)"),
        ("metrics.jsonl", "(the report has no curves of what was before)"),
    ):
        if not os.path.lexists(run / name):
            return means
    config = Config(run_dir="run")
    said += preflight.resume_faults(config, run)
    try:
        precision.resolved(Config(precision="auto"), one_device(), run, said.append)
    except InputError as error:
        said.append(str(error))
    try:
        if Metrics(run / "metrics.jsonl", "finetune").forget_after(2):
            said.append("warning: 1 damaged lines of metrics.jsonl were dropped")
        kept = (run / "metrics.jsonl").read_text().count("\n")
        if kept < 2:
            said.append("(a last line that is not complete is dropped: it was being written)")
    except OSError as error:
        said.append(f"{run}/metrics.jsonl cannot be read and written: {error.strerror}")
    if not said and json.loads((run / "config.json").read_text()) != dataclasses.asdict(config):
        return "(a flag that may change when a run resumes)"
    return "\n".join(said) or "not noticed"


def draw_predictions(folder: Path) -> str:
    """Returns what a report says; one line for each fault."""
    from trainer.report_page import run_folder

    (folder / "config.json").write_text('{"seed": 1}')  # so that it is a run's folder
    return "\n".join(run_folder.read(folder).faults) or "not noticed"


# Name -> the folder of its files, its reader.
ARTIFACTS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "checkpoint": ("checkpoints/step-00000002", restore_checkpoint),
    "encoder": ("encoder", lambda folder: load_bundle(folder, "encoder")),
    "classifier": ("classifier", lambda folder: load_bundle(folder, "classifier")),
    "decoder": ("decoder", lambda folder: load_bundle(folder, "decoder")),
    "store": ("store", verify_store),
    "run": ("run", resume_run),
    "predictions": ("predictions", draw_predictions),
}


def make_all(folder: Path, store: Path) -> None:
    """Writes all the artifacts into `folder`; the store is a copy."""
    importlib.import_module("trainer.stages.run_stage")  # by root: nobody may not read Python
    make_checkpoints(folder)
    make_run(folder)
    for name in ("encoder", "classifier", "decoder"):
        make_bundle(folder, name)
    shutil.copytree(store, folder / "store")


def files_of(good: Path, name: str) -> list[str]:
    """Returns the names of an artifact's files; of a store, its lists and its first shard."""
    names = sorted(path.name for path in (good / ARTIFACTS[name][0]).iterdir())
    kept = [n for n in names if "-of-" not in n or n.startswith("train-00000")]
    return [n for n in kept if not n.startswith(".")]


def result_of(good: Path, name: str, file: str, damage: str) -> str:
    """Returns what is said of an artifact of which one file is damaged.

    The folder is a copy that belongs to nobody, and nobody reads it: root reads what it may not.
    """
    inside, read = ARTIFACTS[name]
    with tempfile.TemporaryDirectory(dir="/tmp") as text:
        folder = Path(text)
        shutil.copytree(good / inside.split("/")[0], folder / inside.split("/")[0])
        DAMAGES[damage](folder / inside / file)
        with as_nobody(folder):
            said = read(folder)
    return normalized(said.replace(f"{folder}/", ""))


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Reads and writes as a user who is not root, to whom all in `folder` belongs."""
    if os.geteuid() != 0:
        yield
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def normalized(said: str) -> str:
    """Returns a message without sizes, and what Python's JSON says of a place in the file."""
    said = re.sub(r": [^:;]*: line \d+ column \d+ \(char \d+\)", "", said)
    return re.sub(r"\d+ bytes", "N bytes", said)


def table(results: dict[tuple[str, str, str], str]) -> str:
    """Returns the table of docs/faults.md."""
    lines = ["| file | damage | what the program says |", "|---|---|---|"]
    for (name, file, damage), said in results.items():
        words = said.replace("|", "\\|").replace("\n", "<br>")
        lines.append(f"| {name}: `{file}` | {damage} | {words} |")
    return "\n".join(lines) + "\n"


def all_results(good: Path) -> dict[tuple[str, str, str], str]:
    """Returns (artifact, file, damage) -> what is said."""
    return {
        (name, file, damage): result_of(good, name, file, damage)
        for name in ARTIFACTS
        for file in files_of(good, name)
        for damage in DAMAGES
    }


def written_table() -> str:
    """Returns the table that docs/faults.md holds."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]


def write_table(text: str) -> None:
    """Puts the table into docs/faults.md."""
    head, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(head + BEGIN + text + END + rest.split(END)[1])


def main() -> None:
    """Prints or writes the table."""
    from data_pipelines.prepare import PrepareConfig, build_store
    from tests.conftest import SomeReviews

    with tempfile.TemporaryDirectory() as text:
        source = SomeReviews({"train": 200, "validation": 40, "test": 60})
        build_store(
            PrepareConfig("movie_reviews", vocab_size=1000), source, Path(text) / "made", print
        )
        good = Path(text) / "good"
        good.mkdir()
        make_all(good, Path(text) / "made")
        made = table(all_results(good))
    if "--write" in sys.argv:
        write_table(made)
    else:
        print(made)


if __name__ == "__main__":
    main()
