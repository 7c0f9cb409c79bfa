"""The recurrent language model (Dai & Le 2015, section 2: LM-LSTM), which predicts the next word.

The first word of a row is predicted from the row's initial state, word i + 1 from the output after
word i. So a document starts from the same state as a classifier, which then reads the same first
word, and only the LSTM's state must be carried from one piece of a text to the next.
"""

import tensorflow as tf

from trainer.models.encoder import States, dropout, token_mask
from trainer.models.text_model import EXACT, Noise, Rows, TextModel, all_but_last, drop_words


class LanguageModel(TextModel):
    """An encoder and the softmax over the vocabulary that predicts each next word."""

    @property
    def carried_size(self) -> int:
        """Size of the state that a row carries to the next row of the same text."""
        return sum(part.shape[-1] for part in tf.nest.flatten(self.encoder.start(1)))

    def loss_sum(self, rows: Rows, training: bool, noise: Noise = EXACT) -> tuple[tf.Tensor, ...]:
        """Returns the loss of rows that start from the encoder's initial state, or continue others.

        Rows that continue others are truncated backpropagation through time. They have two more
        tensors: carried [batch, carried_size], the state in which each row continues, through which
        no gradient passes; and carries float32 [batch], 0 for rows that start anew.

        Returns:
            The loss and the number of tokens; with `carried` also the state [batch, carried_size]
            after each row's last token.
        """
        start = self.encoder.start(tf.shape(rows["tokens"])[0])
        if "carried" in rows:
            start = self._continued(start, rows)
        outputs, final = self.read(start, rows, training, noise)
        loss = self.next_word_loss(start, outputs, rows, noise)
        if "carried" not in rows:
            return loss
        state = tf.concat(tf.nest.flatten(final), axis=1)
        return *loss, tf.cast(state, rows["carried"].dtype)

    def _continued(self, initial: States, rows: Rows) -> States:
        parts = tf.nest.flatten(initial)
        sizes = [part.shape[-1] for part in parts]
        carried = tf.split(tf.stop_gradient(rows["carried"]), sizes, axis=1)
        parts = [
            tf.where(rows["carries"][:, None] > 0, tf.cast(old, new.dtype), new)
            for old, new in zip(carried, parts, strict=True)
        ]
        return tf.nest.pack_sequence_as(initial, parts)

    def read(
        self, start: States, rows: Rows, training: bool, noise: Noise
    ) -> tuple[tf.Tensor, States]:
        """Returns the outputs after each token, [batch, time, units], and the final states."""
        embedded = dropout(
            self.encoder.embed(rows["tokens"]), noise.dropout_rate, noise.embedding_seed
        )
        embedded = drop_words(embedded, noise.word_dropout_rate, noise.word_seed)
        mask = token_mask(rows["tokens"], rows["lengths"])
        return self.encoder.read(
            embedded, mask, start, training, noise.dropout_rate, noise.output_seed
        )

    def next_word_loss(
        self, start: States, outputs: tf.Tensor, rows: Rows, noise: Noise
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the summed loss of each token, predicted from the ones before, and their number.

        Args:
            start, outputs: An argument and the result of `read`.
            rows, noise: See `TextModel.loss_sum`.
        """
        top_h, _ = start[-1]
        predicting = tf.concat([top_h[:, None], all_but_last(outputs)], axis=1)
        counted = token_mask(rows["tokens"], rows["lengths"]) & (rows["weights"][:, None] > 0)
        return self.prediction_loss(predicting, rows["tokens"], counted, noise)
