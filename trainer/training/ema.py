"""Exponential moving averages of weights, evaluated and kept in place of the last weights.

Averaged weights have less of the noise of single steps (Polyak & Juditsky 1992).
"""

import contextlib
from collections.abc import Iterator, Mapping

import keras
import tensorflow as tf

from trainer.distribution.distributor import Distributor
from trainer.distribution.variables import assign, values_of


class MovingAverage:
    """The exponential moving average of `weights`.

    Args:
        weights: Trained variables by name.
        decay: Factor on the average per step. In the first steps it is (1 + n) / (10 + n) after n
            steps if that is less, so that the initial weights are soon forgotten.

    Attributes:
        variables: The averages, by "average/NAME".
    """

    def __init__(
        self, weights: Mapping[str, keras.Variable], decay: float, distributor: Distributor
    ):
        self._weights = weights
        self._decay = decay
        with distributor.scope():
            self.variables = {
                f"average/{name}": keras.Variable(
                    variable.numpy(), dtype=variable.dtype, trainable=False, name="average"
                )
                for name, variable in weights.items()
            }
        self.update = tf.function(self._update, autograph=False)

    def _update(self, steps: tf.Tensor) -> None:
        """Adds the weights as they are after `steps` steps; called outside of a step."""
        steps = tf.cast(steps, tf.float32)
        kept = tf.minimum(self._decay, (1 + steps) / (10 + steps))
        for variable, average in zip(self._weights.values(), self.variables.values(), strict=True):
            difference = tf.convert_to_tensor(variable) - tf.convert_to_tensor(average)
            moved = difference * tf.cast(1 - kept, average.dtype)
            average.assign(tf.convert_to_tensor(average) + moved)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Returns a context in which the weights hold their averages."""
        held = values_of(self._weights)
        self.put_in_place()
        try:
            yield
        finally:
            assign(self._weights, held)

    def put_in_place(self) -> None:
        """Sets the weights to their averages."""
        averages = values_of(self.variables)
        assign(self._weights, {k.removeprefix("average/"): v for k, v in averages.items()})
