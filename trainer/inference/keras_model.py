"""A classifier as a Keras model, text in: `keras.models.load_model` reads it from a .keras file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.tokenizers import make_tokenizer
from data_pipelines.tokenizers.vocabulary import read_pieces
from trainer.distribution.variables import assign, values_of
from trainer.inference.text_classifier import TextClassifier
from trainer.models import bundle
from trainer.models.context_state import UNKNOWN


@keras.saving.register_keras_serializable(package="warmstate")
class KerasClassifier(keras.Model):
    """Returns float32 [texts, classes], the probability of each class, of texts, string [texts].

    Args:
        model: The "model" of a classifier bundle.
        tokenizer: The tokenizer's config.
        pieces: Its vocabulary.
        class_names: In the order of the probabilities.
        max_tokens: The number of last tokens that are read of a text.
        thresholds: See `TextClassifier`.
    """

    def __init__(
        self,
        model: dict[str, Any],
        tokenizer: dict[str, Any],
        pieces: Sequence[str],
        class_names: Sequence[str],
        max_tokens: int,
        thresholds: Sequence[float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._arguments = {
            "model": dict(model),
            "tokenizer": dict(tokenizer),
            "pieces": list(pieces),
            "class_names": list(class_names),
            "max_tokens": max_tokens,
            "thresholds": thresholds,
        }
        self.class_names = tuple(class_names)
        self.classifier = bundle.new_classifier(model)
        made = make_tokenizer(pieces, tokenizer)
        self._reader = TextClassifier(self.classifier, made, class_names, max_tokens)
        self.built = True

    def call(self, texts: tf.Tensor) -> tf.Tensor:
        """Returns the probabilities."""
        texts = tf.reshape(texts, [-1])
        return self._reader.of_texts(texts, tf.fill(tf.shape(texts), UNKNOWN))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {**super().get_config(), **self._arguments}


def keras_model(text: TextClassifier, folder: Path) -> KerasClassifier:
    """Returns the Keras model of the classifier `text`, whose bundle is in `folder`.

    Raises:
        InputError: The classifier has contexts.
    """
    if text.context_names:
        raise InputError(
            f"--classifier={folder} reads the {text.context_key} of each text, and a .keras file "
            "takes texts alone: export a SavedModel, with an --output that does not end in .keras"
        )
    config = text.tokenizer.config()
    made = KerasClassifier(
        bundle.classifier_model(text.classifier),
        config,
        read_pieces(folder / "vocab.txt", config["type"]),
        text.class_names,
        text.max_tokens,
        None if text.thresholds is None else text.thresholds.tolist(),
    )
    weights = values_of(bundle.classifier_variables(text.classifier))
    assign(bundle.classifier_variables(made.classifier), weights)
    return made
