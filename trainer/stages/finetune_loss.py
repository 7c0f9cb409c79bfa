"""What fine-tuning minimises: the label's cross-entropy, and what flags add to it."""

import tensorflow as tf

from trainer.config import Config
from trainer.losses.adversarial import (
    adversarial_perturbation,
    divergence,
    random_direction,
    virtual_adversarial_perturbation,
)
from trainer.losses.label_gain import linear_weights
from trainer.models.classifier import Classifier, losses_and_errors
from trainer.models.encoder import dropped_weights
from trainer.models.text_model import TextModel
from trainer.stages import pretrain
from trainer.training import seeds
from trainer.training.task import LossSum


def loss_sum(config: Config, classifier: Classifier, objective: TextModel | None = None) -> LossSum:
    """Returns the training loss, with dropout: a mean over the global batch's labelled documents.

    Its terms are weighted by flags, and each is a mean over what it reads: the virtual adversarial
    one over all documents, labelled or not; that of joint training (Dai & Le 2015, section 4.1)
    over the labelled documents' tokens.

    Args:
      objective: of joint training, on the classifier's encoder; None where there is none.
    """
    objective_loss = objective and pretrain.loss_sum(objective, config)

    def of_rows(
        rows: dict[str, tf.Tensor], step: tf.Tensor, shard: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        tokens, lengths, labels = rows["tokens"], rows["lengths"], rows["labels"]
        labelled = rows["weights"] * tf.cast(labels >= 0, tf.float32)
        labels = tf.maximum(labels, 0)
        start = classifier.start(tokens, lengths)
        output_seed = seeds.fold(config.seed, seeds.OUTPUT_DROPOUT, step, shard)

        def read(embedded: list[tf.Tensor]) -> tf.Tensor:
            # Always with the same outputs dropped: they differ by what is read alone.
            return classifier.read(
                embedded,
                lengths,
                start,
                training=True,
                dropout_rate=config.finetune_dropout,
                output_seed=output_seed,
                every_step=config.label_gain == "linear",
            )

        def label_loss(logits: tf.Tensor) -> tf.Tensor:
            losses = label_losses(logits, labels, lengths, config.label_smoothing)
            return tf.reduce_sum(losses * labelled)

        def moved(embedded: list[tf.Tensor], moves: list[tf.Tensor]) -> tf.Tensor:
            return read([e + move for e, move in zip(embedded, moves, strict=True)])

        embedded = classifier.embed(
            tokens,
            lengths,
            config.finetune_dropout,
            seeds.fold(config.seed, seeds.EMBEDDING_DROPOUT, step, shard),
        )
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(embedded)
            logits = read(embedded)
        total = label_loss(logits)
        if config.adversarial_weight:
            norm = config.perturbation_norm
            moves = adversarial_perturbation(label_loss, logits, tape, embedded, lengths, norm)
            total += config.adversarial_weight * label_loss(moved(embedded, moves))
        if config.virtual_adversarial_weight:
            seed = seeds.fold(config.seed, seeds.VIRTUAL_ADVERSARIAL_DIRECTION, step)
            moves = virtual_adversarial_perturbation(
                at_end(logits, lengths),
                lambda embedded: at_end(read(embedded), lengths),
                embedded,
                [random_direction(e, tokens, seed + i) for i, e in enumerate(embedded)],
                lengths,
                config.perturbation_norm,
            )
            changes = divergence(
                tf.stop_gradient(at_end(logits, lengths)),
                at_end(moved(embedded, moves), lengths),
            )
            # The sum is divided by the labelled documents, but this term is a mean over all.
            labelled_part = rows["global_counts"][:, 0] / rows["global_counts"][:, 1]
            changed = tf.reduce_sum(changes * rows["weights"] * labelled_part)
            total += config.virtual_adversarial_weight * changed
        if objective_loss:
            nats, _ = objective_loss({**rows, "weights": labelled}, step, shard)
            # Documents a token of the global batch: the same in all rows, of which there may be 0.
            ratio = rows["global_counts"][:, 0] / rows["global_counts"][:, 2]
            ratio = tf.math.divide_no_nan(tf.reduce_sum(ratio), tf.cast(tf.size(ratio), tf.float32))
            total += config.joint_weight * nats * ratio
        return total, tf.reduce_sum(labelled)

    encoders = [direction.encoder for direction in classifier.directions]

    def with_dropped_weights(
        rows: dict[str, tf.Tensor], step: tf.Tensor, shard: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        seed = seeds.fold(config.seed, seeds.RECURRENT_WEIGHT_DROPOUT, step)
        with dropped_weights(encoders, config.recurrent_weight_dropout, seed):
            return of_rows(rows, step, shard)

    return with_dropped_weights


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


def at_end(logits: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Returns the documents' logits, [batch, ...], of theirs or of those of all their steps."""
    return logits if logits.shape.rank == 2 else tf.gather(logits, lengths - 1, batch_dims=1)
