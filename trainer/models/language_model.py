"""The recurrent language model (Dai & Le 2015, section 2: LM-LSTM), which predicts the next word.

The first word of a row is predicted from the row's initial state, word i + 1 from the output after
word i. So a document starts from the same state as a classifier, which then reads the same first
word, and only the LSTM's state must be carried from one piece of a text to the next.
"""

import tensorflow as tf

from trainer.models.encoder import States, dropout, token_mask
from trainer.models.text_model import EXACT, Noise, TextModel, all_but_last, drop_words


class LanguageModel(TextModel):
    """An encoder and the softmax over the vocabulary that predicts each next word."""

    @property
    def carried_size(self) -> int:
        """Size of the state that a row carries to the next row of the same text."""
        return sum(part.shape[-1] for part in tf.nest.flatten(self.encoder.start(1)))

    def loss_sum(
        self,
        tokens: tf.Tensor,
        lengths: tf.Tensor,
        weights: tf.Tensor,
        training: bool,
        noise: Noise = EXACT,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the loss of rows that each start from the encoder's initial state.

        See `TextModel.loss_sum`.
        """
        start = self.encoder.start(tf.shape(tokens)[0])
        outputs, _ = self.read(start, tokens, lengths, training, noise)
        return self.next_word_loss(start, outputs, tokens, lengths, weights, noise)

    def loss_sum_carried(
        self,
        tokens: tf.Tensor,
        lengths: tf.Tensor,
        weights: tf.Tensor,
        carried: tf.Tensor,
        carries: tf.Tensor,
        training: bool,
        noise: Noise = EXACT,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the loss of rows that continue others (truncated backpropagation through time).

        Args:
            tokens, lengths, weights, training, noise: See `TextModel.loss_sum`.
            carried: [batch, carried_size], the state in which each row continues; no gradient
                passes through it.
            carries: float32 [batch], 0 for rows that start from the encoder's initial state.

        Returns:
            (loss, number of tokens, the state [batch, carried_size] after each row's last token).
        """
        initial = self.encoder.start(tf.shape(tokens)[0])
        parts = tf.nest.flatten(initial)
        sizes = [part.shape[-1] for part in parts]
        handed_on = tf.split(tf.stop_gradient(carried), sizes, axis=1)
        parts = [
            tf.where(carries[:, None] > 0, tf.cast(old, new.dtype), new)
            for old, new in zip(handed_on, parts, strict=True)
        ]
        start = tf.nest.pack_sequence_as(initial, parts)
        outputs, final = self.read(start, tokens, lengths, training, noise)
        loss, count = self.next_word_loss(start, outputs, tokens, lengths, weights, noise)
        handed_on = tf.concat(tf.nest.flatten(final), axis=1)
        return loss, count, tf.cast(handed_on, carried.dtype)

    def read(
        self, start: States, tokens: tf.Tensor, lengths: tf.Tensor, training: bool, noise: Noise
    ) -> tuple[tf.Tensor, States]:
        """Returns the outputs after each token, [batch, time, units], and the final states."""
        embedded = dropout(self.encoder.embed(tokens), noise.dropout_rate, noise.embedding_seed)
        embedded = drop_words(embedded, noise.word_dropout_rate, noise.word_seed)
        mask = token_mask(tokens, lengths)
        return self.encoder.read(
            embedded, mask, start, training, noise.dropout_rate, noise.output_seed
        )

    def next_word_loss(
        self,
        start: States,
        outputs: tf.Tensor,
        tokens: tf.Tensor,
        lengths: tf.Tensor,
        weights: tf.Tensor,
        noise: Noise,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the loss of each token, predicted from what was read before it, and their number.

        Args:
          start, outputs: as given to `read` and as it returned them.
          tokens, lengths, weights, noise: see `TextModel.loss_sum`.
        """
        top_h, _ = start[-1]
        predicting = tf.concat([top_h[:, None], all_but_last(outputs)], axis=1)
        counted = token_mask(tokens, lengths) & (weights[:, None] > 0)
        return self.prediction_loss(predicting, tokens, counted, noise)
