"""What all pretraining objectives are made of: an encoder and a softmax over the vocabulary."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.losses import softmax
from trainer.models.encoder import Encoder, dropout


class Noise(NamedTuple):
    """What training draws at random. Without it a loss is exact. Seeds are int32 [2].

    Attributes:
        dropout_rate: Of the embeddings and of the outputs of each layer.
        word_dropout_rate: Of the words that the LSTM is given while it predicts, not of those that
            are predicted (Bowman et al. 2016, section 3.1): an autoencoder must then take more from
            the state in which reading ended.
        subsampling: 0, or the frequency above which words are left out of the loss, the more often
            the more frequent they are; see `kept_words`.
        num_sampled: Candidates of the sampled softmax; 0 is the exact one.
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


EXACT = Noise()  # none


class TextModel(keras.layers.Layer):
    """An encoder, and the softmax with which its outputs predict words.

    Attributes:
        tied: Whether the softmax compares a projection of the output with the embeddings (Press &
            Wolf 2017; Inan et al. 2017), rather than the output with a matrix of its own.
    """

    def __init__(self, encoder: Encoder, tied: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.tied = tied

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        """Makes the weights; the shape of the tokens does not matter."""
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
        # Start from Zipf's law: the sampled softmax then starts without variance.
        self.softmax_bias.assign(
            softmax.log_expected_count(tf.range(vocab_size), vocab_size, num_sampled=1)
        )
        self.built = True

    def loss_sum(
        self,
        tokens: tf.Tensor,
        lengths: tf.Tensor,
        weights: tf.Tensor,
        training: bool,
        noise: Noise = EXACT,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the summed cross-entropy of the predicted tokens, in nats, and their number.

        Args:
            tokens: Int32 [batch, time], right-padded.
            lengths: Int32 [batch].
            weights: Float32 [batch]; rows of weight 0 count nothing.
            training: Whether a gradient will be taken.
        """
        raise NotImplementedError

    def measured(
        self, tokens: tf.Tensor, lengths: tf.Tensor, weights: tf.Tensor
    ) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        """Returns what validation measures, by name: a sum over the rows, and what divides it.

        Args:
          tokens, lengths, weights: as for `loss_sum`.
        """
        return {"nats_per_token": self.loss_sum(tokens, lengths, weights, training=False)}

    def prediction_loss(
        self, outputs: tf.Tensor, tokens: tf.Tensor, counted: tf.Tensor, noise: Noise
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the summed cross-entropy of tokens given outputs, in nats, and their number.

        Args:
            outputs: [batch, time, units]; output i predicts token i.
            tokens: Int32 [batch, time].
            counted: Bool [batch, time], False where nothing is to be predicted.
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
                losses = softmax.sampled_cross_entropy(
                    hidden,
                    targets,
                    kernel,
                    bias,
                    noise.num_sampled,
                    noise.softmax_seed,
                    products=tf.bfloat16 if half else tf.float32,
                )
            else:
                losses = softmax.cross_entropy(hidden, targets, kernel, bias)
        return tf.reduce_sum(losses), tf.cast(tf.size(targets), tf.float32)

    def logits(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the logits of the words that outputs, [rows, units], predict: [rows, vocab]."""
        hidden, kernel, bias = self._softmax(outputs)
        return tf.matmul(hidden, kernel, transpose_b=True) + bias

    def _softmax(self, hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Variable, tf.Variable]:
        """Returns what the softmax compares, [rows, width], with what, and its bias."""
        kernel, bias = self.softmax_kernel.value, self.softmax_bias.value
        if self.tied:
            return tf.matmul(hidden, kernel), self.encoder.embeddings.value, bias
        return hidden, kernel, bias


def all_but_last(steps: tf.Tensor) -> tf.Tensor:
    """Returns `steps`, [batch, time, features], without the last one.

    On a CPU the gradient of a slice is ten times as fast as that of `steps[:, :-1]`.
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
    """Returns bool [batch, time]: which words stay when frequent ones are left out at random.

    A word of frequency f stays with probability sqrt(threshold / f) + threshold / f, as in the
    program of Mikolov et al. 2013 (section 2.3 has nearly the same). Frequencies are those of the
    log-uniform law, which ids sorted by falling frequency nearly follow.
    """
    frequency = tf.exp(softmax.log_expected_count(tokens, vocab_size, num_sampled=1))
    ratio = threshold / frequency
    return tf.random.stateless_uniform(tf.shape(tokens), seed) < tf.sqrt(ratio) + ratio
