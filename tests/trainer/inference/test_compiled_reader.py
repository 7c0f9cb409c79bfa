from typing import Any

import numpy as np
import pytest

from trainer import native
from trainer.inference import compiled_reader as module
from trainer.inference.compiled_reader import compiled_reader
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder

if not native.library_path().exists():
    pytest.skip(f"no compiled loops: {native.BUILD}", allow_module_level=True)


@pytest.fixture(autouse=True)
def in_inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(native, "_in_inference", True)
    with native.using(native.best_instruction_set()):
        yield


def classifier_of(
    layers: int = 1, classes: int = 2, units: int = 16, normalised: bool = False, **sizes: Any
) -> Classifier:
    encoder = Encoder(40, 8, units, 0, num_layers=layers, normalised=normalised)
    classifier = Classifier(encoder, classes, **sizes)
    classifier.build()
    random = np.random.default_rng(3)
    for variable in classifier.variables:
        variable.assign(random.normal(0, 0.7, variable.shape))
    if normalised:
        encoder.frequencies.assign(random.dirichlet(np.ones(40)))
    return classifier


@pytest.mark.parametrize("table_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden_units": 0, "classes": 3},
        {"layers": 2, "pooling": "concat"},
        {"classes": 3, "multi_label": True},
        {"layers": 2, "pooling": "mean", "num_contexts": 2},
        {"normalised": True, "pooling": "concat"},
    ],
)
def test_probabilities_are_those_of_the_graph(
    settings: dict[str, Any], table_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TABLE_BYTES", table_bytes)
    classifier = classifier_of(**settings)
    reader = compiled_reader(classifier)
    random = np.random.default_rng(4)
    lengths = np.array([1, 3, 7, 7], np.int32)
    tokens = np.where(np.arange(7) < lengths[:, None], random.integers(2, 40, (4, 7)), 0)
    tokens, contexts = tokens.astype(np.int32), np.array([-1, 0, 1, 1], np.int32)
    with native.using(None):
        logits = classifier.logits(tokens, lengths, training=False, contexts=contexts)
    expected = classifier.probabilities(classifier.class_logits(logits)).numpy()
    found = reader.probabilities(tokens, lengths, contexts)
    assert found.dtype == np.float32 and np.ptp(expected, axis=0).min() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_what_the_loops_cannot_do_is_left_to_the_graph() -> None:
    assert compiled_reader(classifier_of(units=12)) is None
    assert compiled_reader(classifier_of(backward=classifier_of())) is None
    assert compiled_reader(classifier_of(reader=Encoder(40, 8, 16, 1))) is None
    with native.using(None):
        assert compiled_reader(classifier_of()) is None
