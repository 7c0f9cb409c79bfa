"""cuDNN's path on the CPU: its operation is stood in for by one that unpacks cuDNN's parameters.

The stand-in knows the layout that cuDNN documents (gates in the order i, f, candidate, o; input
weights, recurrent weights, then two biases a gate; each matrix [units, inputs]), what its states
are, and that outputs after a row's length are zero. So what is held here is what we and Keras hand
over and take back; that cuDNN's kernels compute an LSTM is left to `make gpu-check`.
"""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.batches.dataset import _padding_rows
from trainer import native
from trainer.models.encoder import dropped_weights, token_mask
from trainer.models.lstm import WarmLSTM, Words

WIDTH, UNITS = 4, 5
BATCH, STEPS = 3, 6
LENGTHS = tf.constant([6, 1, 4])
MASK = tf.sequence_mask(LENGTHS, STEPS)


def unpacked(params: tf.Tensor, width: int, units: int) -> tuple[list[tf.Tensor], ...]:
    """Returns four input matrices, four recurrent ones and eight biases from cuDNN's parameters."""
    sizes = [width * units] * 4 + [units * units] * 4 + [units] * 8
    parts = tf.split(params, sizes)
    of_inputs = [tf.reshape(part, [units, width]) for part in parts[:4]]
    return of_inputs, [tf.reshape(part, [units, units]) for part in parts[4:8]], parts[8:]


def stand_in(
    input: tf.Tensor, input_h: tf.Tensor, input_c: tf.Tensor, params: tf.Tensor, **options: Any
) -> tuple[tf.Tensor, ...]:
    """Computes what CudnnRNNV3 does for one LSTM layer on rows [batch, time, width]."""
    assert options["rnn_mode"] == "lstm" and not options["time_major"]
    units, steps = input_h.shape[-1], input.shape[1]
    of_inputs, recurrent, biases = unpacked(params, input.shape[-1], units)
    h, c = input_h[:, 0], input_c[:, 0]
    outputs = []
    for t in range(steps):
        i, f, candidate, o = (
            tf.matmul(input[:, t], of_inputs[gate], transpose_b=True)
            + tf.matmul(h, recurrent[gate], transpose_b=True)
            + biases[gate]
            + biases[gate + 4]
            for gate in range(4)
        )
        new_c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(candidate)
        new_h = tf.sigmoid(o) * tf.tanh(new_c)
        inside = (t < options["sequence_lengths"])[:, None]
        h, c = tf.where(inside, new_h, h), tf.where(inside, new_c, c)
        outputs.append(tf.where(inside, new_h, tf.zeros_like(new_h)))
    return tf.stack(outputs, 1), h[:, None], c[:, None], tf.zeros([0]), tf.zeros([0])


@pytest.fixture
def on_a_gpu(as_if_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Lets layers take cuDNN's path; `calls` counts its operation's."""
    made = SimpleNamespace(calls=0)

    def counted(**arguments: Any) -> tuple[tf.Tensor, ...]:
        made.calls += 1
        return stand_in(**arguments)

    monkeypatch.setattr(tf.raw_ops, "CudnnRNNV3", counted)
    return made


def layer(**options: Any) -> WarmLSTM:
    made = WarmLSTM(UNITS, return_sequences=True, return_state=True, **options)
    made.build((BATCH, STEPS, WIDTH))
    random = np.random.default_rng(1)
    for variable in made.weights:
        variable.assign(random.normal(0, 0.5, variable.shape))
    return made


def values(*shapes: tuple[int, ...]) -> list[tf.Tensor]:
    random = np.random.default_rng(2)
    return [tf.constant(random.normal(size=shape), tf.float32) for shape in shapes]


def results(layer: WarmLSTM, given: bool = True, read: Callable[..., Any] | None = None) -> list:
    """Returns outputs inside the mask, states, and the gradients of all that has one."""
    inputs, h, c = values((BATCH, STEPS, WIDTH), (BATCH, UNITS), (BATCH, UNITS))
    sources = [inputs, h, c] if given else [inputs]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        state = [h, c] if given else None
        found = (read or layer)(inputs, mask=MASK, initial_state=state, training=True)
        shown = found[0][MASK[:, ::-1] if layer.go_backwards else MASK]
        kept = [shown, *found[1:]]
        loss = sum(tf.reduce_sum(tf.sin(3.0 * r) * k) for k, r in enumerate(kept, start=1))
    sources += [variable.value for variable in layer.trainable_variables]
    gradients = tape.gradient(loss, sources, unconnected_gradients="zero")
    return [tensor.numpy() for tensor in [*kept, *gradients]]


def assert_equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # A sum of numbers that cancel is as exact as they are large.
        atol = 1e-6 * max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=f"result {index}")


@pytest.mark.parametrize(
    "options",
    [{}, {"go_backwards": True}, {"initial_state": "learned"}, {"initial_state": "fixed"}],
    ids=str,
)
@pytest.mark.parametrize("given", [True, False], ids=["states", "own states"])
def test_cudnn_gets_the_layers_weights_and_states(
    request: pytest.FixtureRequest, options: dict[str, Any], given: bool
) -> None:
    expected = results(layer(**options), given)
    stood_in = request.getfixturevalue("on_a_gpu")
    assert_equal(results(layer(**options), given), expected)
    assert stood_in.calls == 1


@pytest.mark.parametrize("which", ["kernel", "all"])
def test_frozen_weights_have_no_gradient_and_pass_it_on(
    request: pytest.FixtureRequest, which: str
) -> None:
    def frozen() -> WarmLSTM:
        made = layer(initial_state="learned")
        cell = made.cell
        matrices = (cell.kernel, cell.recurrent_kernel)
        for variable in made.weights if which == "all" else matrices:
            variable.trainable = False
        return made

    expected = results(frozen())
    request.getfixturevalue("on_a_gpu")
    assert_equal(results(frozen()), expected)


def test_recompute_gives_the_same_and_words_are_gathered(
    request: pytest.FixtureRequest,
) -> None:
    expected = results(layer())
    stood_in = request.getfixturevalue("on_a_gpu")
    again = layer()
    again.recompute = True
    assert_equal(results(again), expected)

    def words(inputs: tf.Tensor, mask: tf.Tensor, initial_state: Any, training: bool) -> Any:
        flat = tf.reshape(inputs, [-1, WIDTH])
        index = tf.reshape(tf.range(BATCH * STEPS), [BATCH, STEPS])
        return again.read_words(Words(flat, index), mask, initial_state, training)

    assert_equal(results(again, read=words), expected)
    assert stood_in.calls == 2


def test_recurrent_weight_dropout_reaches_cudnn(request: pytest.FixtureRequest) -> None:
    def dropped() -> list[np.ndarray]:
        lstm = layer(initial_state="learned")
        whole = lstm.cell.recurrent_kernel
        with dropped_weights([SimpleNamespace(lstms=[lstm])], 0.5, tf.constant([1, 2])):
            found = results(lstm)
        assert lstm.cell.recurrent_kernel is whole
        return found

    whole, expected = results(layer(initial_state="learned")), dropped()
    assert not np.allclose(whole[0], expected[0], atol=1e-3)
    stood_in = request.getfixturevalue("on_a_gpu")
    assert_equal(dropped(), expected)
    assert stood_in.calls == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "relu"}, "activation='relu'"),
        ({"use_bias": False}, "use_bias=False"),
        ({"recurrent_dropout": 0.5}, "recurrent_dropout=0.5"),
    ],
    ids=str,
)
def test_what_cudnn_cannot_do_is_said(
    on_a_gpu: SimpleNamespace, options: dict[str, Any], said: str
) -> None:
    with pytest.warns(UserWarning, match=f"cuDNN has no {said}: a GPU runs it step by step"):
        layer(**options)(*values((BATCH, STEPS, WIDTH)), mask=MASK)
    assert on_a_gpu.calls == 0


def test_a_gpu_runs_none_of_the_loops_for_cpus(as_if_on_a_gpu: None) -> None:
    assert native.has_gpu() and native.hint() == ""
    assert native.operations(training=True) is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_masks_are_what_cudnn_can_read(lengths: list[int], empty: int, multiple: int) -> None:
    """Every batch, padding rows included, has right-padded masks and no row without a token."""
    rnn = importlib.import_module("keras.src.backend.tensorflow.rnn")
    time = -(-max(lengths) // multiple) * multiple
    filler = _padding_rows(empty, time, np.zeros(1, np.int32))["lengths"]
    mask = token_mask(tf.zeros([len(lengths) + empty, time]), tf.concat([lengths, filler], 0))
    assert rnn._is_sequence_right_padded(mask)
    assert not rnn._has_fully_masked_sequence(mask)
