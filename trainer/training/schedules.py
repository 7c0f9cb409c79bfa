"""Learning rates as functions of the step alone, so that a resumed run has the same ones.

constant     the rate
exponential  the rate times decay^step (Dai & Le 2015 and Miyato et al. 2017 train so)
cosine       rises linearly from 0, then falls along half a cosine to 0 (Loshchilov & Hutter 2017)
triangular   rises linearly from 1/32 of the rate, then falls linearly to there: slanted
             triangular (Howard & Ruder 2018, section 3.2)
range        rises geometrically from the rate times decay to the rate, for --lr_range
"""

import math

import keras
import tensorflow as tf

from trainer.config import StageConfig

# How much smaller than the peak the slanted triangular rate begins and ends.
TRIANGULAR_RATIO = 32


class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of a step, counted from 0, as Keras's optimizers ask for it."""

    def __init__(self, stage: StageConfig):
        self._stage = stage

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """Returns the learning rate: float32 []."""
        factor = FACTORS[self._stage.schedule]
        return self._stage.learning_rate * factor(self._stage, tf.cast(step, tf.float32))


def _constant(stage: StageConfig, step: tf.Tensor) -> tf.Tensor:
    return tf.ones_like(step)


def _exponential(stage: StageConfig, step: tf.Tensor) -> tf.Tensor:
    return tf.pow(stage.learning_rate_decay, step)


def _cosine(stage: StageConfig, step: tf.Tensor) -> tf.Tensor:
    warmup = _warmup_steps(stage)
    rising = (step + 1) / max(warmup, 1)
    falling = 0.5 + 0.5 * tf.cos(math.pi * (step - warmup) / max(stage.steps - warmup, 1))
    return tf.where(step < warmup, rising, tf.where(step < stage.steps, falling, 0.0))


def _triangular(stage: StageConfig, step: tf.Tensor) -> tf.Tensor:
    warmup = _warmup_steps(stage)
    rising = step / max(warmup, 1)
    falling = tf.maximum(1 - (step - warmup) / max(stage.steps - warmup, 1), 0)
    return (1 + tf.where(step < warmup, rising, falling) * (TRIANGULAR_RATIO - 1)) / (
        TRIANGULAR_RATIO
    )


def _range(stage: StageConfig, step: tf.Tensor) -> tf.Tensor:
    return tf.pow(stage.learning_rate_decay, 1 - step / max(stage.steps - 1, 1))


def rate_in_range(stage: StageConfig, step: float) -> float:
    """Returns the learning rate of schedule "range" at `step`, counted from 0."""
    left = 1 - step / max(stage.steps - 1, 1)
    return float(stage.learning_rate * stage.learning_rate_decay**left)


def _warmup_steps(stage: StageConfig) -> int:
    return int(stage.steps * stage.warmup_fraction)


FACTORS = {
    "constant": _constant,
    "exponential": _exponential,
    "cosine": _cosine,
    "triangular": _triangular,
    "range": _range,
}
