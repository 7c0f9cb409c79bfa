"""The sequence autoencoder (Dai & Le 2015, section 2).

One LSTM and one embedding table read a document and then write it again. In the paper a document
of n tokens is one sequence of 2n - 1 inputs, w1 .. wn, w1 .. w(n-1), with the loss on the last n
outputs: reading wn (the end of sequence) predicts w1, reading w1 predicts w2, and so on. Here the
two halves are two passes of the same layer, the second from the state in which the first ended,
which is the same computation and needs no per-row alignment in a padded batch.
"""

import tensorflow as tf

from trainer.models.encoder import dropout, token_mask
from trainer.models.text_model import EXACT, Noise, TextModel, drop_words


class SequenceAutoencoder(TextModel):
    """An encoder and the softmax over the vocabulary that writes the text again."""

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
        noise: Noise = EXACT,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the summed cross-entropy of the written tokens; see `TextModel.loss_sum`."""
        mask = token_mask(tokens, lengths)
        embedded = dropout(self.encoder.embed(tokens), noise.dropout_rate, noise.embedding_seed)
        written = drop_words(embedded, noise.word_dropout_rate, noise.word_seed)
        outputs = self.predicting_outputs(
            embedded, written, mask, training, noise.dropout_rate, noise.output_seed
        )
        return self.prediction_loss(outputs, tokens, mask & (weights[:, None] > 0), noise)
