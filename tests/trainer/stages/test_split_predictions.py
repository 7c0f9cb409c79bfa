from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers import load_tokenizer, make_tokenizer
from trainer.config import Config
from trainer.distribution.tf_distribute import TfDistributor, one_device
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.reporting.predictions import Predictions, probabilities
from trainer.stages import split_predictions
from trainer.stages.evaluate import error_and_loss
from trainer.training.run import Run


class NeverStops:
    """In place of a StopRequest, which would take the signals of the tests' process."""

    received = False


def make_run(store: Path, folder: Path, distributor: TfDistributor) -> Run:
    config = Config(run_dir=str(folder))
    return Run(config, distributor, TokenStore(store), NeverStops(), lambda line: None)


def make_classifier(run: Run, num_classes: int = 2, with_reader: bool = False) -> Classifier:
    """Returns a classifier whose initial state and embeddings are large enough to matter."""
    random = np.random.default_rng(0)
    with run.distributor.scope():
        encoders = [Encoder(run.store.vocab_size, 4, 6, seed=i, num_layers=2) for i in range(2)]
        classifier = Classifier(
            encoders[0], num_classes, reader=encoders[1] if with_reader else None
        )
        classifier.build()
    for encoder in encoders[: 1 + with_reader]:
        encoder.embeddings.assign(random.normal(size=encoder.embeddings.shape))
        for _, c in encoder.initial_states:
            c.assign(random.normal(size=6))
    return classifier


def predicted(run: Run, classifier: Classifier) -> Predictions:
    return split_predictions.predict(run, classifier, run.store.split("test"), 7, 30)


@pytest.mark.parametrize(
    "with_reader", [pytest.param(False, marks=pytest.mark.slow("quick: with a reader")), True]
)
def test_every_document_once_whatever_the_number_of_shards(
    small_store: Path, tmp_path: Path, two_shards: TfDistributor, with_reader: bool
) -> None:
    found = []
    for distributor in (one_device(), two_shards):
        run = make_run(small_store, tmp_path, distributor)
        found.append(predicted(run, make_classifier(run, with_reader=with_reader)))
    one, two = found
    assert sorted(one.tensors["document"].tolist()) == list(range(60))
    np.testing.assert_array_equal(one.is_wrong, two.is_wrong)
    for name in ("document", "label", "state/label"):
        np.testing.assert_array_equal(one.tensors[name], two.tensors[name])
    for name in ("logits", "loss", "state/h", "state/c"):
        np.testing.assert_allclose(one.tensors[name], two.tensors[name], atol=1e-5)
    labels = TokenStore(small_store).split("test").labels_of(one.tensors["document"])
    np.testing.assert_array_equal(one.label, labels)


def test_metrics_are_those_of_the_evaluation_in_training(small_store: Path, tmp_path: Path) -> None:
    run = make_run(small_store, tmp_path, one_device())
    classifier = make_classifier(run)
    documents = run.all_documents(run.store.split("test"), 7, 30)
    evaluated = error_and_loss(run, classifier, documents)()
    found = predicted(run, classifier)
    metrics = found.metrics()
    assert {k: metrics[k] for k in evaluated} == pytest.approx(evaluated, rel=1e-6)
    logits, labels = found.tensors["logits"][:, 0], found.label
    pairs = np.sign(logits[labels == 1][:, None] - logits[labels == 0]) / 2 + 0.5
    assert metrics["roc_auc"] == pytest.approx(pairs.mean())


def test_the_kept_state_is_what_the_classifier_reads(small_store: Path, tmp_path: Path) -> None:
    run = make_run(small_store, tmp_path, one_device())
    classifier = make_classifier(run, with_reader=True)
    tokens, lengths = run.store.split("test").gather(np.arange(5), 30)
    h, _ = split_predictions.final_state(classifier, tf.constant(tokens), tf.constant(lengths))
    logits = classifier.logits(tf.constant(tokens), tf.constant(lengths), training=False)
    np.testing.assert_allclose(classifier.output_layer(classifier.hidden(h)), logits, atol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_contributions_are_what_a_small_change_of_a_word_changes(
    small_store: Path, tmp_path: Path, num_classes: int
) -> None:
    run = make_run(small_store, tmp_path, one_device())
    classifier = make_classifier(run, num_classes)
    tokens = np.array([[5, 9, 11, 2, 0, 0], [7, 8, 10, 12, 13, 2]], np.int32)
    lengths = np.array([4, 6], np.int32)

    def margins() -> np.ndarray:
        logits = classifier.logits(tf.constant(tokens), tf.constant(lengths), training=False)
        log_odds = logits.numpy().astype(np.float64)
        if num_classes == 2:
            return log_odds[:, 0] * [1, -1]
        chosen = log_odds[[0, 1], [1, 0]]
        return chosen - (log_odds.sum(axis=1) - chosen) / 2

    added = split_predictions.first_order_contributions(
        classifier, tokens, lengths, np.array([1, 0], np.int32)
    )
    assert added.shape == tokens.shape and not added[0, 4:].any()
    table = classifier.encoder.embeddings
    whole = table.numpy()
    for word, row, place in ((9, 0, 1), (12, 1, 3), (7, 1, 0)):
        ends = []
        for factor in (0.99, 1.01):
            changed = whole.copy()
            changed[word] *= factor
            table.assign(changed)
            ends.append(margins()[row])
        table.assign(whole)
        assert (ends[1] - ends[0]) / 0.02 == pytest.approx(added[row, place], rel=0.02, abs=1e-4)


def test_the_most_wrong_come_first_then_the_surest_of_each_label() -> None:
    label = np.array([0] * 8 + [1] * 8, np.int32)
    logits = np.linspace(-4, 4, 16)[::-1].astype(np.float32)[:, None]  # mostly wrong
    logits[[0, 15]] *= -1
    found = Predictions({"label": label, "logits": logits})
    wrong = probabilities(logits).argmax(axis=1) != label
    np.testing.assert_array_equal(found.is_wrong, wrong)
    rows = split_predictions.telling_documents(found)
    assert rows.tolist() == [1, 14, 2, 13, 3, 12, 0, 15]


@pytest.mark.parametrize("kind", ["word", "subword", "character", "byte"])
def test_pieces_put_together_are_the_text(kind: str) -> None:
    vocabulary = {
        "word": (["a", "good", "film"], {"lowercase": True}),
        "subword": (["a", "good", "fil", "##m"], {"lowercase": True}),
        "character": ([*"a godfilm"], {"lowercase": True}),
        "byte": ([], {}),
    }
    lines, options = vocabulary[kind]
    tokenizer = make_tokenizer(lines, {"type": kind, **options})
    ids = tokenizer.encode(tf.constant(["a good film"]))[0].numpy().tolist()
    found = split_predictions.pieces(tokenizer, kind, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)


@pytest.mark.parametrize("kept_tokens", [9, 1000])
def test_saved_predictions_can_be_read(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_tokens: int
) -> None:
    from trainer.report_page import run_folder

    monkeypatch.setattr(split_predictions, "EXAMPLE_TOKENS", kept_tokens)
    run = make_run(small_store, tmp_path, one_device())
    classifier = make_classifier(run)
    found = predicted(run, classifier)
    info = {
        "model": {"num_classes": 2},
        "max_tokens": 30,
        "vocab_sha256": run.store.vocab_sha256,
        "report": {"init_weights": "random", "initial_state": "zero"},
    }
    split_predictions.save(tmp_path / "predictions", found, run, classifier, "test", info)
    read = run_folder.read(tmp_path)
    assert not read.faults and list(read.parts) == ["scratch"]
    kept = read.parts["scratch"].predictions
    np.testing.assert_array_equal(kept.is_wrong, found.is_wrong)
    tokenizer = load_tokenizer(run.store.vocab_path, run.store.tokenizer_config)
    for example in kept.info["examples"]:
        tokens, lengths = run.store.split("test").gather(np.array([example["document"]]), 30)
        whole = tokenizer.decode(tokens[0, : lengths[0]])
        assert whole.endswith("".join(example["pieces"]).lstrip())
        assert len(example["contributions"]) == min(lengths[0], kept_tokens)
