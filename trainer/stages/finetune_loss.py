"""The training loss of fine-tuning: the label's cross-entropy, and the terms that flags add."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config import Config
from trainer.losses.adversarial import (
    adversarial_perturbation,
    divergence,
    random_direction,
    virtual_adversarial_perturbation,
)
from trainer.losses.label_gain import linear_weights
from trainer.models.classifier import Classifier, losses_and_errors, targets
from trainer.models.encoder import dropped_weights
from trainer.models.text_model import TextModel
from trainer.stages import pretrain
from trainer.training import seeds

Rows = dict[str, tf.Tensor]
# A document's embeddings, by direction -> its logits, always with the same outputs dropped.
Read = Callable[[list[tf.Tensor]], tf.Tensor]


class FinetuneLoss:
    """The training loss, with dropout: a mean over the global batch's labelled documents.

    Flags weight its terms, and each is a mean over what it reads: the virtual adversarial one over
    all documents, with or without labels; that of joint training (Dai & Le 2015, section 4.1) over
    the labelled documents' tokens.

    Args:
        objective: Model of joint training, on the classifier's encoder; None without.
        class_weights: Weights of the documents in the label's loss, [classes]; None: all equal.
            With sets of labels, of the classes that a document has; see `losses_and_errors`.
        label_sets: The store's; see `targets`.
    """

    def __init__(
        self,
        config: Config,
        classifier: Classifier,
        objective: TextModel | None = None,
        class_weights: np.ndarray | None = None,
        label_sets: np.ndarray | None = None,
    ):
        self._config = config
        self._classifier = classifier
        self._class_weights, self._label_sets = class_weights, label_sets
        self._objective_loss = objective and pretrain.loss_sum(objective, config)

    def __call__(
        self, rows: Rows, step: tf.Tensor, shard: int | tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the summed loss and the number of labelled documents."""
        encoders = [direction.encoder for direction in self._classifier.directions()]
        seed = seeds.fold(self._config.seed, seeds.RECURRENT_WEIGHT_DROPOUT, step)
        with dropped_weights(encoders, self._config.recurrent_weight_dropout, seed):
            return self._of_rows(rows, step, shard)

    def _of_rows(
        self, rows: Rows, step: tf.Tensor, shard: int | tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        config, classifier = self._config, self._classifier
        tokens, lengths = rows["tokens"], rows["lengths"]
        start = classifier.start(tokens, lengths, rows.get("contexts"))
        if config.train == "all" or config.normalises_embeddings:
            embedding_seed = seeds.fold(config.seed, seeds.EMBEDDING_DROPOUT, step, shard)
            embedded = classifier.embed(tokens, lengths, config.finetune_dropout, embedding_seed)
        else:  # frozen embeddings: their products with the kernel are shared by equal words
            embedded = classifier.words(tokens, lengths)

        def reader(part: Callable[[Any], Any]) -> Read:
            return functools.partial(
                classifier.read,
                lengths=part(lengths),
                start=part(start),
                training=config.trains_lstm,
                dropout_rate=config.finetune_dropout,
                output_seed=seeds.fold(config.seed, seeds.OUTPUT_DROPOUT, step, shard),
                every_step=config.label_gain == "linear",
            )

        # Documents without labels follow the others, and the label's terms need not read them.
        virtual = config.virtual_adversarial_weight
        labelled = _first(tf.math.count_nonzero(rows["labels"] >= 0)) if virtual else _all
        parts = {name: labelled(rows[name]) for name in ("lengths", "labels", "weights")}
        total = self._of_labels(parts, reader(labelled), labelled(embedded))
        if virtual:
            total += virtual * self._virtual_adversarial(rows, step, reader(_all), embedded)
        weights = _label_weights(rows)
        if self._objective_loss:
            nats, _ = self._objective_loss({**rows, "weights": weights}, step, shard)
            total += config.joint_weight * nats * _documents_per_token(rows)
        return total, tf.reduce_sum(weights)

    def _of_labels(self, rows: Rows, read: Read, embedded: list[Any]) -> tf.Tensor:
        """Returns the label's loss, and at adversarially perturbed embeddings, summed."""
        config, lengths, weights = self._config, rows["lengths"], _label_weights(rows)
        labels = targets(tf.maximum(rows["labels"], 0), self._label_sets)
        sets_weights = None if self._label_sets is None else self._class_weights

        def label_loss(logits: tf.Tensor) -> tf.Tensor:
            losses = label_losses(logits, labels, lengths, config.label_smoothing, sets_weights)
            if self._class_weights is not None and self._label_sets is None:
                losses *= tf.gather(self._class_weights, labels)
            return tf.reduce_sum(losses * weights)

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            if config.adversarial_weight:
                tape.watch(embedded)
            logits = read(embedded)
        total = label_loss(logits)
        if config.adversarial_weight:
            norm = config.perturbation_norm
            half = self._classifier.encoder.precision == "mixed_float16"
            moves = adversarial_perturbation(
                label_loss, logits, tape, embedded, lengths, norm, rescaled=half
            )
            total += config.adversarial_weight * label_loss(read(_moved(embedded, moves)))
        return total

    def _virtual_adversarial(
        self, rows: Rows, step: tf.Tensor, read: Read, embedded: list[tf.Tensor]
    ) -> tf.Tensor:
        """Returns the divergence of predictions, summed for a mean over all documents."""
        lengths = rows["lengths"]
        logits = at_end(tf.stop_gradient(read(embedded)), lengths)
        seed = seeds.fold(self._config.seed, seeds.VIRTUAL_ADVERSARIAL_DIRECTION, step)
        moves = virtual_adversarial_perturbation(
            logits,
            lambda embedded: at_end(read(embedded), lengths),
            embedded,
            [random_direction(e, rows["tokens"], seed + i) for i, e in enumerate(embedded)],
            lengths,
            self._config.perturbation_norm,
            self._classifier.multi_label,
        )
        changes = divergence(
            logits,
            at_end(read(_moved(embedded, moves)), lengths),
            self._classifier.multi_label,
        )
        # The step divides the sum by the labelled documents, but this term is a mean over all.
        labelled_part = rows["global_counts"][:, 0] / rows["global_counts"][:, 1]
        return tf.reduce_sum(changes * rows["weights"] * labelled_part)


def _label_weights(rows: Rows) -> tf.Tensor:
    """Returns the documents' weights, 0 for those without a label: float32 [batch]."""
    return rows["weights"] * tf.cast(rows["labels"] >= 0, tf.float32)


def _first(count: tf.Tensor) -> Callable[[Any], Any]:
    """Returns a function that cuts tensors, in any structure, to their first `count` rows."""
    return lambda tensors: tf.nest.map_structure(lambda tensor: tensor[:count], tensors)


def _all(tensors: Any) -> Any:
    return tensors


def _moved(embedded: list[tf.Tensor], moves: list[tf.Tensor]) -> list[tf.Tensor]:
    return [e + move for e, move in zip(embedded, moves, strict=True)]


def _documents_per_token(rows: Rows) -> tf.Tensor:
    """Returns labelled documents per token of the global batch: the same in all rows, if any."""
    ratio = rows["global_counts"][:, 0] / rows["global_counts"][:, 2]
    return tf.math.divide_no_nan(tf.reduce_sum(ratio), tf.cast(tf.size(ratio), tf.float32))


def label_losses(
    logits: tf.Tensor,
    labels: tf.Tensor,
    lengths: tf.Tensor,
    smoothing: float = 0.0,
    positive_weights: np.ndarray | None = None,
) -> tf.Tensor:
    """Returns each document's cross-entropy: float32 [batch].

    Args:
        logits: The documents', or those of all steps; then the loss is the steps' mean, weighted
            by `linear_weights`.
        lengths: int32 [batch].
        labels, smoothing, positive_weights: As for `losses_and_errors`.
    """
    if logits.shape.rank == 2:
        return losses_and_errors(logits, labels, smoothing, positive_weights)[0]
    time = tf.shape(logits)[1]
    at_steps = tf.repeat(labels[:, None], time, axis=1)
    losses, _ = losses_and_errors(logits, at_steps, smoothing, positive_weights)
    return tf.reduce_sum(losses * linear_weights(lengths, time), axis=1)


def at_end(logits: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Returns the logits at the documents' ends, [batch, ...], of logits with or without steps."""
    return logits if logits.shape.rank == 2 else tf.gather(logits, lengths - 1, batch_dims=1)
