"""The optimizer of both stages, and learning rates of their own for some weights."""

from collections.abc import Mapping
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.training.schedules import LearningRate, Schedule


class Rate(NamedTuple):
    """How a weight's learning rate differs from that of the others.

    Attributes:
      factor: on the learning rate (discriminative rates: Howard & Ruder 2018, section 3.2).
      frozen_steps: for how many steps it is 0 first (gradual unfreezing, section 3.3).
    """

    factor: float
    frozen_steps: int


def make_optimizer(name: str, schedule: Schedule) -> keras.optimizers.Optimizer:
    """Returns the optimizer.

    Args:
      name: one of config.OPTIMIZERS; sgd has a momentum of 0.9.
    """
    rate = LearningRate(schedule)
    if name == "sgd":
        return keras.optimizers.SGD(rate, momentum=0.9)
    kinds = {"adam": "Adam", "adamw": "AdamW", "nadam": "Nadam"}
    return getattr(keras.optimizers, kinds[name])(rate)


def optimizer_variables(optimizer: keras.optimizers.Optimizer) -> dict[str, keras.Variable]:
    """Returns the optimizer's variables by number and kind, its count of steps included."""
    # Keras numbers the optimizers and layers that a process makes, so their names depend on what
    # else it made: what --stage=all saved, its stages alone would not know.
    return {
        f"optimizer/{i:03d} {v.path.rsplit('_', 1)[-1].rsplit('/', 1)[-1]}": v
        for i, v in enumerate(optimizer.variables)
    }


def set_rates(
    optimizer: keras.optimizers.Optimizer,
    variables: Mapping[str, keras.Variable],
    rates: Mapping[str, Rate],
) -> None:
    """Gives the `variables` named in `rates` learning rates of their own.

    Moments are gathered from the first step on, also while a weight is frozen, so that its first
    update is no larger than those that follow.

    Args:
      optimizer: built for all of `variables`, in their order.
    """
    if not rates:
        return
    own = {list(variables).index(name): rate for name, rate in rates.items()}
    update_step = optimizer.update_step

    def scaled(
        gradient: tf.Tensor, variable: tf.Variable, learning_rate: float | tf.Tensor
    ) -> None:
        rate = own.get(optimizer._get_variable_index(variable))
        if rate is not None:
            trained = tf.cast(optimizer.iterations >= rate.frozen_steps, variable.dtype)
            learning_rate = tf.cast(learning_rate, variable.dtype) * rate.factor * trained
        update_step(gradient, variable, learning_rate)

    optimizer.update_step = scaled
