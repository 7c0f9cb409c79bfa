"""The bag-of-words autoencoder: it predicts each next word, and then which words it has read.

One pass over a document serves both. The next word is predicted from each output, as by the
language model. From the mean of all outputs the decoder, one matrix and the word embeddings,
reconstructs the document's TF-IDF vector. So the outputs must hold what the document is about and
how it speaks, from its first word to its last, which the next word alone does not ask for.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.losses.bag_of_words import reconstruction_error, tfidf_shares
from trainer.models.encoder import Encoder, token_mask
from trainer.models.language_model import LanguageModel
from trainer.models.text_model import EXACT, Noise, Rows


class BagAutoencoder(LanguageModel):
    """A language model whose mean output also reconstructs the bag of words that it read.

    Attributes:
        bag_weight: Weight of the reconstruction's squared error, beside the next words' nats.
        idf: [vocab_size], the inverse document frequencies of the words; set by `set_idf`.
    """

    def __init__(
        self, encoder: Encoder, tied: bool = False, bag_weight: float = 1.0, **kwargs: Any
    ):
        super().__init__(encoder, tied, **kwargs)
        self.bag_weight = bag_weight

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        """Makes the weights; the shape of the tokens does not matter."""
        super().build(input_shape)
        encoder = self.encoder
        self.bag_kernel = self.add_weight(
            shape=(encoder.units, encoder.embedding_dim),
            initializer=keras.initializers.GlorotUniform(seed=encoder.seed + 7),
            name="bag_kernel",
        )
        self.bag_bias = self.add_weight(
            shape=(encoder.vocab_size,), initializer="zeros", name="bag_bias"
        )
        self.idf = self.add_weight(
            shape=(encoder.vocab_size,), initializer="ones", trainable=False, name="idf"
        )

    def set_idf(self, document_counts: np.ndarray, documents: int) -> None:
        """Sets `idf`, and the bias to about the mean TF-IDF vector.

        Args:
            document_counts: How many documents have each word, [vocab_size]; 0 leaves a word out.
            documents: How many there are.
        """
        has = document_counts / documents
        idf = np.where(has > 0, np.log((1 + documents) / (1 + document_counts)), 0)
        self.idf.assign(idf)
        # A document of each word with the probability `has`, once, has this length on average.
        length = np.sqrt(np.sum(has * idf**2))
        self.bag_bias.assign(has * idf / max(length, 1e-6))

    def code_kernel(self, outputs: np.ndarray) -> np.ndarray:
        """Returns the map from mean output to code: float32 [units, embedding_dim].

        The distance of two codes is that of the bags reconstructed from them. So what the decoder
        does not use, such as the next word's, is left out. The code's axes are the principal ones,
        those in which documents differ most first.

        Args:
            outputs: The mean outputs of some documents, [documents, units].
        """
        embeddings = self.encoder.embeddings.numpy().astype(np.float64)
        # |E q| = |L' q| for every q, if L L' = E'E; the ridge keeps that positive definite.
        gram = embeddings.T @ embeddings
        root = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) * np.eye(len(gram)))
        kernel = self.bag_kernel.numpy() @ root
        codes = (outputs - outputs.mean(axis=0, dtype=np.float64)) @ kernel
        axes = np.linalg.eigh(codes.T @ codes)[1][:, ::-1]
        largest = axes[np.abs(axes).argmax(axis=0), np.arange(len(axes))]
        return (kernel @ (axes * np.sign(largest))).astype(np.float32)

    def loss_sum(self, rows: Rows, training: bool, noise: Noise = EXACT) -> tuple[tf.Tensor, ...]:
        """Returns the summed loss of both predictions, and the number of tokens.

        A document's squared error counts once for each of its tokens. See `TextModel.loss_sum`.
        """
        start = self.encoder.start(tf.shape(rows["tokens"])[0])
        outputs, _ = self.read(start, rows, training, noise)
        nats, count = self.next_word_loss(start, outputs, rows, noise)
        errors = self.bag_errors(outputs, rows["tokens"], rows["lengths"])
        each = tf.cast(rows["lengths"], errors.dtype) * tf.cast(rows["weights"] > 0, errors.dtype)
        return nats + self.bag_weight * tf.reduce_sum(errors * each), count

    def measured(self, rows: Rows) -> dict[str, tuple[tf.Tensor, ...]]:
        """Returns the next words' loss and the bags' squared error; see `TextModel.measured`."""
        start = self.encoder.start(tf.shape(rows["tokens"])[0])
        outputs, _ = self.read(start, rows, training=False, noise=EXACT)
        errors = self.bag_errors(outputs, rows["tokens"], rows["lengths"])
        real = tf.cast(rows["weights"] > 0, errors.dtype)
        return {
            "nats_per_token": self.next_word_loss(start, outputs, rows, EXACT),
            "bag_error": (tf.reduce_sum(errors * real), tf.reduce_sum(real)),
        }

    def bag_errors(self, outputs: tf.Tensor, tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """Returns the squared error of each row's reconstruction: [batch].

        Args:
            outputs: [batch, time, units].
            tokens: int32 [batch, time].
            lengths: int32 [batch].
        """
        mask = token_mask(tokens, lengths)
        counted = tf.cast(mask, outputs.dtype)
        mean = tf.math.divide_no_nan(
            tf.einsum("btu,bt->bu", outputs, counted), tf.reduce_sum(counted, axis=1)[:, None]
        )
        codes = tf.matmul(mean, self.bag_kernel.value)
        shares = tfidf_shares(tokens, mask, self.idf.value)
        return reconstruction_error(
            codes, self.encoder.embeddings.value, self.bag_bias.value, tokens, shares
        )
