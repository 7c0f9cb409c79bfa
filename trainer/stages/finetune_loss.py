"""What fine-tuning minimises: the label's cross-entropy, and what flags add to it."""

import tensorflow as tf

from trainer import loop, seeds
from trainer.config import Config
from trainer.models.classifier import Classifier, losses_and_errors
from trainer.models.encoder import dropout
from trainer.objectives.label_gain import linear_weights


def loss_sum(config: Config, classifier: Classifier) -> loop.LossSum:
    """Returns the training loss, with dropout."""
    every_step = config.label_gain == "linear"

    def of_rows(rows: dict, step: tf.Tensor, shard: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        tokens, lengths = rows["tokens"], rows["lengths"]
        logits = classifier.read(
            dropout(
                classifier.encoder.embed(tokens),
                config.finetune_dropout,
                seeds.fold(config.seed, seeds.EMBEDDING_DROPOUT, step, shard),
            ),
            lengths,
            classifier.start(tokens, lengths),
            training=True,
            dropout_rate=config.finetune_dropout,
            output_seed=seeds.fold(config.seed, seeds.OUTPUT_DROPOUT, step, shard),
            every_step=every_step,
        )
        losses = label_losses(logits, rows["labels"], lengths, config.label_smoothing)
        return tf.reduce_sum(losses * rows["weights"]), tf.reduce_sum(rows["weights"])

    return of_rows


def label_losses(
    logits: tf.Tensor, labels: tf.Tensor, lengths: tf.Tensor, smoothing: float = 0.0
) -> tf.Tensor:
    """Returns each document's cross-entropy: float32 [batch].

    Args:
      logits: of the documents, or of all their steps: then it is the steps' mean, weighted by
        `linear_weights`.
      labels, lengths: int32 [batch].
      smoothing: as for `losses_and_errors`.
    """
    if logits.shape.rank == 2:
        return losses_and_errors(logits, labels, smoothing)[0]
    time = tf.shape(logits)[1]
    losses, _ = losses_and_errors(logits, tf.repeat(labels[:, None], time, axis=1), smoothing)
    return tf.reduce_sum(losses * linear_weights(lengths, time), axis=1)
