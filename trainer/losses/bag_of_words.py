"""How well a document's words are reconstructed: squared error on its TF-IDF vector.

The vector has one entry a word of the vocabulary, (1 + log count) * idf, and length 1, as in a
linear autoencoder of documents (latent semantic analysis; Deerwester et al. 1990). A reconstruction
E q + b, with the word embeddings E, is compared with it without ever forming one:

    |E q + b - x|^2 = q'(E'E) q + 2 q'(E'b) + b'b - 2 q'(E'x) - 2 b'x + x'x

where E'x and b'x are sums over the words of the document alone.
"""

from typing import Any

import tensorflow as tf

from trainer.distribution.weight_statistics import of_weights


def tfidf_shares(tokens: tf.Tensor, mask: tf.Tensor, idf: tf.Tensor) -> tf.Tensor:
    """Returns what each token adds to the TF-IDF vector of its row: [batch, time].

    The shares of all occurrences of a word add up to its entry. They are 0 at padding.

    Args:
        tokens: int32 [batch, time].
        mask: bool [batch, time], False at padding.
        idf: [vocab_size], 0 for words to leave out; its type is that of the result.
    """
    nowhere = tf.fill(tf.shape(tokens), tf.int32.max)
    words = tf.where(mask, tokens, nowhere)
    ordered = tf.sort(words, axis=1)
    first, last = (tf.searchsorted(ordered, words, side) for side in ("left", "right"))
    count = tf.cast(last - first, idf.dtype)  # of the token's word in its row
    weight = (1 + tf.math.log(count)) * tf.gather(idf, tf.where(mask, tokens, 0))
    weight = tf.where(mask, weight, tf.zeros_like(weight))
    squared = tf.reduce_sum(tf.square(weight) / count, axis=1, keepdims=True)
    return tf.math.divide_no_nan(weight / count, tf.sqrt(squared))


def reconstruction_error(
    codes: tf.Tensor, embeddings: tf.Tensor, bias: tf.Tensor, words: tf.Tensor, shares: tf.Tensor
) -> tf.Tensor:
    """Returns the squared error of each document's reconstruction: [batch].

    1 is that of a reconstruction of zeros.

    Args:
        codes: [batch, dim].
        embeddings: [vocab_size, dim].
        bias: [vocab_size].
        words: int32 [batch, time].
        shares: [batch, time], from `tfidf_shares`.
    """
    gram, of_bias, bias_square = of_weights(
        lambda: (
            _gram(tf.convert_to_tensor(embeddings)),
            tf.linalg.matvec(embeddings, bias, transpose_a=True),  # [dim]
            tf.reduce_sum(tf.square(bias)),
        )
    )
    target = tf.einsum("btd,bt->bd", tf.gather(embeddings, words), shares)  # [batch, dim]
    bias_target = tf.reduce_sum(tf.gather(bias, words) * shares, axis=1)  # [batch]
    reconstructed = (
        tf.reduce_sum(tf.matmul(codes, gram) * codes, axis=1)
        + 2 * tf.linalg.matvec(codes, of_bias)
        + bias_square
    )
    has_words = tf.cast(tf.reduce_any(shares > 0, axis=1), codes.dtype)  # x'x
    return reconstructed - 2 * (tf.reduce_sum(codes * target, axis=1) + bias_target) + has_words


@tf.custom_gradient
def _gram(embeddings: tf.Tensor) -> Any:
    """Returns E'E, [dim, dim], whose gradient is one product, where TensorFlow's are two."""

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return tf.matmul(embeddings, upstream + tf.transpose(upstream))

    return tf.matmul(embeddings, embeddings, transpose_a=True), gradient
