"""A classifier's output for each document of a split, and the documents that say most."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.store.split_view import SplitView
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tokenizers.tokenizer import Tokenizer
from trainer.distribution.over_batches import gather_rows
from trainer.models.classifier import Classifier, losses_and_errors, reversed_words, targets
from trainer.models.encoder import token_mask
from trainer.reporting.predictions import EXAMPLE_TOKENS, Predictions, write
from trainer.training.run import Run

STATE_DOCUMENTS = 512
WRONG_EXAMPLES = 6
RIGHT_EXAMPLES_BY_CLASS = 2
MAX_RIGHT_EXAMPLES = 6


def predict(
    run: Run, classifier: Classifier, view: SplitView, batch_size: int, max_tokens: int
) -> Predictions:
    """Returns what `classifier` says of every document of `view`; a collective.

    The same in every process, and whatever the number of workers.
    """
    label_sets = run.store.label_sets
    plan = run.plan(view, batch_size, max_tokens, shuffle=False)
    steps = plan.steps_per_epoch
    batches = run.batches(view, plan)(0, steps)

    def columns(rows: dict[str, tf.Tensor]) -> tf.Tensor:
        logits = classifier.logits(
            rows["tokens"], rows["lengths"], training=False, contexts=rows.get("contexts")
        )
        losses, _ = losses_and_errors(logits, targets(rows["labels"], label_sets))
        beside = tf.stack([tf.cast(rows["labels"], tf.float32), losses], axis=1)
        return tf.concat([beside, tf.cast(logits, tf.float32)], axis=1)

    def states(rows: dict[str, tf.Tensor]) -> tf.Tensor:
        h, c = final_state(classifier, rows["tokens"], rows["lengths"], rows.get("contexts"))
        return tf.concat([tf.cast(rows["labels"], tf.float32)[:, None], h, c], axis=1)

    found = gather_rows(run.distributor, columns, batches, run.stop_request)
    label = found[:, 0].astype(np.int32)
    if label_sets is None:
        some = run.some_documents(view, STATE_DOCUMENTS, batch_size, max_tokens)
        kept = gather_rows(run.distributor, states, some, run.stop_request)
        of_sets = {}
    else:  # no one label to draw a state's mark by
        kept = np.zeros((0, 1 + 2 * classifier.encoder.units), np.float32)
        of_sets = {"labels": label_sets[label]}
    state_label, state = np.split(kept, [1], axis=1)
    state_h, state_c = np.split(state, 2, axis=1)
    return Predictions(
        {
            "document": np.concatenate([plan.indices(step) for step in range(steps)]),
            "label": label,
            **of_sets,
            "logits": found[:, 2:],
            "loss": found[:, 1],
            "state/label": state_label[:, 0].astype(np.int32),
            "state/h": state_h,
            "state/c": state_c,
        }
    )


def final_state(
    classifier: Classifier, tokens: tf.Tensor, lengths: tf.Tensor, contexts: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the state in which the last layer ends: h and c, float32 [batch, units] each.

    Arguments as for `Classifier.start`.
    """
    encoder = classifier.encoder
    states = classifier.start(tokens, lengths, contexts)[0]
    mask = token_mask(tokens, lengths)
    _, states = encoder.read(encoder.words(tokens), mask, states, training=False)
    h, c = states[-1]
    return tf.cast(h, tf.float32), tf.cast(c, tf.float32)


def telling_documents(predictions: Predictions) -> np.ndarray:
    """Returns the rows of the most wrong documents and of the surest right ones of each class.

    Ties go to the row that comes first, so the choice depends on nothing else.
    """
    labels, is_wrong = predictions.label, predictions.is_wrong
    if predictions.has_sets:
        order = np.argsort(-predictions.tensors["loss"], kind="stable")
    else:
        order = np.argsort(predictions.probability_of(labels), kind="stable")
    wrong = order[is_wrong[order]][:WRONG_EXAMPLES]
    surest = order[::-1][~is_wrong[order[::-1]]]
    surest = surest[np.argsort(labels[surest], kind="stable")]
    _, starts, counts = np.unique(labels[surest], return_index=True, return_counts=True)
    place = np.arange(len(surest)) - np.repeat(starts, counts)  # in its class
    right = surest[place < RIGHT_EXAMPLES_BY_CLASS][:MAX_RIGHT_EXAMPLES]
    return np.concatenate([wrong, right])


def explained_classes(predictions: Predictions, rows: np.ndarray) -> np.ndarray:
    """Returns the class that each document's words are shaded for: int32 [rows].

    The predicted one. Of a set, the class that is most wrong; if all are right, the most probable.
    """
    if not predictions.has_sets:
        return predictions.predicted[rows].astype(np.int32)
    probability, truth = predictions.probabilities()[rows], predictions.tensors["labels"][rows]
    wrong = predictions.predicted[rows] != truth
    score = np.where(
        wrong.any(axis=1, keepdims=True), wrong * abs(truth - probability), probability
    )
    return score.argmax(axis=1).astype(np.int32)


def first_order_contributions(
    classifier: Classifier,
    tokens: np.ndarray,
    lengths: np.ndarray,
    predicted: np.ndarray,
    contexts: np.ndarray | None = None,
) -> np.ndarray:
    """Returns what each token adds to the class that was predicted: float32 [batch, time].

    To first order: the gradient of the class's logit (its margin over the mean of the others'
    where there are more than two, unless a document has sets), times the token's embedding. Not a
    collective.

    Args:
        tokens, lengths, contexts: See `Classifier.start`.
        predicted: The classes, int32 [batch].
    """
    tokens, lengths = tf.constant(tokens), tf.constant(lengths)
    embedded = classifier.embed(tokens, lengths)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(embedded)
        start = classifier.start(tokens, lengths, contexts)
        logits = tf.cast(classifier.read(embedded, lengths, start, training=True), tf.float32)
        if classifier.multi_label:
            margin = tf.gather(logits, predicted, batch_dims=1)
        elif logits.shape[-1] == 1:
            margin = logits[:, 0] * np.where(predicted == 1, 1.0, -1.0)
        else:
            chosen = tf.gather(logits, predicted, batch_dims=1)
            others = (tf.reduce_sum(logits, axis=1) - chosen) / (logits.shape[-1] - 1)
            margin = chosen - others
        total = tf.reduce_sum(margin)
    gradients = tape.gradient(total, embedded)
    found = [tf.reduce_sum(g * e, axis=-1) for g, e in zip(gradients, embedded, strict=True)]
    if classifier.backward is not None:
        found[1] = reversed_words(found[1], lengths)
    return tf.add_n(found).numpy()


def pieces(tokenizer: Tokenizer, kind: str, ids: Sequence[int]) -> list[str]:
    """Returns the text of each id, with the space before it where there is one.

    Args:
        kind: The tokenizer's type: characters and bytes have no spaces of their own between them.
    """
    if kind in ("byte", "character"):
        texts = [tokenizer.decode([i]) for i in ids]
    else:
        upto = [tokenizer.decode(ids[:stop]) for stop in range(len(ids) + 1)]
        texts = [after[len(before) :] for before, after in itertools.pairwise(upto)]
    return [text.encode("utf-8", "replace").decode() for text in texts]


def _answer(predictions: Predictions, row: int, explained: int) -> dict[str, Any]:
    """Returns label, predicted and probability of a document for predictions.json."""
    one = dataclasses.replace(
        predictions, tensors={n: a[row : row + 1] for n, a in predictions.tensors.items()}
    )
    if not predictions.has_sets:
        probability = float(one.probability_of(one.predicted)[0])
        return {"label": int(one.label[0]), "predicted": explained, "probability": probability}
    sets = (one.tensors["labels"][0], one.predicted[0])
    label, predicted = ([int(c) for c in np.flatnonzero(each)] for each in sets)
    probability = float(one.probabilities()[0, explained])
    named = {"label": label, "predicted": predicted, "explained": explained}
    return named | {"probability": probability}


def save(
    folder: Path,
    predictions: Predictions,
    run: Run,
    classifier: Classifier,
    split: str,
    info: dict[str, Any],
) -> None:
    """Writes the folder of predictions; only the chief.

    Args:
        info: The classifier bundle's.

    Raises:
        InputError: It cannot be written.
    """
    view = run.store.split(split)
    rows = telling_documents(predictions)
    documents = predictions.tensors["document"][rows]
    tokens, lengths = view.gather(documents, info["max_tokens"])
    explained = explained_classes(predictions, rows)
    contexts = view.contexts_of(documents) if classifier.num_contexts else None
    added = first_order_contributions(classifier, tokens, lengths, explained, contexts)
    tokenizer = load_tokenizer(run.store.vocab_path, run.store.tokenizer_config)
    kind = run.store.tokenizer_config["type"]
    shown = [slice(max(0, length - EXAMPLE_TOKENS), length) for length in lengths]
    examples = [
        {
            "document": int(documents[i]),
            **_answer(predictions, int(row), int(explained[i])),
            "pieces": pieces(tokenizer, kind, tokens[i, shown[i]].tolist()),
            "contributions": [round(float(x), 5) for x in added[i, shown[i]]],
        }
        for i, row in enumerate(rows)
    ]
    values = {
        "split": split,
        **predictions.metrics(),
        "classes": info["model"]["num_classes"],
        "class_names": info.get("class_names"),
        **({"thresholds": info["thresholds"]} if predictions.has_sets else {}),
        "init_weights": info["report"]["init_weights"],
        "initial_state": info["report"]["initial_state"],
        "vocab_sha256": info["vocab_sha256"],
        "examples": examples,
    }
    try:
        write(folder, dataclasses.replace(predictions, info=values))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror}: make room or make it writable, and run "
            "the same command again"
        ) from None
