"""The base of all pretraining models: an encoder and a softmax over the vocabulary."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.losses import softmax
from trainer.models.encoder import Encoder, dropout


class Noise(NamedTuple):
    """The random parts of training; without them a loss is exact. Seeds are int32 [2].

    Attributes:
        dropout_rate: For embeddings and outputs of each layer.
        word_dropout_rate: For input words while predicting, not for predicted ones (Bowman et al.
            2016, section 3.1): an autoencoder must then rely more on the final state of reading.
        subsampling: 0, or the frequency above which words are randomly left out of the loss, more
            frequent words more often; see `kept_words`.
        num_sampled: Candidates of the sampled softmax; 0 for the exact one.
    """

    dropout_rate: float = 0.0
    embedding_seed: tf.Tensor | None = None
    output_seed: tf.Tensor | None = None
    word_dropout_rate: float = 0.0
    word_seed: tf.Tensor | None = None
    subsampling: float = 0.0
    subsampling_seed: tf.Tensor | None = None
    num_sampled: int = 0
    softmax_seed: tf.Tensor | None = None


EXACT = Noise()  # no noise
# A batch: tokens int32 [batch, time], right-padded; lengths int32 [batch]; and weights float32
# [batch], 0 for rows to ignore.
Rows = Mapping[str, tf.Tensor]


class TextModel(keras.layers.Layer):
    """An encoder, and a softmax that predicts words from its outputs.

    Attributes:
        tied: Whether the softmax multiplies a projection of the output with the embeddings (Press &
            Wolf 2017; Inan et al. 2017), rather than the output with a separate matrix.
    """

    def __init__(self, encoder: Encoder, tied: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.tied = tied

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        """Creates the weights, which do not depend on the shape of the tokens."""
        if not self.encoder.built:
            self.encoder.build()
        vocab_size, units = self.encoder.vocab_size, self.encoder.units
        self.softmax_kernel = self.add_weight(
            shape=(
                units if self.tied else vocab_size,
                self.encoder.embedding_dim if self.tied else units,
            ),
            initializer=keras.initializers.GlorotUniform(seed=self.encoder.seed + 3),
            name="softmax_kernel",
        )
        self.softmax_bias = self.add_weight(
            shape=(vocab_size,), initializer="zeros", name="softmax_bias"
        )
        # From Zipf's law, with which the sampled softmax starts without variance.
        self.softmax_bias.assign(
            softmax.log_expected_count(tf.range(vocab_size), vocab_size, num_sampled=1)
        )
        self.built = True

    def loss_sum(self, rows: Rows, training: bool, noise: Noise = EXACT) -> tuple[tf.Tensor, ...]:
        """Returns the summed cross-entropy of the predicted tokens, in nats, and their number.

        Args:
            rows: See `Rows`.
            training: Whether a gradient will be taken.
        """
        raise NotImplementedError

    def measured(self, rows: Rows) -> dict[str, tuple[tf.Tensor, ...]]:
        """Returns the measures of validation by name: a sum over the rows, and its divisor."""
        return {"nats_per_token": self.loss_sum(rows, training=False)}

    def prediction_loss(
        self, outputs: tf.Tensor, tokens: tf.Tensor, counted: tf.Tensor, noise: Noise
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the summed cross-entropy of the tokens, in nats, and their number.

        Args:
            outputs: [batch, time, units]; output i predicts token i.
            tokens: int32 [batch, time].
            counted: bool [batch, time], False for tokens to ignore.
        """
        if noise.subsampling:
            vocab_size = self.encoder.vocab_size
            counted &= kept_words(tokens, vocab_size, noise.subsampling, noise.subsampling_seed)
        hidden = tf.boolean_mask(outputs, counted)  # [tokens, units]
        hidden = dropout(hidden, noise.dropout_rate, noise.output_seed)
        targets = tf.boolean_mask(tokens, counted)  # [tokens]
        hidden, kernel, bias = self._softmax(hidden)
        with tf.name_scope("softmax"):
            if noise.num_sampled:
                half = self.encoder.precision == "mixed_bfloat16"
                sampled = softmax.sampled_cross_entropy(
                    hidden,
                    targets,
                    kernel,
                    bias,
                    noise.num_sampled,
                    noise.softmax_seed,
                    products=tf.bfloat16 if half else tf.float32,
                )
                total = tf.reduce_sum(sampled)
            else:
                total = softmax.cross_entropy_sum(hidden, targets, kernel, bias)
        return total, tf.cast(tf.size(targets), tf.float32)

    def logits(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the logits of words given outputs [rows, units]: [rows, vocab]."""
        hidden, kernel, bias = self._softmax(outputs)
        return tf.matmul(hidden, kernel, transpose_b=True) + bias

    def _softmax(self, hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Variable, tf.Variable]:
        """Returns the softmax's factors, [rows, width] and [vocab, width], and its bias."""
        kernel, bias = self.softmax_kernel.value, self.softmax_bias.value
        if self.tied:
            return tf.matmul(hidden, kernel), self.encoder.embeddings.value, bias
        return hidden, kernel, bias


def all_but_last(steps: tf.Tensor) -> tf.Tensor:
    """Returns `steps`, [batch, time, features], without the last one.

    On a CPU the gradient of tf.slice is ten times as fast as that of `steps[:, :-1]`.
    """
    time = steps.shape[1] or tf.shape(steps)[1]
    cut = tf.slice(steps, [0, 0, 0], [-1, time - 1, -1])
    cut.set_shape([steps.shape[0], None, steps.shape[2]])
    return cut


def drop_words(embedded: tf.Tensor, rate: float, seed: tf.Tensor | None) -> tf.Tensor:
    """Returns `embedded`, [batch, time, dim], with a fraction `rate` of its words zeroed."""
    if not rate:
        return embedded
    kept = tf.random.stateless_uniform(tf.shape(embedded)[:2], seed) >= rate
    return embedded * tf.cast(kept, embedded.dtype)[:, :, None]


def kept_words(tokens: tf.Tensor, vocab_size: int, threshold: float, seed: tf.Tensor) -> tf.Tensor:
    """Returns which words to keep when frequent ones are left out at random: bool [batch, time].

    A word of frequency f stays with probability sqrt(threshold / f) + threshold / f, as in the
    program of Mikolov et al. 2013 (section 2.3 differs slightly). Frequencies follow the
    log-uniform law, a good fit for ids sorted by falling frequency.
    """
    frequency = tf.exp(softmax.log_expected_count(tokens, vocab_size, num_sampled=1))
    ratio = threshold / frequency
    return tf.random.stateless_uniform(tf.shape(tokens), seed) < tf.sqrt(ratio) + ratio
