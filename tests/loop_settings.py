"""Plain settings and batches for tests and benchmarks of training."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config import Config, StageConfig
from trainer.reporting.status_server import Vitals
from trainer.training.run import Run

STAGE = {item.name for item in dataclasses.fields(StageConfig)}


def stage(**changes: Any) -> StageConfig:
    """Returns a stage of one step, constant rate 0.1; flags of other groups are left out."""
    found = {"learning_rate": 0.1} | changes
    return StageConfig(**{name: value for name, value in found.items() if name in STAGE})


def config(**changes: Any) -> Config:
    """Returns plain flags; those of the stage are left out."""
    plain = {
        "sparse_reduce": "dense",
        "log_every_steps": 1,
        "checkpoint_every_steps": 1,
        "resume": "never",
    }
    found = plain | changes
    return Config(**{name: value for name, value in found.items() if name not in STAGE})


def run(
    distributor: Any,
    stop_request: Any = None,
    log: Callable[[str], None] = lambda line: None,
    vitals: Vitals | None = None,
    **changes: Any,
) -> Run:
    """Returns a run without a store."""
    request = stop_request or SimpleNamespace(received=False)
    return Run(config(**changes), distributor, None, request, log, vitals or Vitals())


class TokenBatches:
    """One batch a step of `tokens`, int32 [steps, rows, time], the same at every call.

    Row r of step s is example 10 s + r.
    """

    steps_per_epoch = 8

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens.astype(np.int32)

    def __call__(self, start: int, stop: int) -> tf.data.Dataset:
        _, rows, time = self._tokens.shape

        def load(step: tf.Tensor) -> dict:
            return {
                "tokens": tf.gather(self._tokens, step),
                "lengths": tf.fill([rows], time),
                "labels": tf.zeros([rows], tf.int32),
                "weights": tf.ones([rows]),
                "row_starts": tf.constant([0, rows // 2, rows]),
                "step": step,
            }

        return tf.data.Dataset.range(start, stop).map(load)

    def examples(self, step: int) -> list[int]:
        return [10 * step + row for row in range(self._tokens.shape[1])]

    def texts(self, step: int) -> dict[int, str]:
        return {example: f"text {example}" for example in self.examples(step)}
