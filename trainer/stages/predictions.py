"""What a classifier says of each document of a split, kept for report.html and other readers.

FOLDER/predictions holds two files. By document, in the order in which they were read,
predictions.safetensors has `document` (its number in the split), `label` and `logits`; of some
documents the state in which the LSTM ended: `state/label`, `state/h`, `state/c`. predictions.json
has the split, the tensors' shapes, and, piece by piece, the documents that say most: the most wrong
ones and the surest right ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.store.split_view import SplitView
from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from trainer.distribution.steps import gather_rows
from trainer.models.classifier import Classifier, losses_and_errors, reversed_words
from trainer.models.encoder import token_mask
from trainer.report_page.statistics import probabilities
from trainer.safe_files import Buffer, sealed, specs, tensor_parts, write_folder
from trainer.stages.run import Run

STATE_DOCUMENTS = 512
WRONG_EXAMPLES = 6
RIGHT_EXAMPLES_BY_CLASS = 2
MAX_RIGHT_EXAMPLES = 6


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of n documents.

    Attributes:
      document: int64 [n], their numbers in the split.
      label: int32 [n].
      logits: float32 [n, 1] for two classes, else [n, classes].
      loss: float32 [n], nats.
      is_wrong: bool [n].
      state_label: int32 [m], of the documents whose states are kept.
      state_h: float32 [m, units], the last hidden state of the last layer.
      state_c: float32 [m, units], the last cell state of the last layer.
    """

    document: np.ndarray
    label: np.ndarray
    logits: np.ndarray
    loss: np.ndarray
    is_wrong: np.ndarray
    state_label: np.ndarray
    state_h: np.ndarray
    state_c: np.ndarray

    def metrics(self) -> dict[str, Any]:
        """Returns error_percent, loss (nats) and documents."""
        return {
            "error_percent": float(100 * self.is_wrong.mean(dtype=np.float64)),
            "loss": float(self.loss.mean(dtype=np.float64)),
            "documents": len(self.label),
        }


def predict(
    run: Run, classifier: Classifier, view: SplitView, batch_size: int, max_tokens: int
) -> Predictions:
    """Returns what `classifier` says of every document of `view`; a collective.

    The same in every process, and whatever the number of workers.
    """
    plan = run.plan(view, batch_size, max_tokens, shuffle=False)
    steps = plan.steps_per_epoch
    batches = run.batches(view, plan)(0, steps)

    def columns(rows: dict[str, tf.Tensor]) -> tf.Tensor:
        logits = classifier.logits(rows["tokens"], rows["lengths"], training=False)
        losses, errors = losses_and_errors(logits, rows["labels"])
        beside = tf.stack([tf.cast(rows["labels"], tf.float32), losses, errors], axis=1)
        return tf.concat([beside, tf.cast(logits, tf.float32)], axis=1)

    def states(rows: dict[str, tf.Tensor]) -> tf.Tensor:
        h, c = final_state(classifier, rows["tokens"], rows["lengths"])
        return tf.concat([tf.cast(rows["labels"], tf.float32)[:, None], h, c], axis=1)

    found = gather_rows(run.distributor, columns, batches, run.stop_request)
    some = run.some_documents(view, STATE_DOCUMENTS, batch_size, max_tokens)
    kept = gather_rows(run.distributor, states, some, run.stop_request)
    state_label, state = np.split(kept, [1], axis=1)
    state_h, state_c = np.split(state, 2, axis=1)
    return Predictions(
        document=np.concatenate([plan.indices(step) for step in range(steps)]),
        label=found[:, 0].astype(np.int32),
        loss=found[:, 1],
        is_wrong=found[:, 2] > 0,
        logits=found[:, 3:],
        state_label=state_label[:, 0].astype(np.int32),
        state_h=state_h,
        state_c=state_c,
    )


def final_state(
    classifier: Classifier, tokens: tf.Tensor, lengths: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the state in which the last layer ends: h and c, float32 [batch, units] each.

    Args:
      tokens: int32 [batch, time], right-padded.
      lengths: int32 [batch].
    """
    encoder = classifier.encoder
    states = encoder.start(tf.shape(tokens)[0])
    if classifier.reader is not None:
        _, states = classifier.reader(tokens, lengths)
    mask = token_mask(tokens, lengths)
    _, states = encoder.read(encoder.words(tokens), mask, states, training=False)
    h, c = states[-1]
    return tf.cast(h, tf.float32), tf.cast(c, tf.float32)


def telling_documents(predictions: Predictions) -> np.ndarray:
    """Returns the rows of the most wrong documents and of the surest right ones of each class.

    Ties go to the row that comes first, so the choice depends on nothing else.
    """
    of_label = probabilities(predictions.logits)[
        np.arange(len(predictions.label)), predictions.label
    ]
    order = np.argsort(of_label, kind="stable")
    wrong = [row for row in order if predictions.is_wrong[row]][:WRONG_EXAMPLES]
    right: list[int] = []
    for label in np.unique(predictions.label):
        surest = [
            row
            for row in order[::-1]
            if predictions.label[row] == label and not predictions.is_wrong[row]
        ]
        right += surest[:RIGHT_EXAMPLES_BY_CLASS]
    return np.array(wrong + right[:MAX_RIGHT_EXAMPLES], np.int64)


def contributions(
    classifier: Classifier, tokens: np.ndarray, lengths: np.ndarray, predicted: np.ndarray
) -> np.ndarray:
    """Returns what each token adds to the class that was predicted: float32 [batch, time].

    To first order: the gradient of the class's logit (its margin over the mean of the others'
    where there are more than two), times the token's embedding. Not a collective.

    Args:
      tokens: int32 [batch, time], right-padded.
      lengths: int32 [batch].
      predicted: the classes, int32 [batch].
    """
    tokens, lengths = tf.constant(tokens), tf.constant(lengths)
    embedded = classifier.embed(tokens, lengths)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(embedded)
        start = classifier.start(tokens, lengths)
        logits = tf.cast(classifier.read(embedded, lengths, start, training=True), tf.float32)
        if logits.shape[-1] == 1:
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
      kind: the tokenizer's type: characters and bytes have no spaces of their own between them.
    """
    if kind in ("byte", "character"):
        texts = [tokenizer.decode([i]) for i in ids]
    else:
        upto = [tokenizer.decode(ids[:stop]) for stop in range(len(ids) + 1)]
        texts = [after[len(before) :] for before, after in zip(upto, upto[1:], strict=False)]
    return [text.encode("utf-8", "replace").decode() for text in texts]


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
      info: of the classifier's bundle.

    Raises:
      InputError: it cannot be written.
    """
    rows = telling_documents(predictions)
    tokens, lengths = run.store.split(split).gather(predictions.document[rows], info["max_tokens"])
    probability = probabilities(predictions.logits[rows])
    predicted = probability.argmax(axis=1).astype(np.int32)
    added = contributions(classifier, tokens, lengths, predicted)
    tokenizer = load_tokenizer(run.store.vocab_path, run.store.tokenizer_config)
    kind = run.store.tokenizer_config["type"]
    examples = [
        {
            "document": int(predictions.document[row]),
            "label": int(predictions.label[row]),
            "predicted": int(predicted[i]),
            "probability": float(probability[i, predicted[i]]),
            "pieces": pieces(tokenizer, kind, tokens[i, : lengths[i]].tolist()),
            "contributions": [round(float(x), 5) for x in added[i, : lengths[i]]],
        }
        for i, row in enumerate(rows)
    ]
    tensors = {
        "document": predictions.document,
        "label": predictions.label,
        "logits": predictions.logits,
        "state/label": predictions.state_label,
        "state/h": predictions.state_h,
        "state/c": predictions.state_c,
    }
    values = {
        "split": split,
        **predictions.metrics(),
        "classes": info["model"]["num_classes"],
        "class_names": info.get("class_names"),
        "init_weights": info["report"]["init_weights"],
        "initial_state": info["report"]["initial_state"],
        "vocab_sha256": info["vocab_sha256"],
        "examples": examples,
        "tensors": specs(tensors),
    }
    files: dict[str, bytes | Sequence[Buffer]] = {
        "predictions.safetensors": tensor_parts(tensors),
        "predictions.json": [sealed(values)],
    }
    try:
        write_folder(folder.with_name(folder.name + ".new"), folder, files)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror}: make room or make it writable, and run "
            "the same command again"
        ) from None
