import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import InputError
from tests.pairs import each_value
from trainer import native
from trainer.config import Config
from trainer.inference import predict as stage
from trainer.inference.task_bank import TaskBank, load_task
from trainer.inference.text_classifier import batches_by_length
from trainer.models import bundle

TEXTS = ["A fine film.", "bad, bad, bad", "So long " * 40, "café crème", "It never ends ."] * 3
CLASSES = {"mood": ("sad", "merry"), "topic": ("sport", "art", "war"), "spam": ("no", "yes")}
Make = Callable[..., Path]


@pytest.fixture(params=["compiled", "TensorFlow's"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yields which loops are in use."""
    compiled = request.param == "compiled"
    if compiled and not native.library_path().exists():
        pytest.skip("needs the compiled loops: make native")
    monkeypatch.setattr(native, "_in_inference", True)
    with native.using(native.best_instruction_set() if compiled else None):
        yield request.param


def tasks_in(folder: Path, make_task: Make, train: str = "state", **sizes: object) -> Path:
    """Returns the folder of three tasks, of which the last is trained in another way."""
    for name, classes in CLASSES.items():
        of_task = train if name == "spam" else "state"
        make_task(folder / name, classes, of_task, max_tokens=25 + 5 * len(classes), **sizes)
    return folder


@pytest.mark.parametrize(
    ("train", "sizes"),
    each_value(
        ("state", "state+bias"),
        ({}, {"hidden_units": 6, "pooling": "mean"}),
        pytest.mark.slow("other pairs; quick: what is trained and each head"),
    ),
)
def test_each_row_is_read_as_by_its_task_alone(
    train: str, sizes: dict, loops: str, tuned_encoder: Path, make_task: Make, tmp_path: Path
) -> None:
    bank = TaskBank(tuned_encoder, tasks_in(tmp_path, make_task, train, **sizes))
    names = [[*CLASSES][row % 3] for row in range(len(TEXTS))]
    numbers = np.array([[*bank.class_names].index(name) for name in names], np.int32)
    (batch,) = batches_by_length(bank.tokenizer.rows(TEXTS), 30, 64)
    rows, tokens, lengths = batch
    together = bank.head_inputs(tokens, lengths, numbers[rows]).numpy()
    mixed = bank.probabilities(TEXTS, names)
    for name in CLASSES:
        alone = load_task(tuned_encoder, tmp_path / name)
        (read,) = alone.classifier.head_inputs(tokens, lengths)
        for place, row in enumerate(rows):
            if names[row] != name:
                continue
            if loops == "compiled" or train == "state":  # to the last bit
                assert together[place].tobytes() == read[place].numpy().tobytes()
            np.testing.assert_allclose(together[place], read[place], atol=1e-6)
        for text, of_task, found in zip(TEXTS, names, mixed, strict=True):
            if of_task == name:
                np.testing.assert_allclose(found, alone.probabilities([text])[0], atol=1e-6)
    assert len({tuple(np.round(found, 4)) for found in mixed}) == len(TEXTS)  # they all differ


def test_predictions_name_the_classes_of_their_task(
    tuned_encoder: Path, make_task: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tasks_in(tmp_path, make_task)
    bank = TaskBank(tuned_encoder, {"m": folder / "mood", "t": folder / "topic"})
    assert bank.class_names == {"m": ("sad", "merry"), "t": ("sport", "art", "war")}
    found = bank.predict(TEXTS[:2], ["t", "m"])
    assert [tuple(p.probabilities) for p in found] == [bank.class_names["t"], bank.class_names["m"]]
    assert bank.predict([], "m") == []
    config = {"encoder": str(tuned_encoder), "task": str(folder / "topic")}
    stage.predict(Config(stage="predict", **config), TEXTS[:5])
    printed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == [prediction.label for prediction in bank.predict(TEXTS[:5], "t")]
    with pytest.raises(InputError, match="there is no task 'mood'"):
        bank.predict(["a"], "mood")


def test_what_does_not_fit_is_refused(tuned_encoder: Path, make_task: Make, tmp_path: Path) -> None:
    mine = make_task(tmp_path / "tasks" / "mine")
    encoder = bundle.load(tuned_encoder, "encoder", "--encoder")
    encoder.tensors["lstm/1/bias"] += 1
    other = tmp_path / "other"
    bundle.save(other, "encoder", encoder.tensors, encoder.info, tuned_encoder / "vocab.txt")
    for load in (load_task, lambda e, t: TaskBank(e, {"mine": t})):
        with pytest.raises(InputError, match="belongs to another encoder .SHA-256"):
            load(other, mine)
    with pytest.raises(InputError, match="found no task"):
        TaskBank(tuned_encoder, tmp_path / "other")
    make_task(tmp_path / "tasks" / "yours", pooling="last")
    with pytest.raises(InputError, match="one --pooling; found concat .task 'mine'., last .task"):
        TaskBank(tuned_encoder, tmp_path / "tasks")
    with pytest.raises(InputError, match="is no task bundle"):
        load_task(tuned_encoder, tuned_encoder)


@pytest.mark.parametrize("name", ["initial_state/1/c", "lstm/1/bias", "output/bias"])
def test_a_tensor_of_another_shape_is_refused(
    name: str, tuned_encoder: Path, make_task: Make, tmp_path: Path
) -> None:
    task = bundle.load(make_task(tmp_path / "task", train="bias"), "task", "--task")
    for tensors in (
        {key: value for key, value in task.tensors.items() if key != name},
        {**task.tensors, name: np.zeros(3, np.float32)},
    ):
        shutil.rmtree(tmp_path / "task")
        bundle.save(tmp_path / "task", "task", tensors, task.info, None)
        with pytest.raises(InputError, match=f"needs a tensor '{name}' of shape"):
            load_task(tuned_encoder, tmp_path / "task")
