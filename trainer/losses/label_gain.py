"""Linear label gain: the label is predicted after every word, the later the more it counts.

Dai & Le 2015, section 2.3: the weight of a step's prediction rises linearly from 0 at a document's
first token to 1 at its last, so that the gradient reaches the first words by short ways too. Here
the weights of a document are divided by their sum: its loss is then a mean over its steps, and
documents of any length, and any `--label_gain`, go with the same learning rate.
"""

import tensorflow as tf


def linear_weights(lengths: tf.Tensor, time: int | tf.Tensor) -> tf.Tensor:
    """Returns the weights of each document's steps, 0 at padding: float32 [batch, time].

    They add up to 1; the one step of a document of one token has all of it.

    Args:
        lengths: Int32 [batch], at least 1.
        time: Steps.
    """
    lengths = lengths[:, None]
    position = tf.range(time)[None]
    rising = tf.where(lengths == 1, 1, position)
    weights = tf.cast(tf.where(position < lengths, rising, 0), tf.float32)
    return weights / tf.reduce_sum(weights, axis=1, keepdims=True)
