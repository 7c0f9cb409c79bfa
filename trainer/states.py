"""Learned states: the hidden and cell state that an LSTM starts from, as values of their own.

They are made in four ways (`--initial_state`):

  zero     zeros: Keras's default, and the control
  mean     the encoder's final state, averaged over the pretraining corpus
  learned  trained as parameters during pretraining, and carried over (and trained on)
  encode   the encoder's final state for the very document that is to be classified
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.distribution.distributor import Distributor
from trainer.distribution.steps import sum_over_batches
from trainer.models.encoder import Encoder
from trainer.preemption import StopRequest


class LearnedState(NamedTuple):
    """The state of one LSTM layer: h and c, float32 [units]."""

    h: np.ndarray
    c: np.ndarray


def zero(units: int) -> LearnedState:
    """Returns the state of zeros."""
    return LearnedState(np.zeros(units, np.float32), np.zeros(units, np.float32))


def learned(encoder: Encoder) -> LearnedState:
    """Returns the state that `encoder` starts from."""
    return LearnedState(encoder.initial_h.numpy(), encoder.initial_c.numpy())


def mean(
    distributor: Distributor,
    encoder: Encoder,
    batches: tf.data.Dataset,
    stop_request: StopRequest | None = None,
) -> LearnedState:
    """Returns the encoder's final state, averaged over the documents of `batches`.

    Args:
      batches: of `data_pipelines.dataset.make_dataset`; a collective: all processes call it.
      stop_request: as in `sum_over_batches`.
    """

    def sums(batch: dict) -> list[tf.Tensor]:
        _, h, c = encoder(batch["tokens"], batch["lengths"])
        weights = batch["weights"][:, None]
        return [
            tf.reduce_sum(h * weights, axis=0),
            tf.reduce_sum(c * weights, axis=0),
            tf.reduce_sum(weights),
        ]

    h, c, documents = sum_over_batches(distributor, sums, batches, stop_request)()
    return LearnedState((h / documents).astype(np.float32), (c / documents).astype(np.float32))


def apply(encoder: Encoder, state: LearnedState) -> None:
    """Makes `encoder` start from `state`.

    Raises:
      ValueError: the state has another number of units than the encoder.
    """
    for variable, value in ((encoder.initial_h, state.h), (encoder.initial_c, state.c)):
        if tuple(value.shape) != tuple(variable.shape):
            raise ValueError(
                f"a state of shape {tuple(value.shape)} does not fit {variable.path}, "
                f"which is {tuple(variable.shape)}"
            )
        variable.assign(value)
