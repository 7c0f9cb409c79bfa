"""Explains a classifier's prediction by leaving out each word.

The contribution of a token is the fall of the predicted class's log-odds when the text is read
without it (leave-one-out; Li, Monroe & Jurafsky 2016, "Understanding neural networks through
representation erasure"). Unlike gradient times input it evaluates the model itself, which also
works for saturated gates; it reads the text once for each token.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from data_pipelines.printable import printable
from data_pipelines.tokenizers.subword_vocabulary import CONTINUED
from trainer.inference.text_classifier import TextClassifier
from trainer.models.context_state import UNKNOWN

BATCH_SIZE = 64
SHOWN = 0.1  # of the largest contribution; smaller ones are not marked
# Foreground and background of a terminal with 256 colours, for weak to strong contributions.
FOR = ("\x1b[38;5;255;48;5;22m", "\x1b[38;5;255;48;5;28m", "\x1b[38;5;16;48;5;40m")
AGAINST = ("\x1b[38;5;255;48;5;52m", "\x1b[38;5;255;48;5;124m", "\x1b[38;5;16;48;5;203m")
RESET = "\x1b[0m"


class Contribution(NamedTuple):
    """A token, and its contribution to the log-odds of the predicted class."""

    piece: str
    log_odds: float


def contributions(
    model: TextClassifier, text: str, context: str | None = None
) -> dict[str, list[Contribution]]:
    """Returns the contributions of the tokens of `text`, in order, to each label of the answer.

    For an empty set of labels, to the most probable one.
    """
    (number,) = model.context_numbers([context])
    texts = tf.constant([text])
    ids = model.token_ids(texts)[0].numpy()
    count = len(ids) - 1  # the end of the text is never left out
    whole = log_odds(model, ids[None], number)[0]
    explained = _answered(model, whole)
    if count == 0:
        return {model.class_names[c]: [] for c in explained}
    pieces = model.tokenizer.split(texts)[0].numpy()[-count:]
    without = np.empty((count, len(whole)))
    for start in range(0, count, BATCH_SIZE):
        left_out = range(start, min(start + BATCH_SIZE, count))
        rows = np.stack([np.delete(ids, place) for place in left_out])
        without[left_out] = log_odds(model, rows, number)
    changes = whole - without
    return {
        model.class_names[c]: [
            Contribution(piece.decode("utf-8", "replace"), round(float(change), 4))
            for piece, change in zip(pieces, changes[:, c], strict=True)
        ]
        for c in explained
    }


def _answered(model: TextClassifier, log_odds: np.ndarray) -> list[int]:
    """Returns the predicted class; or those that reach their thresholds, at least one."""
    likeliest = [int(np.argmax(log_odds))]
    if model.thresholds is None:
        return likeliest
    edges = np.log(model.thresholds / (1 - model.thresholds))
    return np.flatnonzero(log_odds >= edges).tolist() or likeliest


def log_odds(model: TextClassifier, ids: np.ndarray, context: int = UNKNOWN) -> np.ndarray:
    """Returns the log-odds of each class against all others: float64 [batch, classes].

    Args:
        ids: int32 [batch, time], without padding.
        context: The context of all rows; see `TextClassifier.context_numbers`.
    """
    lengths = np.full(len(ids), ids.shape[1], np.int32)
    contexts = np.full(len(ids), context, np.int32)
    logits = model.logits(ids.astype(np.int32), lengths, contexts).numpy().astype(np.float64)
    if model.thresholds is not None:  # each class is a yes or no
        return logits
    others = [
        np.logaddexp.reduce(np.delete(logits, c, axis=1), axis=1) for c in range(logits.shape[1])
    ]
    return logits - np.stack(others, axis=1)


def marked(found: list[Contribution], tokenizer_kind: str, in_colour: bool) -> str:
    """Returns the text with the important tokens marked.

    Args:
        tokenizer_kind: One of `data_pipelines.tokenizers.TOKENIZERS`.
        in_colour: Marks in green for the predicted class and in red against it, brighter for more;
            if False, with the number after the token, as in "a fine[+2.1] film".
    """
    largest = max((abs(c.log_odds) for c in found), default=0.0)
    text = ""
    for piece, change in found:
        continues = tokenizer_kind == "subword" and piece.startswith(CONTINUED)
        if text and not continues and tokenizer_kind in ("word", "subword"):
            text += " "
        piece = piece.removeprefix(CONTINUED) if continues else piece
        piece = printable(piece) if in_colour else piece  # colours are for a terminal
        share = abs(change) / largest if largest else 0.0
        text += _mark(piece, change, share, in_colour) if share >= SHOWN else piece
    return text


def _mark(piece: str, change: float, share: float, in_colour: bool) -> str:
    if not in_colour:
        return f"{piece}[{change:+.1f}]"
    colours = FOR if change > 0 else AGAINST
    return f"{colours[min(int(share * len(colours)), len(colours) - 1)]}{piece}{RESET}"
