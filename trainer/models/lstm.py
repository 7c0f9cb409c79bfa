"""The LSTM layer: `keras.layers.LSTM` with states one can set and a faster loop on CPU.

Both loops keep everything feature-major, [features, batch]: the batch is the short side of every
product, so the long weight matrix is walked row by row, and the gates are contiguous row slices
that TensorFlow hands out without copying. The forward loop does one product a step on the stacked
[input; 1; state]; the backward loop only sends dh and dc through the recurrent matrix, and one
product after it gives all weight gradients.

Where the compiled loops of trainer/native are faster, training in float32 or bfloat16 on a CPU runs
those, and so do programs that ask for it, in inference. Exported models do not: they must load
anywhere.

In half precision (a layer of dtype policy mixed_bfloat16 or mixed_float16) the products are in it;
states, gates and what they keep are float32 inside the loops: a cell state adds up small numbers
over hundreds of steps.

Equations: Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, as in Keras.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record

from trainer import native

# Saturates a sigmoid to exactly 0 or 1 in every float type, float16 included.
_SATURATING = 1e4


class _Saved(NamedTuple):
    """What the forward loop leaves for the backward loop: lists (variants) of one tensor a step."""

    columns: tf.Tensor  # of [rows + units, batch], what the step's product multiplied
    input_forget: tf.Tensor  # of [2 * units, batch]
    candidate: tf.Tensor  # of [units, batch]
    output: tf.Tensor  # of [units, batch]
    previous_cell: tf.Tensor  # of [units, batch]
    squashed_cell: tf.Tensor  # of [units, batch], tanh of the new cell state


class Mode(NamedTuple):
    """How a call of `lstm` runs.

    Attributes:
      return_sequences: whether the first result has all steps, or only the last.
      keep_activations: whether the forward loop keeps what the backward loop needs; if not, a
        gradient runs the forward loop again.
      training: whether the compiled loops may run, also where no program has asked for them.
      frozen: whether of the weights at most the bias is trained: its gradient is then computed
        without the products that give the others, which a graph leaves out where nobody asks.
      row_biases: whether each row of the batch has its own bias.
      of_inputs: whether the inputs have a gradient. In a graph it is always True: what is not used
        there never runs.
      of_matrices: the same of kernel and recurrent kernel.
      clip_norm: the largest norm of a row's gradient in h that a step gives the step before it;
        0: any.
    """

    return_sequences: bool
    keep_activations: bool
    training: bool = True
    frozen: bool = False
    row_biases: bool = False
    of_inputs: bool = True
    of_matrices: bool = True
    clip_norm: float = 0.0


class Words(NamedTuple):
    """A batch of words, each different one embedded once.

    Attributes:
      rows: [words, inputs].
      index: int32 [batch, time], of the word's row.
    """

    rows: tf.Tensor
    index: tf.Tensor


@keras.saving.register_keras_serializable(package="warmstate")
class WarmLSTM(keras.layers.LSTM):
    """`keras.layers.LSTM` whose states can be set or learned, and which is faster on CPU.

    Arguments, weights, masks, outputs and saved files are those of `keras.layers.LSTM`, but for
    `initial_state` of the constructor:

      None       every row starts from zeros, as in Keras
      "learned"  every row starts from the layer's own weights `initial_h` and `initial_c`, each
                 [units], zeros at first, which are trained with the others
      "fixed"    the same, not trained

    States that a call is given come before it. `trainer.states.apply` sets the weights. With a GPU
    the layer runs Keras's own path (cuDNN). Without one, the standard configuration (tanh, sigmoid,
    no recurrent dropout, not unrolled) runs this module's loops; any other runs Keras's.

    Activations are kept for the backward pass if `training=True`, or if a gradient tape records the
    call. Only a tape around a `tf.function` is not seen in it: a gradient through a call without
    `training=True` is right there too, but runs the forward loop a second time, and warns.
    """

    def __init__(self, *args: Any, initial_state: str | None = None, **kwargs: Any):
        """Takes the arguments of `keras.layers.LSTM`, and `initial_state`.

        Raises:
            ValueError: `initial_state` is none of the three, or the layer is stateful too.
        """
        super().__init__(*args, **kwargs)
        if initial_state not in (None, "learned", "fixed"):
            raise ValueError(
                f"{self.name}: initial_state={initial_state!r} is not None, 'learned' or 'fixed'; "
                "tensors go to the call: layer(inputs, initial_state=[h, c])"
            )
        if initial_state and self.stateful:
            raise ValueError(
                f"{self.name}: a stateful layer starts from where it stopped, not from "
                f"initial_state={initial_state!r}; set its states with reset_state(states=[h, c])"
            )
        self.initial_state = initial_state

    def build(
        self, sequences_shape: tuple[int | None, ...], initial_state_shape: Any = None
    ) -> None:
        """Makes the weights; see `keras.layers.RNN.build`."""
        super().build(sequences_shape, initial_state_shape)
        if self.initial_state is not None:
            self.add_initial_state(self.initial_state)

    def add_initial_state(self, kind: str) -> None:
        """Gives the layer weights to start from, if it has none yet.

        Args:
            kind: "learned" or "fixed".
        """
        self.initial_state = kind
        if not hasattr(self, "initial_h"):
            built = self.built
            self._tracker.unlock()  # Keras locks a layer when it is built
            for name in ("initial_h", "initial_c"):
                setattr(self, name, self.add_weight((self.units,), name=name, initializer="zeros"))
            if built:
                self._tracker.lock()
        for variable in (self.initial_h, self.initial_c):
            variable.trainable = kind == "learned"

    def get_initial_state(self, batch_size: Any) -> list[tf.Tensor]:
        """Returns what a batch starts from where the call is not told: [h, c], [batch, units]."""
        if self.initial_state is None:
            return super().get_initial_state(batch_size)
        shape = (batch_size, self.units)
        return [tf.broadcast_to(self._tensor(v), shape) for v in (self.initial_h, self.initial_c)]

    def get_config(self) -> dict[str, Any]:
        """Returns Keras's configuration, and `initial_state` if it is not None."""
        ours = {} if self.initial_state is None else {"initial_state": self.initial_state}
        return {**super().get_config(), **ours}

    # What the recurrent kernel is multiplied by, [units, 4 * units]; see `encoder.dropped_weights`.
    recurrent_mask: tf.Tensor | None = None
    # Biases of the rows of a batch, [batch, 4 * units], in place of the bias; see
    # `encoder.row_biases`.
    row_bias: tf.Tensor | None = None
    # Whether masks hide only the ends of rows: no output comes before a row's first step.
    right_padded: bool = False
    # Whether training keeps no activations, and the backward pass runs the forward loop again.
    recompute: bool = False
    # The largest norm of a row's gradient in h that a step gives the step before it; 0: any. A row
    # whose gradient explodes then still counts as one row of the batch, which clipping the sum of
    # all rows cannot give (Pascanu et al. 2013, section 3.2; Graves 2013 clips at each step too).
    clip_norm: float = 0.0

    def reset_state(self, states: Any = None) -> None:
        """Sets the states of a stateful layer; to zeros if none are given.

        Args:
            states: `[h, c]`, arrays or tensors, each [batch, units], or [units] for the same row
                throughout the batch. Values are cast to the states' dtype.

        Raises:
            ValueError: If values are given and the layer is not stateful or not built, there are
                not two of them, or one has another shape.
        """
        if states is None:
            super().reset_state()
            return
        if not self.stateful:
            raise ValueError(
                f"{self.name}: reset_state(states=...) needs a layer made with stateful=True; "
                "pass initial_state=[h, c] to the call of a layer that is not"
            )
        if self.states is None:
            raise ValueError(
                f"{self.name}: reset_state(states=...) came before the layer was built, so its "
                "batch size is unknown; call the layer or build((batch, time, inputs)) first"
            )
        if len(states) != len(self.states):
            raise ValueError(
                f"{self.name}: reset_state(states=...) expects 2 states, [h, c]; got {len(states)}"
            )
        # All are checked before any is assigned: an error leaves the layer as it was.
        rows = [
            self._state_row(label, variable, value)
            for label, variable, value in zip("hc", self.states, states, strict=True)
        ]
        for variable, row in zip(self.states, rows, strict=True):
            variable.assign(row)

    def _state_row(self, label: str, variable: keras.Variable, value: Any) -> tf.Tensor:
        if not tf.is_tensor(value):
            value = np.asarray(value)
        batch, units = variable.shape
        if tuple(value.shape) not in {(batch, units), (units,)}:
            raise ValueError(
                f"{self.name}: reset_state(states=...) expects {label} of shape "
                f"{(batch, units)} or {(units,)}; got {tuple(value.shape)}"
            )
        return tf.broadcast_to(tf.cast(value, variable.dtype), (batch, units))

    def inner_loop(
        self,
        sequences: tf.Tensor,
        initial_state: list[tf.Tensor],
        mask: tf.Tensor | None,
        training: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Runs the recurrence; see `keras.layers.RNN.inner_loop`.

        Args:
            sequences: [batch, time, inputs].
            initial_state: `[h, c]`, each [batch, units].
            mask: Boolean [batch, time] or None.
            training: Whether to apply dropout and keep activations.

        Returns:
            The last output [batch, units]; the outputs [batch, time, units], or [batch, 1, units]
            if not `return_sequences`; and `[h, c]`, each [batch, units].
        """
        if not self._runs_own_loop():
            return self._inner_loop_of_keras(sequences, initial_state, mask, training=training)
        if isinstance(mask, (list, tuple)):
            mask = mask[0]
        if training and self.dropout:
            # One mask for all steps, as in Keras.
            sequences *= self.cell.get_dropout_mask(sequences[:, 0, :])[:, tf.newaxis, :]
        if self.go_backwards:
            sequences = tf.reverse(sequences, [1])
            mask = None if mask is None else tf.reverse(mask, [1])

        mask = None if mask is None else tf.cast(mask, tf.bool)
        outputs, h, c = self._run(sequences, None, initial_state, mask, bool(training))
        return outputs[:, -1], outputs, [h, c]

    def read_words(
        self,
        words: Words,
        mask: tf.Tensor | None,
        initial_state: list[tf.Tensor],
        training: bool = False,
    ) -> list[tf.Tensor]:
        """Returns what a call on the words' rows returns where sequences and state are asked for.

        Each different word is multiplied with the kernel once, where the compiled loops run.

        Args:
            words: what is read.
            mask: Boolean [batch, time] or None.
            initial_state: `[h, c]`, each [batch, units].
            training: Whether to keep activations.
        """
        if native.operations(training) and words.rows.dtype == tf.float32 and self.fits_compiled():
            return self._run(words.rows, words.index, initial_state, mask, training)
        sequences = tf.gather(words.rows, words.index)
        return self(sequences, mask=mask, initial_state=initial_state, training=training)

    def _run(
        self,
        inputs: tf.Tensor,
        index: tf.Tensor | None,
        initial_state: list[tf.Tensor],
        mask: tf.Tensor | None,
        training: bool,
    ) -> list[tf.Tensor]:
        """Returns outputs, final h and c of the loops on `inputs`, or on its rows at `index`."""
        initial_state, mask = self._checked(inputs if index is None else index, initial_state, mask)
        cell = self.cell
        kernel, recurrent = self._tensor(cell.kernel), self._tensor(cell.recurrent_kernel)
        if self.recurrent_mask is not None:
            recurrent *= tf.cast(self.recurrent_mask, recurrent.dtype)
        bias = self._tensor(cell.bias) if self.use_bias else tf.zeros_like(kernel[0])
        if self.row_bias is not None:
            bias = tf.cast(self.row_bias, bias.dtype)
        h, c = initial_state
        recorded = record.should_record_backprop([inputs, h, c, kernel, recurrent, bias])
        mode = Mode(
            self.return_sequences,
            keep_activations=(training or recorded) and not self.recompute,
            training=training or recorded,
            frozen=not (cell.kernel.trainable or cell.recurrent_kernel.trainable),
            row_biases=self.row_bias is not None,
            of_inputs=_is_recorded(inputs),
            of_matrices=_is_recorded(kernel, recurrent),
            clip_norm=self.clip_norm,
        )
        outputs, h, c = lstm(inputs, h, c, (kernel, recurrent, bias), mask, mode, index)
        if mask is not None and not (self.right_padded and not self.zero_output_for_mask):
            outputs = self._mask_outputs(outputs, mask)
        return [outputs, h, c]

    def _checked(
        self, sequences: tf.Tensor, states: list[tf.Tensor], mask: tf.Tensor | None
    ) -> tuple[list[tf.Tensor], tf.Tensor | None]:
        """Returns states and mask; an error, now or in the graph, unless they fit `sequences`."""
        batch, steps = sequences.shape[:2]
        running_batch, running_steps = tf.unstack(tf.shape(sequences)[:2])
        states = [
            _of_shape(
                tf.convert_to_tensor(state),
                (batch, self.units),
                (running_batch, self.units),
                f"{self.name}: the initial state {label} has to be of shape (batch, units)",
            )
            for label, state in zip("hc", states, strict=True)
        ]
        if mask is not None:
            mask = _of_shape(
                mask,
                (batch, steps),
                (running_batch, running_steps),
                f"{self.name}: the mask has to be of shape (batch, time)",
            )
        return states, mask

    def _tensor(self, variable: keras.Variable) -> tf.Tensor:
        # Read here, not in the loops: a custom gradient may not capture variables.
        with record.stop_recording() if _is_frozen(variable) else contextlib.nullcontext():
            return tf.cast(tf.convert_to_tensor(variable), self.compute_dtype)

    def fits_compiled(self) -> bool:
        """Returns whether the compiled loops can run this layer in float32."""
        of_size = self.units % native.UNITS_MULTIPLE == 0
        return of_size and self.compute_dtype == "float32" and self._runs_own_loop()

    def _runs_own_loop(self) -> bool:
        standard = (
            self.activation is keras.activations.tanh
            and self.recurrent_activation is keras.activations.sigmoid
            and not self.recurrent_dropout
            and not self.unroll
            # Keras draws one dropout mask a gate in this mode.
            and not (self.dropout and self.cell.implementation == 1)
        )
        # Keras's path knows no biases of rows, and clips no step's gradient.
        needed = self.row_bias is not None or self.clip_norm > 0
        return standard and (needed or (not native.has_gpu() and self.use_cudnn is not True))

    def _inner_loop_of_keras(self, *args: Any, **kwargs: Any) -> Any:
        """Runs Keras's path, on a GPU cuDNN, with the recurrent weights that are left."""
        if native.has_gpu() and (why := self._why_not_cudnn()):
            warnings.warn(f"{self.name}: {why}: a GPU runs it step by step", stacklevel=2)
        whole = self.cell.recurrent_kernel
        if self.recurrent_mask is not None:
            left = self._tensor(whole)
            left *= tf.cast(self.recurrent_mask, left.dtype)
            object.__setattr__(self.cell, "recurrent_kernel", left)  # Keras must not track it
        try:
            return super().inner_loop(*args, **kwargs)
        finally:
            object.__setattr__(self.cell, "recurrent_kernel", whole)

    def _why_not_cudnn(self) -> str:
        """Returns the argument that keeps Keras from using cuDNN, or ""."""
        fit = {
            "activation": self.activation is keras.activations.tanh,
            "recurrent_activation": self.recurrent_activation is keras.activations.sigmoid,
            "recurrent_dropout": not self.recurrent_dropout,
            "unroll": not self.unroll,
            "use_bias": self.use_bias,
            "use_cudnn": self.use_cudnn in ("auto", True),
        }
        found = [name for name, fits in fit.items() if not fits]
        return f"cuDNN has no {found[0]}={self.get_config()[found[0]]!r}" if found else ""

    def _mask_outputs(self, outputs: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        # A masked step repeats the output before it, and that is zero, not the initial state,
        # before the first unmasked step.
        if self.zero_output_for_mask:
            shown = mask
        else:
            shown = tf.cumsum(tf.cast(mask, tf.int32), axis=1) > 0
        if not self.return_sequences:
            shown = shown[:, -1:]
        return tf.where(shown[:, :, tf.newaxis], outputs, tf.zeros_like(outputs))


def _is_frozen(variable: keras.Variable) -> bool:
    """Returns whether tapes are not to see an eager read: what they see they watch, frozen too."""
    if variable.trainable or not tf.executing_eagerly():
        return False
    try:  # `value` may be a cast of what is watched
        return not record.should_record_backprop([variable._value.handle])
    except ValueError:  # a mirrored variable, outside of the replicas
        return False


def _is_recorded(*tensors: tf.Tensor) -> bool:
    return not tf.executing_eagerly() or record.should_record_backprop(list(tensors))


def _of_shape(
    tensor: tf.Tensor, known: tuple[int | None, ...], running: tuple[Any, ...], rule: str
) -> tf.Tensor:
    """Returns `tensor` if its shape is `known`, and `running` when the graph runs."""
    if not tensor.shape.is_compatible_with(known):
        raise ValueError(f"{rule} = {known}; got {tuple(tensor.shape)}")
    if tensor.shape.is_fully_defined() and None not in known:
        return tensor
    tensor = tf.ensure_shape(tensor, [None] * len(known))
    with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(tensor), running, rule)]):
        return tf.identity(tensor)


def lstm(
    inputs: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    weights: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
    mask: tf.Tensor | None,
    mode: Mode,
    index: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """An LSTM over whole sequences, differentiable once in inputs, states and weights.

    Args:
        inputs: [batch, time, inputs], at least one step; or rows [words, inputs], for `index`.
        h: [batch, units].
        c: [batch, units].
        weights: the kernel [inputs, 4 * units], its gates in Keras's order: input, forget,
            candidate, output; the recurrent kernel [units, 4 * units]; the bias [4 * units], or
            that of each row [batch, 4 * units].
        mask: Boolean [batch, time]; a False step leaves h and c as they are. None: all are True.
        mode: how it runs.
        index: int32 [batch, time], each step's row of `inputs`; for the compiled loops in float32.

    Returns:
        h after every step [batch, time, units] (or the last alone, [batch, 1, units]), and the
        final h and c, each [batch, units].
    """
    width, units = weights[0].shape[0], weights[1].shape[0]
    fits = inputs.dtype in (tf.float32, tf.bfloat16) and units % native.UNITS_MULTIPLE == 0
    compiled = native.operations(mode.training, inputs.dtype) if fits else None
    if compiled:
        run = _compiled(compiled, mask, mode, index)
    else:
        run = _in_tensorflow(mask, (width, units), mode)
    outputs, final_h, final_c = run(inputs, h, c, *weights)
    batch, steps = (inputs if index is None else index).shape[:2]
    outputs.set_shape([batch, steps if mode.return_sequences else 1, units])
    final_h.set_shape([batch, units])
    final_c.set_shape([batch, units])
    return outputs, final_h, final_c


def _warn_of_second_run(mode: Mode) -> None:
    if not mode.training:
        warnings.warn(
            "a gradient goes through a WarmLSTM that was called without training=True, in a "
            "tf.function inside of the tape: it runs the forward pass again; pass training=True, "
            "or take the gradient inside of the function",
            stacklevel=2,
        )


class _CompiledLoops(NamedTuple):
    """The forward and the backward pass by the loops of trainer/native."""

    operations: ModuleType
    mask: tf.Tensor  # [batch, time], or empty
    index: tf.Tensor  # [batch, time], rows of the inputs, or empty
    mode: Mode

    def forward(self, tensors: tuple[tf.Tensor, ...], keep: bool) -> Any:
        """Returns outputs, final h and c, and, where they are kept, gates and cells."""
        inputs, h, c, kernel, recurrent, bias = tensors
        of_all = of_rows = tf.zeros([0])  # biases
        if self.mode.row_biases:
            of_rows = _whole(bias)
        elif inputs.dtype == tf.float32:
            of_all = bias
        else:  # with a bias, oneDNN takes three times as long for a product in half precision
            of_rows = tf.repeat(_whole(bias)[tf.newaxis], tf.shape(h)[0], 0)
        found = self.operations.warmstate_lstm(
            self._of_inputs(inputs, kernel, of_all),
            self.index,
            _whole(recurrent),
            _whole(h),
            _whole(c),
            self.mask,
            of_rows,
            keep=keep,
            return_sequences=self.mode.return_sequences,
        )
        return found

    def _of_inputs(self, inputs: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        if self._by_index:
            return self._product(inputs[tf.newaxis], kernel, bias, tf.zeros([0], tf.bool))[0]
        if inputs.dtype == tf.float32:
            return self._product(inputs, kernel, bias, self.mask)
        z = tf.matmul(_flat(inputs), kernel)
        return tf.reshape(z, [*tf.unstack(tf.shape(inputs))[:2], z.shape[1]])

    def backward(
        self, upstream: tuple[tf.Tensor, ...], tensors: tuple[tf.Tensor, ...], kept: Any
    ) -> tuple[tf.Tensor | None, ...]:
        """Returns the gradients of `tensors`; each is computed only if it is asked for."""
        inputs, _h, c, _kernel, recurrent, _ = tensors
        d_outputs, (dh, dc) = upstream[0], map(_whole, upstream[1:])
        if not self.mode.return_sequences:
            dh, d_outputs = dh + _whole(d_outputs[:, 0]), tf.zeros([0], inputs.dtype)
        dz, dh, dc, of_rows = self.operations.warmstate_lstm_grad(
            kept.gates,
            _whole(recurrent),
            _whole(c),
            kept.cells,
            self.mask,
            d_outputs,
            dh,
            dc,
            clip_norm=self.mode.clip_norm,
        )
        of_dz = self._of_dz if inputs.dtype == tf.float32 else self._of_dz_in_half
        d_bias = of_rows if self.mode.row_biases else tf.reduce_sum(of_rows, 0)
        d_inputs, d_kernel, d_recurrent = of_dz(dz, tensors, kept.outputs)
        dh, dc, d_bias = (tf.cast(t, inputs.dtype) for t in (dh, dc, d_bias))
        return d_inputs, dh, dc, d_kernel, d_recurrent, d_bias

    def _of_dz_in_half(
        self, dz: tf.Tensor, tensors: tuple[tf.Tensor, ...], outputs: tf.Tensor
    ) -> tuple[tf.Tensor | None, ...]:
        """Returns the gradients of inputs and matrices in half precision."""
        inputs, h, _, kernel, _, _ = tensors
        d_inputs = d_kernel = d_recurrent = None
        flat = _flat(dz)
        if self.mode.of_inputs:
            d_inputs = tf.reshape(tf.matmul(flat, kernel, transpose_b=True), tf.shape(inputs))
        if self.mode.of_matrices:
            before = _flat(tf.concat([h[:, tf.newaxis], outputs[:, :-1]], 1))
            d_kernel = tf.matmul(_flat(inputs), flat, transpose_a=True)
            d_recurrent = tf.matmul(before, flat, transpose_a=True)
        return d_inputs, d_kernel, d_recurrent

    def _of_dz(
        self, dz: tf.Tensor, tensors: tuple[tf.Tensor, ...], outputs: tf.Tensor
    ) -> tuple[tf.Tensor | None, ...]:
        """Returns the gradients of inputs and matrices in float32."""
        inputs, h, _, kernel, _, _ = tensors
        d_inputs = d_kernel = d_recurrent = None
        left = inputs  # of the kernel's gradient
        if self._by_index:
            of_words = tf.math.unsorted_segment_sum(dz, self.index, tf.shape(inputs)[0])
            d_inputs = tf.matmul(of_words, kernel, transpose_b=True)
            left = outputs[:, :, :0]
        elif self.mode.of_inputs:
            d_inputs = self._product(dz, kernel, tf.zeros([0]), self.mask, transpose=True)
        if self.mode.of_matrices:
            d_kernel, d_recurrent = self.operations.warmstate_lstm_weight_grad(
                left, outputs, h, dz, self.mask
            )
            if self._by_index:
                d_kernel = tf.matmul(inputs, of_words, transpose_a=True)
        return d_inputs, d_kernel, d_recurrent

    def _product(
        self,
        left: tf.Tensor,
        right: tf.Tensor,
        bias: tf.Tensor,
        mask: tf.Tensor,
        transpose: bool = False,
    ) -> tf.Tensor:
        return self.operations.warmstate_product(left, right, bias, mask, transpose=transpose)

    @property
    def _by_index(self) -> bool:
        return self.index.shape.rank == 2


def _of_bias(dz: tf.Tensor, mode: Mode) -> tf.Tensor:
    of_rows = tf.reduce_sum(dz, 1)  # time and batch in turn: three times as fast
    return of_rows if mode.row_biases else tf.reduce_sum(of_rows, 0)


def _whole(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float32)


def _flat(tensor: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tensor, [-1, tensor.shape[-1]])  # [batch * time, ...]


def _compiled(
    operations: ModuleType, mask: tf.Tensor | None, mode: Mode, index: tf.Tensor | None
) -> Callable[..., Any]:
    """Returns the layer as a function of its tensors, by the loops of trainer/native."""
    mask = tf.zeros([0], tf.bool) if mask is None else mask
    index = tf.zeros([0], tf.int32) if index is None else index
    loops = _CompiledLoops(operations, mask, index, mode)

    @tf.custom_gradient
    def run(*tensors: tf.Tensor) -> Any:
        with tf.name_scope("lstm_forward"):
            found = loops.forward(tensors, mode.keep_activations)
            shown = found.outputs if mode.return_sequences else found.final_h[:, tf.newaxis]
            dtype = tensors[0].dtype
            results = tuple(tf.cast(t, dtype) for t in (shown, found.final_h, found.final_c))

        def gradient(*upstream: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
            with tf.name_scope("lstm_backward"):
                kept = found
                if not mode.keep_activations:
                    _warn_of_second_run(mode)
                    kept = loops.forward(_not_before(upstream, tensors), keep=True)
                return loops.backward(upstream, tensors, kept)

        return results, gradient

    return run


def _not_before(
    upstream: tuple[tf.Tensor, ...], tensors: tuple[tf.Tensor, ...]
) -> tuple[tf.Tensor, ...]:
    """Returns `tensors` as they are, for a second run of the forward loop.

    It then neither runs with the first one, nor is taken for the same: its activations would be
    held all the while.
    """
    with tf.control_dependencies(upstream):
        return tuple(tf.identity(tensor) for tensor in tensors)


def _in_tensorflow(
    mask: tf.Tensor | None, sizes: tuple[int, int], mode: Mode
) -> Callable[..., Any]:
    """Returns the layer as a function of its tensors, by this module's loops."""
    _, units = sizes

    @tf.custom_gradient
    def run(*tensors: tf.Tensor) -> Any:
        results, saved = _forward(tensors, mask, units, mode)

        def gradient(*upstream: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
            kept = saved
            if kept is None:
                _warn_of_second_run(mode)
                again = mode._replace(return_sequences=False, keep_activations=True)
                _, kept = _forward(_not_before(upstream, tensors), mask, units, again)
            dz, dh, dc = _backward(upstream, tensors[4], mask, kept, units, mode)
            of_inputs, *of_weights = _of_dz(dz, tensors[3], kept.columns, sizes, mode)
            return of_inputs, dh, dc, *of_weights

        return results, gradient

    return run


def _always_in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a loop when it is called eagerly; inside a `tf.function` it needs no second one."""
    compiled = tf.function(function, reduce_retracing=True, autograph=False)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with tf.name_scope(f"lstm{function.__name__}"):  # for a profile
            return compiled(*args) if tf.executing_eagerly() else function(*args)

    return call


@_always_in_graph
def _forward(
    tensors: tuple[tf.Tensor, ...], mask: tf.Tensor | None, units: int, mode: Mode
) -> tuple[tuple[tf.Tensor, tf.Tensor, tf.Tensor], _Saved | None]:
    # Sizes come as integers: the shapes of tensors may be unknown in a function compiled once.
    inputs, h, c, kernel, recurrent, bias = tensors
    keep = mode.keep_activations
    steps = tf.shape(inputs)[1]
    of_rows = tf.transpose(bias) if mode.row_biases else None
    bias = tf.zeros_like(kernel[0]) if mode.row_biases else bias
    weights, columns = _products(inputs, kernel, recurrent, bias, mask, units)
    dtype, loop_dtype = inputs.dtype, _loop_dtype(inputs.dtype)
    masked = None if mask is None else columns[:, -1:, :]  # [time, 1, batch]

    def array(dtype: tf.DType) -> tf.TensorArray:
        return tf.TensorArray(dtype, steps, clear_after_read=False)

    # `saved` and `hs` are empty tuples where nothing is to be kept.
    saved = (array(dtype), *(array(loop_dtype) for _ in _Saved._fields[1:])) if keep else ()
    hs = (array(dtype),) if mode.return_sequences else ()

    def step(
        t: tf.Tensor, h: tf.Tensor, c: tf.Tensor, saved: tuple[Any, ...], hs: Any
    ) -> tuple[Any, ...]:
        product = tf.concat([columns[t], tf.cast(h, dtype)], 0)
        z = tf.cast(tf.matmul(weights, product), loop_dtype)  # [4 * units, batch]
        if of_rows is not None:
            z += tf.cast(of_rows, loop_dtype)
        input_forget = tf.sigmoid(z[: 2 * units])
        candidate = tf.tanh(z[2 * units : 3 * units])
        output = tf.sigmoid(z[3 * units :])
        new_c = input_forget[units:] * c + input_forget[:units] * candidate
        squashed = tf.tanh(new_c)
        new_h = output * squashed
        if masked is not None:
            new_h += tf.cast(masked[t], loop_dtype) * h  # there the output gate is 0
        values = (product, input_forget, candidate, output, c, squashed)
        saved = tuple(a.write(t, v) for a, v in zip(saved, values, strict=False))
        hs = tuple(a.write(t, tf.cast(new_h, dtype)) for a in hs)
        return t + 1, new_h, new_c, saved, hs

    _, h, c, saved, hs = tf.while_loop(
        lambda t, *_: t < steps,
        step,
        (0, *(tf.cast(tf.transpose(state), loop_dtype) for state in (h, c)), saved, hs),
        shape_invariants=_invariants(units, (saved, hs)),
        parallel_iterations=1,
    )
    h, c = (tf.cast(tf.transpose(state), dtype) for state in (h, c))
    outputs = tf.transpose(hs[0].stack(), (2, 0, 1)) if hs else h[:, tf.newaxis]
    return (outputs, h, c), _Saved(*(a.flow for a in saved)) if keep else None


def _loop_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the type of states and gates inside the loops, for inputs of `dtype`."""
    return tf.float32 if dtype.size < 4 else dtype


def _invariants(units: int, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    # The static batch may be known of one operand and not of another; inside a loop it is unknown.
    state = tf.TensorShape([units, None])
    shapes = tf.nest.map_structure(lambda _: tf.TensorShape(None), arrays)
    return (tf.TensorShape([]), state, state, *shapes)


def _products(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    recurrent: tf.Tensor,
    bias: tf.Tensor,
    mask: tf.Tensor | None,
    units: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a step's factors: weights [4 * units, rows + units], columns [time, rows, batch].

    The rows are the inputs, a one for the bias, and, with a mask, a one where the step is masked.
    The last one's weights shut the input and output gates and open the forget gate, all exactly: c
    passes unchanged, h comes out as 0, and every gradient through the gates is 0.
    """
    columns = tf.transpose(inputs, (1, 2, 0))  # [time, inputs, batch]
    rows = [kernel, bias[tf.newaxis]]
    blocks = [columns, tf.ones_like(columns[:, :1])]
    if mask is not None:
        signs = tf.repeat(tf.constant([-1, 1, 0, -1], inputs.dtype), units)
        rows.append(_SATURATING * signs[tf.newaxis])
        masked = tf.cast(tf.logical_not(tf.transpose(mask)), inputs.dtype)
        blocks.append(masked[:, tf.newaxis])
    weights = tf.transpose(tf.concat([*rows, recurrent], 0))
    return weights, tf.concat(blocks, 1)


@_always_in_graph
def _backward(
    upstream: tuple[tf.Tensor, ...],
    recurrent: tf.Tensor,
    mask: tf.Tensor | None,
    saved: _Saved,
    units: int,
    mode: Mode,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the gradients of the gates [time, batch, 4 * units], and of the first h and c."""
    d_outputs, dh, dc = upstream
    kept_sizes = (2 * units, units, units, units, units)
    steps = tf.raw_ops.TensorListLength(input_handle=saved.columns)
    dtype, loop_dtype = dh.dtype, _loop_dtype(dh.dtype)
    d_outputs = tf.transpose(d_outputs, (1, 2, 0))  # [time or 1, units, batch]
    dh, dc = (tf.cast(tf.transpose(state), loop_dtype) for state in (dh, dc))
    if not mode.return_sequences:
        dh += tf.cast(d_outputs[0], loop_dtype)
    masked = None if mask is None else tf.cast(~tf.transpose(mask), loop_dtype)[:, tf.newaxis]

    def step(t: tf.Tensor, dh: tf.Tensor, dc: tf.Tensor, dzs: tf.TensorArray) -> tuple[Any, ...]:
        if mode.return_sequences:
            dh += tf.cast(d_outputs[t], loop_dtype)
        input_forget, candidate, output, previous_c, squashed = (
            tf.raw_ops.TensorListGetItem(
                input_handle=values, index=t, element_shape=(size, -1), element_dtype=loop_dtype
            )
            for values, size in zip(saved[1:], kept_sizes, strict=True)
        )
        i, f = input_forget[:units], input_forget[units:]
        dc += tf.raw_ops.TanhGrad(y=squashed, dy=dh * output)
        dz = tf.concat(
            [
                tf.raw_ops.SigmoidGrad(y=i, dy=dc * candidate),
                tf.raw_ops.SigmoidGrad(y=f, dy=dc * previous_c),
                tf.raw_ops.TanhGrad(y=candidate, dy=dc * i),
                tf.raw_ops.SigmoidGrad(y=output, dy=dh * squashed),
            ],
            0,
        )  # [4 * units, batch]
        dz = tf.cast(dz, dtype)
        previous_dh = tf.cast(tf.matmul(recurrent, dz), loop_dtype)
        if mode.clip_norm:  # not by tf.clip_by_norm, which also rounds rows that are short enough
            squares = tf.reduce_sum(tf.square(previous_dh), 0)  # [batch]
            too_long = squares > mode.clip_norm**2
            factor = mode.clip_norm * tf.math.rsqrt(squares)
            previous_dh *= tf.where(too_long, factor, tf.ones_like(factor))
        if masked is not None:
            previous_dh += masked[t] * dh
        return t - 1, previous_dh, dc * f, dzs.write(t, dz)

    dzs = tf.TensorArray(dtype, steps)
    _, dh, dc, dzs = tf.while_loop(
        lambda t, *_: t >= 0,
        step,
        (steps - 1, dh, dc, dzs),
        shape_invariants=_invariants(units, (dzs,)),
        parallel_iterations=1,
    )
    dh, dc = (tf.cast(tf.transpose(state), dtype) for state in (dh, dc))
    return tf.transpose(dzs.stack(), (0, 2, 1)), dh, dc


@_always_in_graph
def _of_dz(
    dz: tf.Tensor, kernel: tf.Tensor, columns: tf.Tensor, sizes: tuple[int, int], mode: Mode
) -> tuple[tf.Tensor | None, ...]:
    """Returns the gradients of inputs, kernel, recurrent kernel and bias from those of the gates.

    Args:
        dz: [time, batch, 4 * units].
        kernel: [inputs, 4 * units].
        columns: those that the forward loop saved.
        sizes: inputs and units.
        mode: how the call runs.
    """
    width, units = sizes
    d_inputs = d_kernel = d_recurrent = d_bias = None
    if mode.of_inputs:
        d_inputs = tf.transpose(tf.tensordot(dz, kernel, [[2], [1]]), (1, 0, 2))
    if mode.of_matrices:
        columns = tf.raw_ops.TensorListStack(
            input_handle=columns, element_shape=(-1, -1), element_dtype=dz.dtype
        )
        left = tf.transpose(columns, (1, 0, 2))  # rows: of inputs, bias, mask, state
        left = tf.reshape(left, (tf.shape(left)[0], -1))
        d_weights = tf.matmul(left, tf.reshape(dz, (-1, 4 * units)))
        d_kernel, d_bias, d_recurrent = d_weights[:width], d_weights[width], d_weights[-units:]
    if mode.frozen or mode.row_biases or d_bias is None:
        by_row = tf.cast(tf.transpose(dz, (1, 0, 2)), _loop_dtype(dz.dtype))
        d_bias = tf.cast(_of_bias(by_row, mode), dz.dtype)
    return d_inputs, d_kernel, d_recurrent, d_bias
