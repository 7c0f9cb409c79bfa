"""Bounds for rounding errors, from a type and the number of roundings on the way to a result."""

import tensorflow as tf

SIGNIFICANT_BITS = {tf.bfloat16: 8, tf.float16: 11, tf.float32: 24}
# Each number that an LSTM in half precision rounds: forward inputs, weights, gates and h; then the
# gradients of the outputs and of the gates, both factors of the last product, and its result.
# Sums are in float32.
OF_HALF_PRECISION_LSTM = 4 + 5


def bound(dtype: tf.DType, roundings: int) -> float:
    """Returns the largest relative error to first order, if no step amplifies it."""
    return roundings * 2.0 ** -SIGNIFICANT_BITS[dtype]
