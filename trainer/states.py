"""Learned states: the hidden and cell state that an LSTM starts from.

There are four kinds (`--initial_state`):

  zero     zeros: Keras's default, and the control
  mean     the encoder's final state, averaged over the pretraining corpus
  learned  trained as parameters during pretraining, and further during fine-tuning
  encode   the encoder's final state for the document to classify

They work with any Keras model: `from_encoder` makes them, `load` and `load_encoder` read them from
a bundle, `apply` makes layers start from them, `ContextState` computes one for each row of a batch.
docs/initialising-lstm-state.md has more.

Example:
    state = states.from_encoder(autoencoder, x, layers="encoder")  # the mean over x
    states.apply(model, state)
    model.compile("adam", "mse")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from trainer.distribution.distributor import Distributor
from trainer.distribution.over_batches import sum_over_batches
from trainer.distribution.preemption import StopRequest
from trainer.models import bundle, keras_states
from trainer.models.context_state import ContextState
from trainer.models.encoder import Encoder, LearnedState

# As --train, but for "all"; the flags are not imported here.
TUNED = ("head", "state", "bias", "state+bias")

if TYPE_CHECKING:
    from trainer.inference.text_encoder import TextEncoder

__all__ = [
    "ContextState",
    "LearnedState",
    "apply",
    "from_encoder",
    "learned",
    "load",
    "load_encoder",
    "mean",
    "tune",
]


def learned(encoder: Encoder) -> list[LearnedState]:
    """Returns the initial state of each layer of `encoder`."""
    return [LearnedState(h.numpy(), c.numpy()) for h, c in encoder.initial_states]


def mean(
    distributor: Distributor,
    encoder: Encoder,
    batches: tf.data.Dataset,
    stop_request: StopRequest | None = None,
) -> list[LearnedState]:
    """Returns each layer's final state, averaged over the documents of `batches`.

    Args:
        batches: From `make_dataset`. This is a collective: all processes call it.
        stop_request: As in `sum_over_batches`.
    """

    def sums(batch: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        _, states = encoder(batch["tokens"], batch["lengths"])
        weights = batch["weights"][:, None]
        parts = [tf.reduce_sum(part * weights, axis=0) for state in states for part in state]
        return [*parts, tf.reduce_sum(weights)]

    *parts, documents = sum_over_batches(distributor, sums, batches, stop_request)()
    means = [(part / documents).astype(np.float32) for part in parts]
    return [LearnedState(h, c) for h, c in zip(means[::2], means[1::2], strict=True)]


def from_encoder(
    encoder: Any,
    data: Any,
    how: str = "mean",
    layers: str | Sequence[str] | None = None,
    batch_size: int = 64,
) -> list[LearnedState]:
    """Returns the final state of an encoder after reading `data`: a LearnedState for each LSTM.

    Args:
        encoder: A trained encoder: from `load_encoder`; a `keras.layers.LSTM`; a Keras model that
            returns its LSTM's states, as `keras.Model(inputs, [h, c])`; or a functional or
            sequential model with an LSTM inside, such as a whole autoencoder.
        data: Input of the encoder: texts, an array, or a `tf.data.Dataset` of batches, whose labels
            are ignored.
        how: "mean": averaged over the documents, h and c are [units]; "encode": for each document,
            [documents, units].
        layers: The names of the layers, for a model with several LSTMs.
        batch_size: Number of documents in a batch, if `data` is not batched.

    Raises:
        ValueError: The states are ambiguous, `data` is empty, or `how` is unknown.
    """
    if how not in ("mean", "encode"):
        raise ValueError(f"how={how!r} is neither 'mean' nor 'encode'")
    read = tf.function(keras_states.reads_states(encoder, layers), reduce_retracing=True)
    if not isinstance(data, tf.data.Dataset):
        data = tf.data.Dataset.from_tensor_slices(data).batch(batch_size)
    parts, documents = [], 0
    for batch in data:
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        final = [np.asarray(tf.cast(part, tf.float32)) for part in tf.nest.flatten(read(inputs))]
        documents += len(final[0])
        parts.append([part.sum(0, np.float64) for part in final] if how == "mean" else final)
    if not documents:
        raise ValueError("there are no documents to read")
    join = np.concatenate if how == "encode" else lambda sums: np.sum(sums, axis=0) / documents
    values = [join(column).astype(np.float32) for column in zip(*parts, strict=True)]
    return [LearnedState(h, c) for h, c in zip(values[::2], values[1::2], strict=True)]


def load(folder: str | Path, name: str = "learned") -> list[LearnedState]:
    """Returns a state of an encoder bundle from pretraining: a LearnedState for each layer.

    Args:
        name: "learned", the state trained with the encoder's weights, or "mean", its final state
            averaged over the pretraining corpus.

    Raises:
        InputError: There is no encoder bundle in the folder, or it is damaged.
        ValueError: There is no state of that name.
    """
    if name not in bundle.STATES:
        raise ValueError(f"name={name!r} is not one of {', '.join(bundle.STATES)}")
    return bundle.load(Path(folder), "encoder", "folder").state(name)


def load_encoder(folder: str | Path) -> "TextEncoder":
    """Returns the encoder of a bundle with its tokenizer, for raw text.

    Raises:
        InputError: There is no encoder bundle in the folder, or it is damaged.
    """
    from trainer.inference.text_encoder import load_encoder

    return load_encoder(folder)


def apply(
    target: Any,
    state: Any,
    layers: str | Sequence[str] | None = None,
    trainable: bool | None = None,
) -> None:
    """Makes LSTMs start from `state`, in place.

    A stateful layer gets it as its present states. Every other layer starts each row of a batch
    from it, unless its call is given an `initial_state`. For that a stock `keras.layers.LSTM`
    becomes a `WarmLSTM`, the same layer with two more weights, `initial_h` and `initial_c`, which
    are saved with the model; to load such a model, import this module first. As after a change of
    `trainable`, compile the model again.

    Args:
        target: An LSTM, a `Bidirectional` of LSTMs (two states, forward first), a model, a layer
            made of layers, or a list of these.
        state: For each LSTM a LearnedState or [h, c], each [units], and for a stateful layer also
            [batch, units]: a single one, a list, or a flat list as Keras returns it.
        layers: Names of LSTMs inside of a model with more LSTMs than states.
        trainable: Whether h and c are trained from now on; None: as before.

    Raises:
        ValueError: The numbers of states and LSTMs differ, sizes differ, or the state of a layer
            cannot be set. No layer is changed then.
    """
    pairs = _pairs(state)
    found = keras_states.starts(_named(target, layers))
    if len(found) != len(pairs):
        raise ValueError(
            f"{len(pairs)} states for {len(found)} LSTMs ({', '.join(s.name for s in found)}): "
            "give one for each; layers=['name'] chooses LSTMs inside of a model"
        )
    for start, pair in zip(found, pairs, strict=True):
        if trainable and not start.can_be_trained:
            raise ValueError(
                f"{start.name} is stateful: its state is a value, not a weight; "
                "trainable=True needs a layer that is not stateful"
            )
        for part, value in zip("hc", pair, strict=True):
            if value.shape not in start.shapes:
                hint = (
                    "; every row starts from one state: use from_encoder(..., how='mean'), or "
                    "pass a state for each row to the call, initial_state=[h, c]"
                )
                raise ValueError(
                    f"{start.name} takes {part} of shape {' or '.join(map(str, start.shapes))}, "
                    f"but got {value.shape}{hint if value.ndim == 2 else ''}"
                )
    for start, (h, c) in zip(found, pairs, strict=True):
        start.set(h, c, trainable)
    if isinstance(target, keras.Model):  # traced functions may still start from zeros
        target.train_function = target.test_function = target.predict_function = None


def tune(model: keras.Model, train: str = "state+bias") -> None:
    """Freezes a model but for its head and what `train` names of its LSTMs, in place.

    The head is what comes after the last LSTM. What is frozen needs no memory in the optimizer,
    and its gradients are not computed. As after a change of `trainable`, compile the model again.

    Args:
        model: Functional, sequential or subclassed, with LSTMs.
        train: "head"; or with it "state", each LSTM's initial state, zeros if it has none yet;
            "bias"; or "state+bias".

    Raises:
        ValueError: There is no LSTM, or `train` is unknown, or the state of a layer cannot be set.

    Example:
        states.tune(model, "state+bias")
        model.compile("adam", "mse")
    """
    if train not in TUNED:
        raise ValueError(f"train={train!r} is not one of {', '.join(TUNED)}")
    starts = keras_states.starts(model)
    with_lstm = [
        index
        for index, layer in enumerate(model.layers)
        if keras_states.is_lstm(layer) or keras_states.lstms_within(layer)
    ]
    if not with_lstm:
        raise ValueError(f"{model.name} has no LSTM")
    for layer in model.layers[: with_lstm[-1] + 1]:
        layer.trainable = False
    for start in starts:
        start.tune(state="state" in train, bias="bias" in train)
    model.train_function = None


def _named(target: Any, layers: str | Sequence[str] | None) -> Any:
    if layers is None:
        return target
    there = {layer.name: layer for layer in keras_states.lstms_within(target)}
    names = [layers] if isinstance(layers, str) else list(layers)
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"{target.name} has no LSTM {unknown}; it has {sorted(there)}")
    return [there[name] for name in names]


def _pairs(state: Any) -> list[LearnedState]:
    """Returns the argument of `apply` as a LearnedState for each LSTM."""
    parts = [np.asarray(part, np.float32) for part in tf.nest.flatten(state)]
    if not parts or len(parts) % 2:
        raise ValueError(f"a state is h and c for each LSTM; got {len(parts)} arrays")
    return [LearnedState(h, c) for h, c in zip(parts[::2], parts[1::2], strict=True)]
