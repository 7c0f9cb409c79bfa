import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from data_pipelines.store.token_store import TokenStore
from tests.integration.programs import train
from trainer.config import Config
from trainer.models import bundle
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.stages.finetune import (
    class_weights,
    encoder_rates,
    make_classifier,
    trained_variables,
)
from trainer.training.optimizer import Rate


@pytest.mark.parametrize("state", ["zero", "mean", "learned", "encode"])
def test_the_state_is_trained_only_if_it_is_learned(state: str) -> None:
    reader = Encoder(9, 2, 3, seed=1) if state == "encode" else None
    classifier = Classifier(Encoder(9, 2, 3, seed=0), 2, reader=reader)
    classifier.build()
    names = set(trained_variables(Config(initial_state=state), classifier))
    assert ("initial_state/0/h" in names) == (state == "learned")
    assert {"embeddings", "lstm/0/kernel", "output/bias"} <= names
    assert not any(name.startswith("reader/") for name in names)


def test_lower_layers_learn_slower_and_later() -> None:
    encoder = Encoder(9, 2, 3, seed=0, num_layers=2)
    backward = Classifier(Encoder(9, 2, 3, seed=1, num_layers=2), 2)
    classifier = Classifier(encoder, 2, backward=backward)
    classifier.build()
    assert encoder_rates(Config(num_layers=2), classifier) == {}
    flags = {"encoder_rate": 0.5, "encoder_frozen_steps": 10}
    rates = encoder_rates(Config(num_layers=2, **flags), classifier)
    assert set(rates.values()) == {Rate(0.5, 10)}
    assert set(rates) == {
        prefix + name for prefix in ("", "backward/") for name in bundle.encoder_variables(encoder)
    }
    rates = encoder_rates(
        Config(num_layers=2, layer_rate=0.1, unfreeze_every_steps=20, **flags), classifier
    )
    for prefix in ("", "backward/"):
        assert rates[prefix + "lstm/1/kernel"] == Rate(pytest.approx(0.05), 30)
        assert rates[prefix + "lstm/0/bias"] == Rate(pytest.approx(0.005), 50)
        assert rates[prefix + "embeddings"] == Rate(pytest.approx(0.0005), 70)
    names = trained_variables(Config(), classifier)
    assert set(rates) < set(names) and "backward/initial_state/0/h" in names
    mean = Config(initial_state="mean")
    assert "backward/initial_state/0/h" not in trained_variables(mean, classifier)


HEAD = {f"{layer}/{kind}" for layer in ("hidden", "output") for kind in ("kernel", "bias")}
STATES = {f"initial_state/{layer}/{part}" for layer in (0, 1) for part in "hc"}
BIASES = {"lstm/0/bias", "lstm/1/bias"}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("head", HEAD),
        ("state", HEAD | STATES),
        ("bias", HEAD | BIASES),
        ("state+bias", HEAD | STATES | BIASES),
    ],
)
@pytest.mark.parametrize("state", ["zero", "mean", "learned"])
def test_all_but_what_train_names_is_frozen(train: str, expected: set[str], state: str) -> None:
    classifier = Classifier(Encoder(9, 2, 3, seed=0, num_layers=2, normalised=True), 3)
    classifier.build()
    config = Config(train=train, initial_state=state)
    assert trained_variables(config, classifier).keys() == expected
    variables = bundle.classifier_variables(classifier)
    assert {name for name, variable in variables.items() if variable.trainable} == expected


def test_the_lstms_of_both_directions_clip_what_steps_hand_on() -> None:
    config = Config(
        init_weights="encoder",
        encoder="there",
        backward_encoder="there",
        num_layers=2,
        units=16,
        finetune_recurrent_clip_norm=0.5,
    )
    run = SimpleNamespace(
        config=config,
        distributor=SimpleNamespace(scope=contextlib.nullcontext),
        store=SimpleNamespace(vocab_size=9, num_classes=2, context_names=[], label_sets=None),
    )
    directions = make_classifier(run).directions()
    lstms = [lstm for direction in directions for lstm in direction.encoder.lstms]
    assert [lstm.clip_norm for lstm in lstms] == [0.5] * 4


def test_balanced_classes_have_the_same_weight_in_all(small_store: Path) -> None:
    store = TokenStore(small_store)
    view = store.split("train").sample(7, seed=0)
    run = SimpleNamespace(config=Config(class_weights="balanced"), store=store)
    labels = view.labels_of(np.arange(len(view)))
    counts = np.bincount(labels)
    np.testing.assert_allclose(class_weights(run, view) * counts, len(view) / 2)
    # A class without documents would divide by zero.
    run.store = SimpleNamespace(num_classes=3, label_sets=None)
    np.testing.assert_allclose(class_weights(run, view) * [*counts, 1], [len(view) / 2] * 2 + [0])
    assert class_weights(SimpleNamespace(config=Config()), view) is None
    # Of sets: how many documents lack a class for each that has it.
    run.store = SimpleNamespace(label_sets=np.array([[1, 0, 1], [1, 0, 0]], np.uint8))
    weights = [0, 7, counts[1] / counts[0]]
    np.testing.assert_allclose(class_weights(run, view), weights, rtol=1e-6)


def test_a_refit_trains_on_validation_too_and_keeps_the_last_weights(
    small_store: Path, tmp_path: Path
) -> None:
    flags = (f"--store={small_store}", f"--run_dir={tmp_path}", "--stage=finetune")
    start = ("--init_weights=random", "--initial_state=zero", "--finetune_steps=6")
    printed = train(1, *flags, *start, "--finetune_evaluate_every_steps=2", "--finetune_refit=true")
    assert "validation documents are trained on" in printed and "· validation:" not in printed
    report = json.loads((tmp_path / "report.json").read_text())["finetune"]
    assert (report["labelled_documents"], report["best_step"]) == (240, 6)
    assert report["validation"] == {}
    kept = bundle.load(tmp_path / "classifier", "classifier", "--classifier").tensors
    last = safetensors.numpy.load_file(
        tmp_path / "checkpoints" / "step-00000006" / "state.safetensors"
    )
    trained = kept.keys() & last.keys()
    assert {"embeddings", "lstm/0/kernel", "output/bias"} <= trained
    for name in trained:
        np.testing.assert_array_equal(kept[name], last[name])
