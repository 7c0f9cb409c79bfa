"""Reads the final states of any Keras LSTM, and sets its initial states.

An LSTM here is a `keras.layers.LSTM` or a subclass, an `RNN` of `LSTMCell`s, or a `Bidirectional`
of two of these: the forward layer's states first, as Keras returns them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.models.lstm import WarmLSTM

Pair = tuple[tf.Tensor, tf.Tensor]
RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional)


# ---- Final states ----


def reads_states(encoder: Any, layers: Sequence[str] | None) -> Callable[[Any], list[Pair]]:
    """Returns a function from inputs to the final (h, c) of each LSTM, each [batch, units].

    Args:
        encoder: See `trainer.states.from_encoder`.
        layers: Names of layers of a functional or sequential model. None takes its outputs if
            there are several, else its only LSTM.

    Raises:
        ValueError: The states are ambiguous, or there are none.
    """
    if isinstance(encoder, RECURRENT):
        if not is_lstm(encoder):
            raise ValueError(f"{encoder.name} is not an LSTM: its states are not h and c")
        if not encoder.built:
            raise ValueError(f"{encoder.name} was never called: it has no trained weights to read")
        copy = _returning_state(encoder)
        return lambda inputs: _pairs(copy(inputs, training=False)[1:], encoder.name)
    if isinstance(encoder, keras.Sequential):
        encoder = _functional(encoder)
    if isinstance(encoder, keras.models.Model) and hasattr(encoder, "operations"):
        if layers is None and len(tf.nest.flatten(encoder.outputs)) > 1:
            _refuse_other_states(encoder)
        else:
            encoder = _ending_in(encoder, layers)
    elif layers is not None:
        raise ValueError(
            f"layers={layers}: only a functional or sequential model can be read at a layer; let "
            f"the call of {type(encoder).__name__} return [h, c]"
        )
    name = getattr(encoder, "name", type(encoder).__name__)

    def read(inputs: Any) -> list[Pair]:
        outputs = tf.nest.flatten(encoder(inputs, training=False))
        # If the number is odd, the first one is the layer's output.
        return _pairs(outputs[len(outputs) % 2 :], name)

    return read


def _pairs(tensors: Sequence[tf.Tensor], name: str) -> list[Pair]:
    flat = tf.nest.flatten(tensors)
    shapes = [tuple(tensor.shape) for tensor in flat]
    pairs = list(zip(flat[::2], flat[1::2], strict=True)) if len(flat) % 2 == 0 else []
    fits = all(len(h.shape) == 2 and h.shape[1] == c.shape[1] for h, c in pairs)
    if not pairs or not fits:
        raise ValueError(
            f"{name} returns no states: of what it returns, after one output if the number is odd, "
            f"the rest must be h, c (, h, c ...) each [batch, units]; got shapes {shapes}. Make "
            "its LSTM with return_state=True, or name the LSTM: layers=['its name']"
        )
    return pairs


def _functional(model: keras.Sequential) -> keras.models.Model:
    if not model.built or model._functional is None:
        raise ValueError(f"{model.name} was never called: it has no trained weights to read")
    return model._functional


def _refuse_other_states(model: keras.models.Model) -> None:
    for output in tf.nest.flatten(model.outputs):
        layer, _, index = output._keras_history
        if index and isinstance(layer, RECURRENT) and not is_lstm(layer):
            raise ValueError(f"{layer.name} is not an LSTM: its states are not h and c")


def _ending_in(model: keras.models.Model, names: Sequence[str] | None) -> keras.models.Model:
    """Returns a model from the same inputs to the final states of the named layers."""
    there = {layer.name: layer for layer in model.layers if is_lstm(layer)}
    wanted = [names] if isinstance(names, str) else names if names is not None else list(there)
    if names is None and len(there) != 1:
        raise ValueError(
            f"{model.name} has {len(there)} LSTMs, {sorted(there)}: name those whose state you "
            "want, as layers=['encoder']; of models within a model, pass the inner one"
        )
    if unknown := [name for name in wanted if name not in there]:
        raise ValueError(f"{model.name} has no LSTM {unknown}; it has {sorted(there)}")
    states = []
    for name in wanted:
        calls = [
            node.arguments
            for nodes in model._nodes_by_depth.values()
            for node in nodes
            if node.operation is there[name]
        ]
        if len(calls) > 1:
            raise ValueError(f"{model.name} calls {name} {len(calls)} times: which is meant?")
        states += _returning_state(there[name])(*calls[0].args, **calls[0].kwargs)[1:]
    return keras.Model(model.inputs, tf.nest.flatten(states), name=model.name)


def _returning_state(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns a copy of the LSTM with its weights, which returns its states and is not stateful."""
    copy = _copy(layer)
    first = getattr(layer, "forward_layer", layer)
    copy.build((None, None, _cells(first)[0].kernel.shape[0]))
    copy.set_weights(layer.get_weights())
    return copy


def _copy(layer: keras.layers.Layer) -> keras.layers.Layer:
    name = f"{layer.name}_returning_state"
    if isinstance(layer, keras.layers.Bidirectional):
        forward, backward = _copy(layer.forward_layer), _copy(layer.backward_layer)
        return keras.layers.Bidirectional(forward, backward_layer=backward, name=name)
    config = layer.get_config() | {"name": name, "return_state": True, "stateful": False}
    return type(layer).from_config(config)


def is_lstm(layer: Any) -> bool:
    """Returns whether the layer is an LSTM; see the top of this module."""
    if isinstance(layer, keras.layers.Bidirectional):
        return is_lstm(layer.forward_layer) and is_lstm(layer.backward_layer)
    return isinstance(layer, keras.layers.RNN) and all(
        isinstance(cell, keras.layers.LSTMCell) for cell in _cells(layer)
    )


def _cells(layer: keras.layers.RNN) -> list[keras.layers.Layer]:
    return getattr(layer.cell, "cells", [layer.cell])


# ---- Initial states ----


class Start:
    """The initial state of an LSTM, as `trainer.states.apply` sets it.

    Attributes:
        name: For errors.
        shapes: Allowed shapes of h and c.
        can_be_trained: Whether h and c can be weights.
    """

    name: str
    shapes: list[tuple[int, ...]]
    can_be_trained = True

    def set(self, h: np.ndarray, c: np.ndarray, trainable: bool | None) -> None:
        """Sets h and c."""
        raise NotImplementedError

    def tune(self, state: bool, bias: bool) -> None:
        """Freezes the layer but for what is True."""
        raise NotImplementedError


class _Stateful(Start):
    """A stateful layer: its present states are set."""

    can_be_trained = False

    def __init__(self, layer: keras.layers.LSTM):
        if layer.states is None:
            raise ValueError(
                f"{layer.name} is stateful and was never called, so its batch size is unknown; "
                "call it, or build((batch, time, inputs)), first"
            )
        self.name, self.variables = layer.name, layer.states
        self.shapes = [(layer.units,), tuple(layer.states[0].shape)]

    def tune(self, state: bool, bias: bool) -> None:
        raise ValueError(f"{self.name} is stateful: it starts from a value, not from weights")

    def set(self, h: np.ndarray, c: np.ndarray, trainable: bool | None) -> None:
        for variable, value in zip(self.variables, (h, c), strict=True):
            variable.assign(np.broadcast_to(value, variable.shape))


class _Weights(Start):
    """A layer that is not stateful: every row starts from two weights of the layer."""

    def __init__(self, layer: keras.layers.LSTM):
        if not isinstance(layer, WarmLSTM) and type(layer) is not keras.layers.LSTM:
            raise ValueError(
                f"{layer.name} is of the class {type(layer).__name__}, which may define its start "
                "itself; derive that from trainer.models.lstm.WarmLSTM, or pass "
                "initial_state=[h, c] to its call"
            )
        for node in layer._inbound_nodes:
            if node.arguments.kwargs.get("initial_state") is not None:
                raise ValueError(
                    f"{layer.name} is called with initial_state=..., which overrides the layer's "
                    "state; build the model without it, or change the call"
                )
        self.name, self.layer = layer.name, layer
        self.shapes = [(layer.units,)]

    def set(self, h: np.ndarray, c: np.ndarray, trainable: bool | None) -> None:
        layer = self._warm()
        kind = {True: "learned", False: "fixed", None: layer.initial_state or "fixed"}
        layer.add_initial_state(kind[trainable])
        layer.initial_h.assign(h)
        layer.initial_c.assign(c)

    def tune(self, state: bool, bias: bool) -> None:
        layer = self._warm()
        layer.trainable = True  # or what is trained of it would not be
        for variable in layer.variables:
            variable.trainable = bias and variable is layer.cell.bias
        if state:
            layer.add_initial_state("learned")

    def _warm(self) -> WarmLSTM:
        """Returns the layer, as a WarmLSTM."""
        layer = self.layer
        if type(layer) is keras.layers.LSTM:
            # A WarmLSTM has one more attribute. The configuration of Keras's class has no place for
            # a state, so that a saved model would lose it.
            object.__setattr__(layer, "__class__", WarmLSTM)
            layer.initial_state = None
        return layer


def starts(target: Any) -> list[Start]:
    """Returns the initial state of each LSTM of a layer, a model or a list of them, in order.

    Raises:
        ValueError: The initial state of an LSTM cannot be set.
    """
    if isinstance(target, (list, tuple)):
        return [start for each in target for start in starts(each)]
    if isinstance(target, keras.layers.LSTM):
        return [_Stateful(target) if target.stateful else _Weights(target)]
    if isinstance(target, keras.layers.Bidirectional):
        return starts([target.forward_layer, target.backward_layer])
    if isinstance(target, keras.layers.RNN):
        raise ValueError(
            f"{target.name} is a {type(target).__name__} of {type(target.cell).__name__}: only "
            "keras.layers.LSTM can be made to start from a state; pass initial_state=... to its "
            "call, or stack LSTM layers"
        )
    return starts(lstms_within(target))


def lstms_within(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the LSTMs inside of a model or a layer, in its order."""
    found = []
    for part in layer._flatten_layers(include_self=False, recursive=False):
        found += [part] if is_lstm(part) else lstms_within(part)
    return found
