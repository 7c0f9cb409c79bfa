"""Exponential moving averages of weights: what is evaluated and kept in place of the last ones.

Averaged weights have less of the noise of single steps (Polyak & Juditsky 1992).
"""

import contextlib
from collections.abc import Iterator, Mapping

import keras
import tensorflow as tf

from trainer.distribution.distributor import Distributor
from trainer.variables import assign, values_of


class Averages:
    """Averages of `variables`, which `update` brings up to date after each step.

    Args:
      decay: what is left of an average after a step; less in the first steps, (1 + n) / (10 + n)
        after n steps, so that the first weights are soon forgotten.

    Attributes:
      variables: the averages, by name: "average/NAME".
    """

    def __init__(
        self, variables: Mapping[str, keras.Variable], decay: float, distributor: Distributor
    ):
        self._of = variables
        with distributor.scope():
            self.variables = {
                f"average/{name}": keras.Variable(
                    variable.numpy(), dtype=variable.dtype, trainable=False, name="average"
                )
                for name, variable in variables.items()
            }

        def update(steps: tf.Tensor) -> None:
            steps = tf.cast(steps, tf.float32)
            kept = tf.minimum(decay, (1 + steps) / (10 + steps))
            for variable, average in zip(variables.values(), self.variables.values(), strict=True):
                difference = tf.convert_to_tensor(variable) - tf.convert_to_tensor(average)
                moved = difference * tf.cast(1 - kept, average.dtype)
                average.assign(tf.convert_to_tensor(average) + moved)

        self._update = tf.function(update, autograph=False)

    def update(self, steps: tf.Tensor) -> None:
        """Takes in the variables as they are after `steps` steps; outside of a step."""
        self._update(steps)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Returns a context in which the variables hold their averages."""
        held = values_of(self._of)
        self.put_in_place()
        try:
            yield
        finally:
            assign(self._of, held)

    def put_in_place(self) -> None:
        """Sets the variables to their averages."""
        averages = values_of(self.variables)
        assign(self._of, {k.removeprefix("average/"): v for k, v in averages.items()})
