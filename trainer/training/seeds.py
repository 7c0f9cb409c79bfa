"""Every random draw of training is a pure function of (run seed, purpose, step, shard).

So a resumed run draws the same numbers as an uninterrupted one.
"""

import tensorflow as tf

# Purposes of draws. Runs are reproducible only if no number is ever reused.
EMBEDDING_DROPOUT = 1
OUTPUT_DROPOUT = 2
SOFTMAX_CANDIDATES = 3
WORD_DROPOUT = 4
SUBSAMPLING = 5
VIRTUAL_ADVERSARIAL_DIRECTION = 6
RECURRENT_WEIGHT_DROPOUT = 7


def fold(seed: int, purpose: int, step: tf.Tensor, shard: int | tf.Tensor = 0) -> tf.Tensor:
    """Returns a seed for `tf.random.stateless_*`: int32 [2]."""
    folded = tf.constant([seed, purpose], tf.int32)
    for part in (step, shard):
        folded = tf.random.experimental.stateless_fold_in(folded, tf.cast(part, tf.int32))
    return folded
