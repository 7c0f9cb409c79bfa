"""Linear label gain: the label is predicted after every word, with linearly rising weight.

Dai & Le 2015, section 2.3: the weight of a step's prediction rises from 0 at a document's first
token to 1 at its last, so that short paths carry the gradient to the first words too. Here a
document's weights are divided by their sum. Its loss is then a mean over its steps, so that one
learning rate suits all lengths and any `--label_gain`.
"""

import tensorflow as tf


def linear_weights(lengths: tf.Tensor, time: int | tf.Tensor) -> tf.Tensor:
    """Returns the weights of each document's steps, 0 at padding: float32 [batch, time].

    Their sum is 1; a document of one token has weight 1 at that token.

    Args:
        lengths: int32 [batch], at least 1.
        time: Number of steps.
    """
    lengths = lengths[:, None]
    position = tf.range(time)[None]
    rising = tf.where(lengths == 1, 1, position)
    weights = tf.cast(tf.where(position < lengths, rising, 0), tf.float32)
    return weights / tf.reduce_sum(weights, axis=1, keepdims=True)
