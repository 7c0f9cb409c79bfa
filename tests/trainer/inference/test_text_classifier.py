import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers import load_tokenizer
from trainer.inference.text_classifier import bundle_tokenizer, load_classifier
from trainer.models.encoder import Encoder
from trainer.safe_files import read_sealed, sealed

TEXTS = ["A fine film!", "", "bad " * 300, "I did not like it.<br />At all.", "A fine film!"]


@pytest.mark.parametrize("names", [("neg", "pos"), ("bad", "so-so", "good")])
@pytest.mark.parametrize("reads_first", [False, True])
def test_probabilities_are_those_of_the_model_text_by_text(
    make_classifier_bundle: Callable[..., Path], names: tuple[str, ...], reads_first: bool
) -> None:
    model = load_classifier(make_classifier_bundle(names, reads_first))
    assert model.class_names == names
    found = model.probabilities(TEXTS, batch_size=2)
    assert found.shape == (len(TEXTS), len(names)) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found[0], found[-1])
    assert np.ptp(found[:4, 0]) > 0.01
    np.testing.assert_allclose(
        model.of_texts(tf.constant(TEXTS), tf.fill([len(TEXTS)], -1)), found, atol=1e-6
    )
    for text, row in zip(TEXTS, found, strict=True):
        ids = model.tokenizer.encode(tf.constant([text]))[0].numpy()[-model.max_tokens :]
        logits = model.classifier.logits(ids[None], np.array([len(ids)]), training=False).numpy()[0]
        odds = np.exp(logits if len(names) > 2 else [-logits[0] / 2, logits[0] / 2])
        np.testing.assert_allclose(row, odds / odds.sum(), atol=1e-6)
    assert model.probabilities([]).shape == (0, len(names))


def test_no_text_costs_a_pass_over_all_normalised_embeddings(
    make_classifier_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_classifier(make_classifier_bundle(normalised=True))
    monkeypatch.delattr(Encoder, "moments")
    found, session = model.probabilities(TEXTS[:1]), model.session()
    session.feed(TEXTS[0])
    np.testing.assert_allclose(session.probabilities(), found[0], atol=1e-6)
    monkeypatch.undo()
    model.classifier.encoder.fixed_moments = ()
    tokens = model.token_ids(TEXTS[:1]).to_tensor()
    logits = model.classifier.logits(tokens, tf.shape(tokens)[1:], training=False)
    expected = tf.nn.softmax(model.classifier.class_logits(logits))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_it_reads_what_the_trainer_reads(classifier_bundle: Path, small_store: Path) -> None:
    from tests.conftest import SomeReviews

    view = TokenStore(small_store).split("test")
    tokens, lengths = view.gather(np.arange(len(view)), max_tokens=60)
    reviews = [e.text for e in SomeReviews({"test": 60}).examples("test", "all")]
    model = load_classifier(classifier_bundle)
    ids = model.token_ids(tf.constant(reviews))
    np.testing.assert_array_equal(ids.row_lengths(), lengths)
    np.testing.assert_array_equal(ids.to_tensor(0), tokens)


def test_a_bundle_of_another_tokenizer_is_refused(
    make_classifier_bundle: Callable[..., Path],
) -> None:
    folder = make_classifier_bundle()
    info = read_sealed(folder / "classifier.json")
    info["tokenizer"] = {"type": "word", "lowercase": False}
    (folder / "classifier.json").write_bytes(sealed(info))
    with pytest.raises(InputError, match="not the one that it was trained with"):
        load_classifier(folder)


def test_a_bundle_without_names_has_numbers(make_classifier_bundle: Callable[..., Path]) -> None:
    folder = make_classifier_bundle()
    info = json.loads((folder / "classifier.json").read_text())
    del info["class_names"], info["sha256_of_the_rest"]
    (folder / "classifier.json").write_bytes(sealed(info))
    assert load_classifier(folder).class_names == ("0", "1")


@pytest.mark.parametrize("names", [["neg", "neg"], ["neg", "\ud800"]])
def test_class_names_that_cannot_be_told_apart_or_printed_are_refused(
    make_classifier_bundle: Callable[..., Path], names: list[str]
) -> None:
    folder = make_classifier_bundle()
    info = read_sealed(folder / "classifier.json")
    (folder / "classifier.json").write_bytes(sealed(info | {"class_names": names}))
    with pytest.raises(InputError, match="class names are not distinct texts"):
        load_classifier(folder)


def test_more_words_than_embeddings_are_refused(
    make_classifier_bundle: Callable[..., Path],
) -> None:
    folder = make_classifier_bundle()
    info = read_sealed(folder / "classifier.json")
    smaller = info["model"] | {"vocab_size": 50}
    tokenizer = load_tokenizer(folder / "vocab.txt", info["tokenizer"])
    with pytest.raises(
        InputError, match=f"has {tokenizer.vocab_size} words, but its model only 50"
    ):
        bundle_tokenizer(folder, info | {"model": smaller}, "--classifier")
