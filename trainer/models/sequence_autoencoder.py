"""The sequence autoencoder (Dai & Le 2015, section 2).

One LSTM and one embedding table read a document and then write it again. In the paper a document
of n tokens is one sequence of 2n - 1 inputs, w1 .. wn, w1 .. w(n-1), with the loss on the last n
outputs: reading wn (the end of sequence) predicts w1, reading w1 predicts w2, and so on. Here the
two halves are two passes of the same layer, the second from the state in which the first ended,
which is the same computation and needs no per-row alignment in a padded batch.
"""

import keras
import tensorflow as tf

from trainer.models.encoder import Encoder, dropout, token_mask
from trainer.objectives import softmax


class SequenceAutoencoder(keras.layers.Layer):
    """An encoder and the softmax over the vocabulary that writes the text again.

    Attributes:
      tied: whether the softmax compares a projection of the output with the embeddings (Press &
        Wolf 2017; Inan et al. 2017), rather than the output with a matrix of its own.
    """

    def __init__(self, encoder: Encoder, tied: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.tied = tied

    def build(self, input_shape: tuple | None = None) -> None:
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

    def predicting_outputs(
        self,
        read: tf.Tensor,
        written: tf.Tensor,
        mask: tf.Tensor,
        training: bool,
        dropout_rate: float = 0.0,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Returns the LSTM outputs from which the tokens are predicted: [batch, time, units].

        Position i predicts token i: position 0 is the state in which reading ended, position i
        the output after writing token i - 1. Dropout is between the layers of a stack.
        """
        seeds = [dropout_seed] * 2
        if dropout_rate:
            seeds = [tf.random.experimental.stateless_fold_in(dropout_seed, i) for i in range(2)]
        start = self.encoder.start(tf.shape(read)[0])
        _, states = self.encoder.read(read, mask, start, training, dropout_rate, seeds[0])
        outputs, _ = self.encoder.read(
            written[:, :-1], mask[:, 1:], states, training, dropout_rate, seeds[1]
        )
        last_h, _ = states[-1]
        return tf.concat([last_h[:, None], outputs], axis=1)

    def loss_sum(
        self,
        tokens: tf.Tensor,
        lengths: tf.Tensor,
        weights: tf.Tensor,
        training: bool,
        dropout_rate: float = 0.0,
        embedding_seed: tf.Tensor | None = None,
        output_seed: tf.Tensor | None = None,
        word_dropout_rate: float = 0.0,
        word_seed: tf.Tensor | None = None,
        subsampling: float = 0.0,
        subsampling_seed: tf.Tensor | None = None,
        num_sampled: int = 0,
        softmax_seed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the summed cross-entropy of the written tokens, in nats, and their number.

        Args:
          tokens: int32 [batch, time], right-padded.
          lengths: int32 [batch].
          weights: float32 [batch]; rows of weight 0 count nothing.
          training: whether a gradient will be taken.
          dropout_rate: of the embeddings and of the outputs of each layer.
          embedding_seed, output_seed: int32 [2], needed where dropout_rate is not 0.
          word_dropout_rate: of the words that the decoder is given, not of those that it must
            write (Bowman et al. 2016, section 3.1): the more are missing, the more it must take
            from the state in which reading ended.
          word_seed: int32 [2], needed where word_dropout_rate is not 0.
          subsampling: 0, or the frequency above which words are left out of the loss, the more
            often the more frequent they are; see `kept_words`.
          subsampling_seed: int32 [2], needed where subsampling is not 0.
          num_sampled: candidates of the sampled softmax; 0 is the exact one.
          softmax_seed: int32 [2].
        """
        mask = token_mask(tokens, lengths)
        embedded = dropout(self.encoder.embed(tokens), dropout_rate, embedding_seed)
        written = drop_words(embedded, word_dropout_rate, word_seed)
        outputs = self.predicting_outputs(
            embedded, written, mask, training, dropout_rate, output_seed
        )
        counted = mask & (weights[:, None] > 0)
        if subsampling:
            vocab_size = self.encoder.vocab_size
            counted &= kept_words(tokens, vocab_size, subsampling, subsampling_seed)
        hidden = tf.boolean_mask(outputs, counted)  # [tokens, units]
        hidden = dropout(hidden, dropout_rate, output_seed)
        targets = tf.boolean_mask(tokens, counted)  # [tokens]
        kernel, bias = self.softmax_kernel.value, self.softmax_bias.value
        if self.tied:
            hidden = tf.matmul(hidden, kernel)  # [tokens, embedding_dim]
            kernel = self.encoder.embeddings.value
        with tf.name_scope("softmax"):
            if num_sampled:
                losses = softmax.sampled_cross_entropy(
                    hidden, targets, kernel, bias, num_sampled, softmax_seed
                )
            else:
                losses = softmax.cross_entropy(hidden, targets, kernel, bias)
        return tf.reduce_sum(losses), tf.cast(tf.size(targets), tf.float32)


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
