"""Learned states: the hidden and cell state that an LSTM starts from, as values of their own.

They are made in four ways (`--initial_state`):

  zero     zeros: Keras's default, and the control
  mean     the encoder's final state, averaged over the pretraining corpus
  learned  trained as parameters during pretraining, and carried over (and trained on)
  encode   the encoder's final state for the very document that is to be classified
"""

from collections.abc import Sequence
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


def learned(encoder: Encoder) -> list[LearnedState]:
    """Returns the state that each layer of `encoder` starts from."""
    return [LearnedState(h.numpy(), c.numpy()) for h, c in encoder.initial_states]


def mean(
    distributor: Distributor,
    encoder: Encoder,
    batches: tf.data.Dataset,
    stop_request: StopRequest | None = None,
) -> list[LearnedState]:
    """Returns each layer's final state, averaged over the documents of `batches`.

    Args:
      batches: of `data_pipelines.dataset.make_dataset`; a collective: all processes call it.
      stop_request: as in `sum_over_batches`.
    """

    def sums(batch: dict) -> list[tf.Tensor]:
        _, states = encoder(batch["tokens"], batch["lengths"])
        weights = batch["weights"][:, None]
        parts = [tf.reduce_sum(part * weights, axis=0) for state in states for part in state]
        return [*parts, tf.reduce_sum(weights)]

    *parts, documents = sum_over_batches(distributor, sums, batches, stop_request)()
    means = [(part / documents).astype(np.float32) for part in parts]
    return [LearnedState(h, c) for h, c in zip(means[::2], means[1::2], strict=True)]


def apply(encoder: Encoder, states: Sequence[LearnedState]) -> None:
    """Makes each layer of `encoder` start from its state of `states`.

    Raises:
      ValueError: there are more or fewer states than layers, or of another number of units.
    """
    if len(states) != len(encoder.initial_states):
        raise ValueError(
            f"{len(states)} states do not fit an encoder of {len(encoder.initial_states)} layers"
        )
    for variables, state in zip(encoder.initial_states, states, strict=True):
        for variable, value in zip(variables, state, strict=True):
            if tuple(value.shape) != tuple(variable.shape):
                raise ValueError(
                    f"a state of shape {tuple(value.shape)} does not fit {variable.path}, "
                    f"which is {tuple(variable.shape)}"
                )
    for variables, state in zip(encoder.initial_states, states, strict=True):
        for variable, value in zip(variables, state, strict=True):
            variable.assign(value)
