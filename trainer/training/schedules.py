"""Learning rates as functions of the step alone, so that a resumed run goes on as it would have.

constant     the rate
exponential  the rate times decay^step (Dai & Le 2015 and Miyato et al. 2017 train so)
cosine       rises linearly from 0, then falls along half a cosine to 0 (Loshchilov & Hutter 2017)
triangular   rises linearly from 1/32 of the rate, then falls linearly to there: slanted
             triangular (Howard & Ruder 2018, section 3.2)
"""

import math
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

# How much smaller than the peak the slanted triangular rate begins and ends.
TRIANGULAR_RATIO = 32


@dataclass(frozen=True)
class Schedule:
    """What a stage's flags say of its learning rate.

    Attributes:
      kind: one of config.SCHEDULES.
      rate: the constant or first one, or the peak of cosine and triangular.
      decay: of exponential, the factor after each step.
      warmup_fraction: of cosine and triangular, the part of the steps in which the rate rises.
      steps: in which cosine and triangular end.
    """

    kind: str
    rate: float
    decay: float = 1.0
    warmup_fraction: float = 0.0
    steps: int = 1

    @property
    def warmup_steps(self) -> int:
        """Returns in how many steps the rate rises."""
        return int(self.steps * self.warmup_fraction)


@keras.saving.register_keras_serializable(package="warmstate")
class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """The rate of a step, counted from 0, as Keras's optimizers ask for it."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """Returns the learning rate: float32 []."""
        schedule = self.schedule
        step = tf.cast(step, tf.float32)
        return schedule.rate * FACTORS[schedule.kind](schedule, step)

    def get_config(self) -> dict[str, Any]:
        return {"schedule": self.schedule.__dict__}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LearningRate":
        """Returns the schedule that `get_config` describes."""
        return cls(Schedule(**config["schedule"]))


def _constant(schedule: Schedule, step: tf.Tensor) -> tf.Tensor:
    return tf.ones_like(step)


def _exponential(schedule: Schedule, step: tf.Tensor) -> tf.Tensor:
    return tf.pow(schedule.decay, step)


def _cosine(schedule: Schedule, step: tf.Tensor) -> tf.Tensor:
    warmup = schedule.warmup_steps
    rising = (step + 1) / max(warmup, 1)
    falling = 0.5 + 0.5 * tf.cos(math.pi * (step - warmup) / max(schedule.steps - warmup, 1))
    return tf.where(step < warmup, rising, tf.where(step < schedule.steps, falling, 0.0))


def _triangular(schedule: Schedule, step: tf.Tensor) -> tf.Tensor:
    warmup = schedule.warmup_steps
    rising = step / max(warmup, 1)
    falling = tf.maximum(1 - (step - warmup) / max(schedule.steps - warmup, 1), 0)
    return (1 + tf.where(step < warmup, rising, falling) * (TRIANGULAR_RATIO - 1)) / (
        TRIANGULAR_RATIO
    )


FACTORS = {
    "constant": _constant,
    "exponential": _exponential,
    "cosine": _cosine,
    "triangular": _triangular,
}
