"""A classifier bundle, ready to use: raw text in, probabilities out."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.files import is_remote
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tokenizers.tokenizer import Tokenizer
from trainer.distribution.variables import assign
from trainer.inference.compiled_reader import CompiledReader, compiled_reader
from trainer.inference.hub import fetched_bundle
from trainer.inference.sessions import Session, SessionReader
from trainer.models import bundle
from trainer.models.classifier import Classifier
from trainer.models.context_state import UNKNOWN

SEPARATOR = "|"  # of labels in a table or a line of text, as the sources read them


class Prediction(NamedTuple):
    """A classifier's prediction for a text.

    Attributes:
        label: The most probable class.
        probabilities: By class, rounded to six decimals.
        labels: With --labels=multi the classes whose probability reaches their threshold.
    """

    label: str
    probabilities: dict[str, float]
    labels: list[str] | None = None

    @property
    def answer(self) -> str:
        """The label, or the labels with "|" between them."""
        return self.label if self.labels is None else SEPARATOR.join(self.labels)

    def in_json(self) -> dict[str, Any]:
        """Returns the fields of an answer over HTTP; `labels` only of --labels=multi."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class TextClassifier(tf.Module):
    """A classifier with its tokenizer, all in-graph.

    Attributes:
        classifier: Its weights include its initial state (h, c).
        tokenizer: The one that it was trained with.
        class_names: In the order of the classes.
        max_tokens: The number of last tokens that are read of a text.
        context_key: Column or key of what documents belong to, such as their author; "" without.
        context_names: Those that the classifier knows; texts of others start from the mean state.
        thresholds: With --labels=multi the probability from which each class is answered; None if a
            text has one label.
    """

    def __init__(
        self,
        classifier: Classifier,
        tokenizer: Tokenizer,
        class_names: Sequence[str],
        max_tokens: int,
        context_key: str = "",
        context_names: Sequence[str] = (),
        thresholds: Sequence[float] | None = None,
    ):
        super().__init__(name="text_classifier")
        self.classifier = classifier
        self.tokenizer = tokenizer
        self.class_names = tuple(class_names)
        self.max_tokens = max_tokens
        self.context_key, self.context_names = context_key, tuple(context_names)
        self.thresholds = None if thresholds is None else np.array(thresholds, np.float32)
        self._numbers = {name: number for number, name in enumerate(context_names)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def token_ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns the tokens to read: ragged int32 [texts, (at most max_tokens)]."""
        return self.tokenizer.encode(texts)[:, -self.max_tokens :]

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None], tf.int32),
        ],
        autograph=False,
    )
    def logits(self, tokens: tf.Tensor, lengths: tf.Tensor, contexts: tf.Tensor) -> tf.Tensor:
        """Returns a logit for each class, also if there are two: float32 [batch, classes].

        Args:
            tokens: int32 [batch, time], right-padded.
            lengths: int32 [batch].
            contexts: int32 [batch], from `context_numbers`.
        """
        logits = self.classifier.logits(tokens, lengths, training=False, contexts=contexts)
        return self.classifier.class_logits(logits)

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int32)],
        autograph=False,
    )
    def of_texts(self, texts: tf.Tensor, contexts: tf.Tensor) -> tf.Tensor:
        """Returns the probability of each class: float32 [texts, classes].

        Args:
            texts: string [texts].
            contexts: int32 [texts], from `context_numbers`.
        """
        ids = self.token_ids(texts)
        lengths = tf.cast(ids.row_lengths(), tf.int32)
        return self.classifier.probabilities(self.logits(ids.to_tensor(), lengths, contexts))

    def context_numbers(self, contexts: Sequence[str | None]) -> np.ndarray:
        """Returns the number of each context, -1 for unknown ones: int32 [texts].

        Raises:
            InputError: The classifier has no contexts, but some are given.
        """
        if any(contexts) and not self.context_key:
            raise InputError(
                "contexts are given, but the classifier has none: it was trained without "
                "--context_key"
            )
        return np.array([self._numbers.get(name or "", UNKNOWN) for name in contexts], np.int32)

    def predict(
        self, texts: Sequence[str], contexts: Sequence[str | None] | None = None
    ) -> list[Prediction]:
        """Returns the predictions in the order of the texts; arguments as for `probabilities`."""
        return [self.prediction(row) for row in self.probabilities(texts, contexts=contexts)]

    def prediction(self, probabilities: np.ndarray) -> Prediction:
        """Returns the prediction of a text with these probabilities [classes]."""
        found = prediction_of(probabilities, self.class_names)
        if self.thresholds is None:
            return found
        reached = np.flatnonzero(probabilities >= self.thresholds)
        return found._replace(labels=[self.class_names[c] for c in reached])

    def probabilities(
        self,
        texts: Sequence[str],
        batch_size: int = 64,
        contexts: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Returns the probability of each class: float32 [texts, classes], in order.

        Texts of similar length are read together.

        Args:
            texts: Any number.
            batch_size: Of texts that are read together.
            contexts: Of each text, such as its author; None for unknown ones, or for all.
        """
        numbers = self.context_numbers([None] * len(texts) if contexts is None else contexts)
        if len(numbers) != len(texts):
            raise InputError(f"{len(numbers)} contexts for {len(texts)} texts")
        found = np.zeros((len(texts), len(self.class_names)), np.float32)
        if not len(texts):
            return found
        ids = self.tokenizer.rows(texts)
        for rows, tokens, lengths in batches_by_length(ids, self.max_tokens, batch_size):
            found[rows] = self._probabilities(tokens, lengths, numbers[rows])
        return found

    def _probabilities(
        self, tokens: np.ndarray, lengths: np.ndarray, contexts: np.ndarray
    ) -> np.ndarray:
        """Returns the probabilities of a batch; arguments as for `logits`."""
        if self._reader is not None:
            return self._reader.probabilities(tokens, lengths, contexts)
        return self.classifier.probabilities(self.logits(tokens, lengths, contexts)).numpy()

    @functools.cached_property
    def _reader(self) -> CompiledReader | None:
        return compiled_reader(self.classifier)

    @functools.cached_property
    def session_reader(self) -> SessionReader:
        """What reads sessions.

        Raises:
            InputError: The classifier cannot read a text in pieces.
        """
        return SessionReader(self.classifier, self.tokenizer, self._reader)

    def session(self, context: str | None = None) -> Session:
        """Returns a new session: a text that arrives in pieces, none of which is read twice.

        Args:
            context: Of the text, such as its author.

        Raises:
            InputError: The classifier cannot read a text in pieces.
        """
        (number,) = self.context_numbers([context])
        return Session(self.session_reader, int(number))


def load_classifier(folder: str | Path, flag: str = "--classifier") -> TextClassifier:
    """Returns the classifier of a bundle from fine-tuning.

    Args:
        folder: Of the bundle, or its address.
        flag: The flag that names the folder, for errors.

    Raises:
        InputError: There is no classifier bundle in `folder`, or it is damaged.
    """
    folder = fetched_bundle(str(folder), "classifier") if is_remote(str(folder)) else Path(folder)
    loaded = bundle.load(folder, "classifier", flag)
    classifier = bundle.new_classifier(loaded.info["model"])
    assign(bundle.classifier_variables(classifier), loaded.tensors)
    for direction in classifier.directions():
        direction.encoder.fix_moments()
    tokenizer = bundle_tokenizer(folder, loaded.info, flag)
    names = distinct_class_names(loaded.info, f"{flag}={folder}")
    contexts = (loaded.info.get("context_key", ""), loaded.info.get("context_names", ()))
    thresholds = loaded.info["thresholds"] if classifier.multi_label else None
    max_tokens = loaded.info["max_tokens"]
    return TextClassifier(classifier, tokenizer, names, max_tokens, *contexts, thresholds)


def prediction_of(probabilities: np.ndarray, class_names: Sequence[str]) -> Prediction:
    """Returns the prediction of a text with these probabilities [classes]."""
    values = [round(float(p), 6) for p in probabilities]
    label = class_names[int(np.argmax(probabilities))]
    return Prediction(label, dict(zip(class_names, values, strict=True)))


def batches_by_length(
    ids: Sequence[Sequence[int] | np.ndarray], most_tokens: int | np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields batches of texts of similar length: their rows, tokens and lengths.

    Rows are [batch]. Tokens are int32 [batch, time], right-padded; lengths int32 [batch].

    Args:
        ids: Of each text [tokens], from `Tokenizer.rows`.
        most_tokens: How many last tokens are read, of each text or of all.
        batch_size: Of texts.
    """
    lengths = np.minimum([len(row) for row in ids], most_tokens).astype(np.int32)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tokens = np.zeros((len(rows), lengths[rows[-1]]), np.int32)
        for place, row in enumerate(rows):
            tokens[place, : lengths[row]] = ids[row][-lengths[row] :]
        yield rows, tokens, lengths[rows]


def bundle_tokenizer(folder: Path, info: dict[str, Any], flag: str) -> Tokenizer:
    """Returns the bundle's tokenizer.

    Raises:
        InputError: It does not match the bundle's digest.
    """
    config = bundle.tokenizer_config(info, f"{flag}={folder}")
    tokenizer = load_tokenizer(folder / "vocab.txt", config)
    if tokenizer.sha256 != info["vocab_sha256"]:
        raise InputError(
            f"{flag}={folder}: its tokenizer is not the one that it was trained with: the SHA-256 "
            f"is {tokenizer.sha256[:12]}, not {info['vocab_sha256'][:12]}"
        )
    rows = info["model"]["vocab_size"]
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{flag}={folder}: its tokenizer has {tokenizer.vocab_size} words, but its model only "
            f"{rows} embeddings"
        )
    return tokenizer


def is_unicode(text: str) -> bool:
    """Returns whether the text can be encoded: JSON allows lone surrogates, UTF-8 does not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def distinct_class_names(info: dict[str, Any], where: str) -> tuple[str, ...]:
    """Returns `class_names`; raises InputError unless they are distinct texts."""
    names = class_names(info)
    if len(set(names)) < len(names) or any(not is_unicode(name) for name in names):
        raise InputError(f"{where}: its class names are not distinct texts: {names!r:.200}")
    return names


def class_names(info: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names of the classes, or their numbers if the bundle has no names."""
    count = info["model"]["num_classes"]
    names = info.get("class_names")
    if (
        isinstance(names, list)
        and len(names) == count
        and all(isinstance(name, str) for name in names)
    ):
        return tuple(names)
    return tuple(map(str, range(count)))
