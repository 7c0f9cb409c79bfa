"""The sequence autoencoder (Dai & Le 2015, section 2).

One LSTM and one embedding table read a document and then reconstruct it. In the paper a document of
n tokens is one sequence of 2n - 1 inputs, w1 .. wn, w1 .. w(n-1), with the loss on the last n
outputs: reading wn (the end of sequence) predicts w1, reading w1 predicts w2, and so on. Here the
two halves are two passes of the same layer, the second from the final state of the first. That is
the same computation, without aligning the rows of a padded batch.
"""

from typing import Any

import tensorflow as tf

from data_pipelines.reserved_ids import END_ID, PADDING_ID
from trainer.models.encoder import States, dropout, token_mask
from trainer.models.text_model import EXACT, Noise, Rows, TextModel, all_but_last, drop_words


class SequenceAutoencoder(TextModel):
    """An encoder, and a softmax over the vocabulary that reconstructs the text."""

    def predicting_outputs(
        self,
        read: tf.Tensor,
        written: tf.Tensor,
        mask: tf.Tensor,
        training: bool,
        dropout_rate: float = 0.0,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Returns the LSTM outputs that predict the tokens: [batch, time, units].

        Position 0 is the final state of reading, position i the output after writing token i - 1.
        Dropout is between the layers of a stack.
        """
        seeds = [dropout_seed] * 2
        if dropout_rate:
            seeds = [tf.random.experimental.stateless_fold_in(dropout_seed, i) for i in range(2)]
        start = self.encoder.start(tf.shape(read)[0])
        _, states = self.encoder.read(read, mask, start, training, dropout_rate, seeds[0])
        outputs, _ = self.encoder.read(
            all_but_last(written), mask[:, 1:], states, training, dropout_rate, seeds[1]
        )
        last_h, _ = states[-1]
        return tf.concat([last_h[:, None], outputs], axis=1)

    def loss_sum(self, rows: Rows, training: bool, noise: Noise = EXACT) -> tuple[tf.Tensor, ...]:
        """Returns the summed cross-entropy of the written tokens; see `TextModel.loss_sum`."""
        tokens, mask = rows["tokens"], token_mask(rows["tokens"], rows["lengths"])
        embedded = dropout(self.encoder.embed(tokens), noise.dropout_rate, noise.embedding_seed)
        written = drop_words(embedded, noise.word_dropout_rate, noise.word_seed)
        outputs = self.predicting_outputs(
            embedded, written, mask, training, noise.dropout_rate, noise.output_seed
        )
        counted = mask & (rows["weights"][:, None] > 0)
        return self.prediction_loss(outputs, tokens, counted, noise)

    def reconstruct(
        self, tokens: tf.Tensor, lengths: tf.Tensor, max_tokens: int
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Reads each row and writes it again by greedy decoding.

        Args:
            tokens: int32 [batch, time], right-padded, each row with its end token.
            lengths: int32 [batch].
            max_tokens: Largest number of tokens to write of a row.

        Returns:
            The rows, int32 [batch, max_tokens], right-padded, and their lengths, int32 [batch],
            including the end token, or max_tokens for a row without one.
        """
        batch = tf.shape(tokens)[0]
        _, states = self.encoder(tokens, lengths)
        mask = tf.ones([batch, 1], tf.bool)
        never = tf.one_hot(PADDING_ID, self.encoder.vocab_size, on_value=-float("inf"))

        def write(
            i: tf.Tensor, states: States, ended: tf.Tensor, rows: tf.TensorArray
        ) -> tuple[Any, ...]:
            top_h, _ = states[-1]
            words = tf.argmax(self.logits(top_h) + never, axis=1, output_type=tf.int32)
            words = tf.where(ended, PADDING_ID, words)
            _, states = self.encoder.read(
                self.encoder.embed(words)[:, None], mask, states, training=False
            )
            return i + 1, states, ended | (words == END_ID), rows.write(i, words)

        rows = tf.TensorArray(tf.int32, max_tokens, element_shape=[None])
        rows = rows.unstack(tf.fill([max_tokens, batch], PADDING_ID))
        _, _, _, rows = tf.while_loop(
            lambda i, states, ended, rows: (i < max_tokens) & ~tf.reduce_all(ended),
            write,
            (0, states, tf.zeros([batch], tf.bool), rows),
            shape_invariants=(
                tf.TensorShape([]),
                tf.nest.map_structure(lambda _: tf.TensorShape([None, self.encoder.units]), states),
                tf.TensorShape([None]),
                tf.TensorShape(None),
            ),
        )
        written = tf.transpose(rows.stack())
        return written, tf.reduce_sum(tf.cast(written != PADDING_ID, tf.int32), axis=1)


def same_rows(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Returns which rows of int32 [batch, time] are equal up to padding: bool [batch]."""
    width = tf.maximum(tf.shape(first)[1], tf.shape(second)[1])
    first, second = (
        tf.pad(rows, [[0, 0], [0, width - tf.shape(rows)[1]]], constant_values=PADDING_ID)
        for rows in (first, second)
    )
    return tf.reduce_all(first == second, axis=1)
