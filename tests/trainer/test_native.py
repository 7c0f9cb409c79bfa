"""The compiled loops give what Keras's LSTM gives, and a row does not depend on the others."""

import collections
import functools
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_callbacks

from data_pipelines.errors import InputError
from tests.trainer.rounding import OF_HALF_PRECISION_LSTM, bound
from trainer import native
from trainer.models import native_speed
from trainer.models.lstm import WarmLSTM, Words
from trainer.native.build import INSTRUCTION_SETS, build

COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")
SETS = list(INSTRUCTION_SETS)


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The compiled loops, built for this module alone unless this checkout has them.

    A process can load them from one file only.
    """
    path = native.library_path()
    if not path.exists():
        path = tmp_path_factory.mktemp("native") / "lstm.so"
        build(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library_path", lambda: path)
        yield path


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of the build that this processor has, in use."""
    if request.param not in native.instruction_sets():
        pytest.skip("this processor does not have it")
    with native.using(request.param):
        yield request.param


@pytest.fixture
def operations() -> Iterator[Any]:
    """The operations, of the best set that this processor has."""
    with native.using(native.best_instruction_set()):
        yield native.operations(training=True)


NO_MASK, NO_INDEX, NO_NUMBERS = tf.zeros([0], tf.bool), tf.zeros([0], tf.int32), tf.zeros([0])


def forward(operations: Any, z: Any, recurrent: Any, h: Any, c: Any, **given: Any) -> Any:
    """Returns what the forward loop gives, with everything that it can keep."""
    mask = given.pop("mask", NO_MASK)
    bias = given.pop("bias", NO_NUMBERS)
    z = tf.cast(z, given.pop("factors", tf.float32))
    options = {"keep": True, "return_sequences": True} | given
    return operations.warmstate_lstm(z, NO_INDEX, recurrent, h, c, mask, bias, **options)


# Right-padded with an empty row; and what a mask may be too.
MASKS = {
    "none": None,
    "padded": np.arange(9)[None] < np.array([9, 7, 0, 1, 8, 3, 9])[:, None],
    "any": np.random.default_rng(3).random((7, 9)) < 0.6,
}


def program(
    layer: Any, inputs: tf.Tensor, states: list, mask: Any, weights: list
) -> Callable[[], list[np.ndarray]]:
    """Returns a function of the layer's outputs and the gradients of all that it depends on.

    It is traced at its first call. Its graph suits all instruction sets: the one in use counts.
    """
    layer.build(inputs.shape)
    layer.set_weights(weights)

    @tf.function
    def run(inputs: tf.Tensor, *states: tf.Tensor) -> list:
        with tf.GradientTape() as tape:
            tape.watch([inputs, *states])
            outputs = layer(inputs, initial_state=list(states), mask=mask, training=True)
            loss = sum(tf.reduce_sum(tf.sin(tensor * (i + 1))) for i, tensor in enumerate(outputs))
        variables = [v.value for v in layer.trainable_variables]
        return [*outputs, *tape.gradient(loss, [inputs, *states, *variables])]

    return lambda: [tensor.numpy() for tensor in run(inputs, *states)]


def problem(units: int) -> tuple[tf.Tensor, list[tf.Tensor], list[np.ndarray]]:
    """Returns inputs [7, 9, 5], the states to start from, and weights for both layers."""
    random = np.random.default_rng(units)
    inputs = tf.constant(random.normal(size=(7, 9, 5)), tf.float32)
    states = [tf.constant(random.normal(size=(7, units)), tf.float32) for _ in range(2)]
    weights = [  # not so large that rounding grows from step to step
        random.normal(0, units**-0.5, shape).astype(np.float32)
        for shape in ((5, 4 * units), (units, 4 * units), (4 * units,))
    ]
    return inputs, states, weights


def mask_of(name: str) -> tf.Tensor | None:
    return None if MASKS[name] is None else tf.constant(MASKS[name])


@functools.cache
def program_of(
    kind: type, units: int, mask: str, return_sequences: bool, dtype: str = "float32"
) -> Callable[[], list[np.ndarray]]:
    inputs, states, weights = problem(units)
    layer = kind(units, return_sequences=return_sequences, return_state=True, dtype=dtype)
    return program(layer, inputs, states, mask_of(mask), weights)


@functools.cache
def of_keras(units: int, mask: str, return_sequences: bool) -> list[np.ndarray]:
    return program_of(keras.layers.LSTM, units, mask, return_sequences)()


@pytest.mark.parametrize("units", [16, 48, 80])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("return_sequences", [False, True])
def test_as_keras(units: int, mask: str, return_sequences: bool, instruction_set: str) -> None:
    ours = program_of(WarmLSTM, units, mask, return_sequences)()
    for found, expected in zip(ours, of_keras(units, mask, return_sequences), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-6 * max(1, np.abs(expected).max()))


@pytest.mark.bfloat16
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("return_sequences", [False, True])
def test_half_precision_is_near_float32(
    mask: str, return_sequences: bool, instruction_set: str
) -> None:
    half, whole = (
        program_of(WarmLSTM, 48, mask, return_sequences, precision)()
        for precision in ("mixed_bfloat16", "float32")
    )
    for found, expected in zip(half, whole, strict=True):
        error = np.linalg.norm(found.astype(np.float32) - expected) / np.linalg.norm(expected)
        assert error < bound(tf.bfloat16, OF_HALF_PRECISION_LSTM)
    layer = WarmLSTM(48, dtype="mixed_bfloat16")
    run = tf.function(lambda x: layer(x, training=True))
    graph = run.get_concrete_function(tf.TensorSpec((7, 9, 5))).graph
    (operation,) = (op for op in graph.get_operations() if op.type == "WarmstateLstm")
    assert operation.get_attr("factors") == tf.bfloat16


def half(array: Any) -> np.ndarray:
    return tf.cast(tf.cast(array, tf.bfloat16), tf.float32).numpy()


def clipping(clip_norm: float, mask: str) -> Callable[[], list[np.ndarray]]:
    inputs, states, weights = problem(48)
    weights[1] *= 5  # gradients grow from step to step
    layer = WarmLSTM(48, return_sequences=True, return_state=True)
    layer.clip_norm = clip_norm
    return program(layer, inputs, states, mask_of(mask), weights)


compiled_clipping = functools.cache(clipping)


@functools.cache
def clipped_by_tensorflow(clip_norm: float, mask: str) -> list[np.ndarray]:
    with native.using(None):
        return clipping(clip_norm, mask)()


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 1e9])
@pytest.mark.parametrize("mask", ["none", "any"])
def test_steps_clip_as_tensorflows_loops_do(
    mask: str, clip_norm: float, instruction_set: str
) -> None:
    found = compiled_clipping(clip_norm, mask)()
    for ours, theirs in zip(found, clipped_by_tensorflow(clip_norm, mask), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("units", [16, 32, 48])
@pytest.mark.parametrize("rows", [1, 5, 75])
def test_only_factors_and_what_goes_in_and_comes_out_at_each_step_are_rounded(
    rows: int, units: int, instruction_set: str
) -> None:
    """From numbers that bfloat16 holds exactly, both kinds of product give the same."""
    operations = native.operations(training=True)
    random = np.random.default_rng(4)
    z = half(random.normal(size=(rows, 1, 4 * units)))
    recurrent = half(random.normal(0, 0.3, (units, 4 * units)))
    h, c = half(random.normal(size=(rows, units))), tf.constant(random.normal(size=(rows, units)))
    c = tf.cast(c, tf.float32)
    rounded, whole = (
        forward(operations, z, recurrent, h, c, factors=factors)
        for factors in (tf.bfloat16, tf.float32)
    )
    for found, expected in zip(rounded[1:], whole[1:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(half(rounded.outputs[:, 0]), half(rounded.final_h))
    zeros = tf.zeros_like(c)
    rounded, whole = (
        operations.warmstate_lstm_grad(
            whole.gates,
            recurrent,
            c,
            whole.cells,
            NO_MASK,
            tf.cast(h, factors)[:, None],
            zeros,
            zeros,
        )
        for factors in (tf.bfloat16, tf.float32)
    )
    np.testing.assert_array_equal(rounded.d_bias, whole.d_bias)
    np.testing.assert_array_equal(whole.d_z[:, 0], whole.d_bias)
    np.testing.assert_array_equal(half(rounded.d_z), half(whole.d_z))
    for wrong in (np.nan, -np.nan, np.inf):
        h = np.full_like(h, wrong)
        broken = forward(operations, z, recurrent, h, c, factors=tf.bfloat16)
        assert np.isnan(half(broken.outputs)).any(), wrong


def test_it_is_what_training_runs_and_inference_where_asked(
    instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = WarmLSTM(16)
    layer.build((2, 3, 4))

    def run(x: tf.Tensor, training: bool) -> tf.Tensor:
        return layer(x, training=training)

    def types(training: bool) -> set[str]:
        function = tf.function(run).get_concrete_function(tf.TensorSpec((2, 3, 4)), training)
        return {operation.type for operation in function.graph.get_operations()}

    assert "WarmstateLstm" in types(True) and "WarmstateLstm" not in types(False)
    monkeypatch.setattr(native, "_in_inference", False)
    native.use_in_inference()
    assert "WarmstateLstm" in types(False)
    with native.using(None):
        assert "WarmstateLstm" not in types(True)


@pytest.mark.parametrize("mask", MASKS)
def test_words_that_repeat_are_read_as_all_others(
    mask: str, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(1)
    layer = WarmLSTM(48, return_sequences=True, return_state=True)
    layer.build((None, 9, 5))
    rows = tf.constant(random.normal(size=(4, 5)), tf.float32)
    words = Words(rows, tf.constant(random.integers(0, 4, (7, 9)), tf.int32))
    state = [tf.constant(random.normal(size=(7, 48)), tf.float32) for _ in range(2)]
    given = mask_of(mask)
    in_tensorflow = layer.read_words(words, given, state)
    monkeypatch.setattr(native, "_in_inference", True)
    graph = tf.function(lambda: layer.read_words(words, given, state)).get_concrete_function().graph
    assert "WarmstateLstm" in {operation.type for operation in graph.get_operations()}
    for found, expected in zip(layer.read_words(words, given, state), in_tensorflow, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def layer_of_words(
    random: np.random.Generator,
) -> tuple[WarmLSTM, tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """Returns a layer, and what it reads: rows [4, 5], their index [7, 9] and h and c [7, 48]."""
    layer = WarmLSTM(48, return_sequences=True, return_state=True)
    layer.build((None, 9, 5))
    rows = tf.constant(random.normal(size=(4, 5)), tf.float32)
    index = tf.constant(random.integers(0, 4, (7, 9)), tf.int32)
    state = [tf.constant(random.normal(size=(7, 48)), tf.float32) for _ in range(2)]
    return layer, rows, index, state


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_through_words_are_those_through_their_rows(
    mask: str, instruction_set: str
) -> None:
    random = np.random.default_rng(1)
    layer, rows, index, state = layer_of_words(random)
    sources = [rows, *state, *(variable.value for variable in layer.trainable_variables)]

    def gradients(by_word: bool) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(sources)
            words, given = Words(rows, index), mask_of(mask)
            if by_word:
                found = layer.read_words(words, given, state, training=True)
            else:
                inputs = tf.gather(rows, index)
                found = layer(inputs, mask=given, initial_state=state, training=True)
            loss = sum(tf.reduce_sum(tf.sin(tensor * (i + 1))) for i, tensor in enumerate(found))
        return tape.gradient(loss, sources)

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        expected = tf.convert_to_tensor(expected)
        np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


def test_a_word_that_is_not_there_is_refused(operations: Any) -> None:
    zeros = tf.zeros((1, 16))
    for wrong in (-1, 2):
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"there is no word {wrong}"):
            operations.warmstate_lstm(
                tf.zeros((2, 64)),
                tf.constant([[0, wrong]]),
                tf.zeros((16, 64)),
                zeros,
                zeros,
                NO_MASK,
                NO_NUMBERS,
                keep=False,
                return_sequences=False,
            )


@pytest.mark.parametrize("factors", [tf.float32, tf.bfloat16])
def test_what_is_not_asked_for_is_not_kept(factors: tf.DType, operations: Any) -> None:
    random = np.random.default_rng(2)
    z = tf.constant(random.normal(size=(5, 6, 64)), tf.float32)
    recurrent = tf.constant(random.normal(0, 0.3, (16, 64)), tf.float32)
    h, mask = tf.ones((5, 16)), tf.constant(MASKS["any"][:5, :6])
    every, sequences, last = (
        forward(operations, z, recurrent, h, h, mask=mask, factors=factors, **options)
        for options in (
            {},
            {"keep": False},
            {"keep": False, "return_sequences": False},
        )
    )
    np.testing.assert_array_equal(every.outputs, sequences.outputs)
    np.testing.assert_array_equal(every.outputs[:, -1], tf.cast(every.final_h, factors))
    np.testing.assert_array_equal(every.cells[:, -1], every.final_c)
    for less in (sequences, last):
        assert less.gates.shape == (5, 0, 64) and less.cells.shape == (5, 0, 16)
        np.testing.assert_array_equal(every.final_h, less.final_h)
        np.testing.assert_array_equal(every.final_c, less.final_c)
    assert last.outputs.shape == (5, 0, 16)


@pytest.mark.parametrize("factors", [tf.float32, tf.bfloat16])
def test_a_row_alone_has_the_same_bits(factors: tf.DType, instruction_set: str) -> None:
    """Whatever the number of rows: 6 or 32 are multiplied at a time, and they go in threads."""
    operations = native.operations(training=True)
    random = np.random.default_rng(0)
    x, kernel = (
        random.normal(size=(75, 20, 7)),
        tf.constant(random.normal(size=(7, 128)), tf.float32),
    )
    recurrent = tf.constant(random.normal(0, 0.3, (32, 128)), tf.float32)

    def all_of(x: np.ndarray) -> list[np.ndarray]:
        zeros = tf.zeros((len(x), 32))
        inputs = tf.constant(x, tf.float32)
        z = operations.warmstate_product(inputs, kernel, NO_NUMBERS, NO_MASK, transpose=False)
        found = forward(operations, z, recurrent, zeros, zeros, factors=factors)
        gradients = operations.warmstate_lstm_grad(
            found.gates,
            recurrent,
            zeros,
            found.cells,
            NO_MASK,
            found.outputs,
            zeros,
            zeros,
        )
        d_z = tf.cast(gradients.d_z, tf.float32)
        d_x = operations.warmstate_product(d_z, kernel, NO_NUMBERS, NO_MASK, transpose=True)
        return [tensor.numpy() for tensor in (z, *found, *gradients, d_x)]

    together = all_of(x)
    for rows in (slice(0, 1), slice(3, 5), slice(9, 12), slice(2, 13), slice(5, 45)):
        for part, whole in zip(all_of(x[rows]), together, strict=True):
            assert part.tobytes() == whole[rows].tobytes()


def test_packed_matrices_give_the_same_bits_and_belong_to_one_instruction_set(
    instruction_set: str,
) -> None:
    operations = native.operations(training=True)
    random = np.random.default_rng(0)
    x = tf.constant(random.normal(size=(2, 5, 7)), tf.float32)
    kernel = tf.constant(random.normal(size=(7, 64)), tf.float32)
    recurrent = tf.constant(random.normal(0, 0.3, (16, 64)), tf.float32)
    bias, zeros = tf.zeros(64), tf.zeros((2, 16))
    packed = (
        operations.warmstate_pack(kernel, of_gates=False),
        operations.warmstate_pack(recurrent, of_gates=True),
    )

    def read(kernel: tf.Tensor, recurrent: tf.Tensor) -> tf.Tensor:
        z = operations.warmstate_product(x, kernel, bias, NO_MASK, transpose=False)
        return forward(operations, z, recurrent, zeros, zeros).outputs

    np.testing.assert_array_equal(read(*packed), read(kernel, recurrent))
    with pytest.raises(tf.errors.InvalidArgumentError, match="right was packed for other sizes"):
        read(packed[1], recurrent)
    with pytest.raises(tf.errors.InvalidArgumentError, match="recurrent was packed"):
        forward(operations, x[:, :, :1] * bias, packed[1], zeros, zeros, factors=tf.bfloat16)
    for other in set(native.instruction_sets()) - {instruction_set}:
        with (
            native.using(other),
            pytest.raises(tf.errors.InvalidArgumentError, match="another instruction set"),
        ):
            read(kernel, packed[1])


@pytest.mark.parametrize("by_word", [False, True])
def test_a_row_with_a_bias_has_the_bits_of_a_layer_with_that_bias(
    by_word: bool, instruction_set: str
) -> None:
    random = np.random.default_rng(1)
    layer, rows, index, state = layer_of_words(random)
    biases = tf.Variable(random.normal(size=(7, 192)), dtype=tf.float32)
    mask = mask_of("padded")

    def read(source: tf.Variable) -> tuple[list[tf.Tensor], tf.Tensor]:
        with tf.GradientTape() as tape:
            layer.row_bias = source.value() if source is biases else None
            if by_word:
                found = layer.read_words(Words(rows, index), mask, state, training=True)
            else:
                inputs = tf.gather(rows, index)
                found = layer(inputs, mask=mask, initial_state=state, training=True)
            loss = tf.reduce_sum(found[0][row] if source is not biases else found[0])
        return found, tape.gradient(loss, source)

    together, gradients = read(biases)
    assert gradients.shape == biases.shape
    for row in range(7):
        layer.cell.bias.assign(biases[row])
        alone, gradient = read(layer.cell.bias.value)
        for one, all_ in zip(alone, together, strict=True):
            assert one[row].numpy().tobytes() == all_[row].numpy().tobytes()
        np.testing.assert_allclose(gradients[row], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("return_sequences", [False, True])
def test_what_is_computed_again_has_the_same_bits(
    return_sequences: bool, instruction_set: str
) -> None:
    inputs, states, weights = problem(16)
    found = []
    for recompute in (False, True):
        layer = WarmLSTM(16, return_sequences=return_sequences, return_state=True)
        layer.recompute = recompute
        found.append(program(layer, inputs, states, mask_of("padded"), weights)())
    for kept, again in zip(*found, strict=True):
        assert kept.tobytes() == again.tobytes()


def test_a_batch_without_rows(instruction_set: str) -> None:
    layer = WarmLSTM(16, return_sequences=True)
    layer.build((None, 3, 4))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(tf.zeros((0, 3, 4)), training=True))
    for gradient in tape.gradient(loss, [v.value for v in layer.trainable_variables]):
        assert not np.any(gradient)


def test_what_is_not_a_number_is_seen(instruction_set: str) -> None:
    operations = native.operations(training=True)
    zeros = tf.zeros((1, 16))
    # Those of a processor, and one with other bits, as data may hold.
    odd = np.frombuffer(np.uint32(0x7FC00155).tobytes(), np.float32)[0]
    for gate in range(4):
        for wrong in (np.nan, -np.nan, odd):
            z = np.zeros((1, 2, 64), np.float32)
            z[0, 0, 16 * gate : 16 * gate + 16] = wrong
            found = forward(operations, tf.constant(z), tf.zeros((16, 64)), zeros, zeros)
            assert np.isnan(found.outputs[0, 0]).all(), (gate, wrong)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 30.0, 1e4])
def test_the_functions_of_the_gates_over_their_range(scale: float, instruction_set: str) -> None:
    operations = native.operations(training=True)
    z = (np.random.default_rng(0).normal(size=(1, 1, 4 * 1600)) * scale).astype(np.float32)
    zeros = tf.zeros((1, 1600))
    found = forward(operations, tf.constant(z), tf.zeros((1600, 6400)), zeros, zeros)
    i, f, g, o = np.split(found.gates.numpy()[0, 0], 4)
    z = np.split(z[0, 0].astype(np.float64), 4)
    with np.errstate(over="ignore"):
        for gate, of in ((i, z[0]), (f, z[1]), (o, z[3])):
            np.testing.assert_allclose(gate, 1 / (1 + np.exp(-of)), rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(g, np.tanh(z[2]), rtol=1e-6)


# ---- With and without ----


@pytest.fixture(params=["compiled", "TensorFlow's"])
def either(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both kinds of loops."""
    best = native.best_instruction_set()
    with native.using(best if request.param == "compiled" else None):
        yield


WRONG_STATES = [(1, 32), (32,), (4, 1), (2, 32), (4, 32, 1)]
WRONG_MASKS = [(1, 3), (4, 1), (3,), (4, 3, 1), (2, 3)]
WRONG_SHAPES = [(name, shape) for name in "hc" for shape in WRONG_STATES]
WRONG_SHAPES += [("mask", shape) for shape in WRONG_MASKS]


@pytest.mark.parametrize(("name", "shape"), WRONG_SHAPES, ids=str)
def test_operands_of_wrong_shape_are_refused(
    name: str, shape: tuple[int, ...], either: None
) -> None:
    layer = WarmLSTM(32, name="encoder", return_sequences=True)
    layer.build((4, 3, 5))
    given = {"h": tf.zeros((4, 32)), "c": tf.zeros((4, 32)), "mask": tf.ones((4, 3), tf.bool)}
    rule = "the mask has to be of shape (batch, time) = (4, 3)"
    if name != "mask":
        rule = f"the initial state {name} has to be of shape (batch, units) = (4, 32)"
    given[name] = tf.ones(shape, given[name].dtype)

    def call(x: tf.Tensor, h: tf.Tensor, c: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        return layer(x, initial_state=[h, c], mask=mask, training=True)

    with pytest.raises(ValueError, match=re.escape(f"encoder: {rule}; got {shape}")):
        call(tf.zeros((4, 3, 5)), **given)
    # In a graph that knows no sizes it is found when it runs.
    unknown = [tf.TensorSpec(None, tensor.dtype) for tensor in given.values()]
    run = tf.function(call, input_signature=[tf.TensorSpec((None, None, 5)), *unknown])
    with pytest.raises(tf.errors.InvalidArgumentError, match="encoder: the |is not compatible"):
        run(tf.zeros((4, 3, 5)), **given)


@pytest.mark.parametrize("sequences", [False, True])
def test_no_steps_are_refused(sequences: bool, either: None) -> None:
    layer = WarmLSTM(16, return_sequences=sequences)
    layer.build((None, None, 4))
    with pytest.raises(tf.errors.InvalidArgumentError, match="out of bounds"):
        layer(tf.zeros((2, 0, 4)), training=True)


def products_before(outputs: list[tf.Tensor]) -> collections.Counter[str]:
    """Returns how many products of each type these tensors of a graph depend on."""
    seen: set[str] = set()
    found: collections.Counter[str] = collections.Counter()

    def visit(graph: Any, operations: list[Any]) -> None:
        while operations:
            operation = operations.pop()
            if (key := f"{id(graph)} {operation.name}") in seen:
                continue
            seen.add(key)
            if operation.type in ("MatMul", "WarmstateProduct", "WarmstateLstmWeightGrad"):
                found[operation.type] += 1
            for name in ("body", "f"):  # of a loop, of a call
                if name in operation.node_def.attr and operation.node_def.attr[name].func.name:
                    inner = graph._get_function(operation.node_def.attr[name].func.name).graph
                    visit(inner, [output.op for output in inner.outputs])
            operations += [tensor.op for tensor in operation.inputs]
            operations += operation.control_inputs

    visit(outputs[0].graph, [output.op for output in outputs])
    return found


def gradient_of_inputs(layer: WarmLSTM, inputs: tf.Tensor) -> tf.Tensor:
    """Returns the gradient of the inputs; those of trainable weights are asked for too."""
    weights = [variable.value for variable in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(layer(inputs, training=True) ** 2)
    found = tape.gradient(loss, [inputs, *weights])
    assert all(gradient is not None for gradient in found)
    return found if weights else found[:1]


def test_a_frozen_layer_computes_no_gradients_of_weights(either: None) -> None:
    layer = WarmLSTM(16, return_sequences=True)
    layer.build((4, 3, 5))
    inputs = tf.random.stateless_normal((4, 3, 5), (0, 0))

    def products() -> collections.Counter[str]:
        function = tf.function(lambda x: gradient_of_inputs(layer, x))
        return products_before(function.get_concrete_function(inputs).outputs)

    trained, expected = products(), gradient_of_inputs(layer, inputs)[0]
    layer.trainable = False
    frozen, found = products(), gradient_of_inputs(layer, inputs)[0]
    np.testing.assert_array_equal(found, expected)
    # Of all weights in one.
    assert sum((trained - frozen).values()) == 1 and not frozen - trained, (trained, frozen)


def test_a_bias_alone_is_trained_without_the_products_of_the_other_weights(either: None) -> None:
    layer = WarmLSTM(16, return_sequences=True)
    layer.build((4, 3, 5))
    inputs, bias = tf.random.stateless_normal((4, 3, 5), (0, 0)), layer.cell.bias.value

    def gradient_of_bias(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        return tape.gradient(loss, bias)

    function = tf.function(gradient_of_bias)
    trained = products_before(function.get_concrete_function(inputs).outputs)
    expected = gradient_of_bias(inputs)
    for variable in (layer.cell.kernel, layer.cell.recurrent_kernel):
        variable.trainable = False
    function = tf.function(gradient_of_bias)
    alone = products_before(function.get_concrete_function(inputs).outputs)
    np.testing.assert_allclose(function(inputs), expected, rtol=1e-5, atol=1e-6)
    # The compiled loop sums the bias's gradient up as it goes.
    saved = 0 if "WarmstateProduct" in trained else 1
    assert sum((trained - alone).values()) == saved and not alone - trained, (trained, alone)


def test_a_frozen_layer_called_eagerly_computes_no_gradients_of_weights(operations: Any) -> None:
    layer = WarmLSTM(16, return_sequences=True)
    layer.build((4, 3, 5))
    inputs, seen = tf.random.stateless_normal((4, 3, 5), (0, 0)), collections.Counter[str]()

    def run(*more: tf.Tensor) -> list[tf.Tensor]:
        seen.clear()
        with tf.GradientTape() as tape:
            tape.watch(more)
            loss = tf.reduce_sum(layer(inputs, training=True) ** 2)
        return tape.gradient(loss, more or layer.trainable_variables)

    op_callbacks.add_op_callback(count := lambda name, *_, **__: seen.update([name]))
    try:
        assert np.any(run()[0])  # the inputs have no gradient
        assert (seen["WarmstateLstmWeightGrad"], seen["WarmstateProduct"]) == (1, 1)
        layer.trainable = False
        assert np.any(run(inputs)[0])
        assert (seen["WarmstateLstmWeightGrad"], seen["WarmstateProduct"]) == (0, 2)
        assert np.any(run(layer.cell.kernel.value)[0])
        assert (seen["WarmstateLstmWeightGrad"], seen["WarmstateProduct"]) == (1, 1)
    finally:
        op_callbacks.remove_op_callback(count)


def test_a_frozen_weight_that_a_tape_watches_has_its_gradient(either: None) -> None:
    layer = WarmLSTM(16)
    layer.build((4, 3, 5))
    layer.trainable = False
    inputs, kernel = tf.random.stateless_normal((4, 3, 5), (0, 0)), layer.cell.kernel.value
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        loss = tf.reduce_sum(layer(inputs, training=True))
    assert np.any(tape.gradient(loss, kernel))

    # Here nothing tells the function that a tape is around it.
    function = tf.function(lambda x: tf.reduce_sum(layer(x, training=True)))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        loss = function(inputs)
    assert np.any(tape.gradient(loss, kernel))


def test_a_tape_without_training_runs_what_training_does(
    either: None, recwarn: pytest.WarningsRecorder
) -> None:
    layer = WarmLSTM(16)
    layer.build((4, 3, 5))
    inputs = tf.random.stateless_normal((4, 3, 5), (0, 0))

    def gradients(x: tf.Tensor, training: bool) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=training) ** 2)
        return tape.gradient(loss, [v.value for v in layer.trainable_variables])

    def types(training: bool) -> collections.Counter[str]:
        function = tf.function(lambda x: gradients(x, training))
        operations = function.get_concrete_function(inputs).graph.get_operations()
        return collections.Counter(operation.type for operation in operations)

    assert types(False) == types(True)
    for found, expected in zip(gradients(inputs, False), gradients(inputs, True), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not recwarn.list


def test_a_tape_around_a_function_without_training_is_warned_of(either: None) -> None:
    layer = WarmLSTM(16)
    layer.build((4, 3, 5))
    inputs = tf.random.stateless_normal((4, 3, 5), (0, 0))
    weights = [variable.value for variable in layer.trainable_variables]
    found = []
    for training in (False, True):
        function = tf.function(lambda x, t=training: tf.reduce_sum(layer(x, training=t) ** 2))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            function(inputs)  # is traced without a tape
            with tf.GradientTape() as tape:
                loss = function(inputs)
            found.append(tape.gradient(loss, weights))
        messages = [str(warning.message) for warning in seen]
        assert ["pass training=True" in message for message in messages] == [True] * (not training)
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


# ---- Which loops are used ----


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of a build that is not there yet, and nothing decided."""
    found = native.instruction_sets()  # of the library that is there
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "lstm-1.so")
    for name in (native.CHOICE, "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "instruction_sets", lambda: found)
    native.choice.cache_clear()
    yield tmp_path
    native.choice.cache_clear()


def test_a_build_that_is_not_there_is_said(anew: Path) -> None:
    expected = "lstm: TensorFlow's loops; python -m trainer.native.build compiles faster ones"
    assert native.hint() == expected
    native.choice.cache_clear()
    (anew / "lstm-2.so").touch()
    assert "; the build is for another source or TensorFlow; python -m" in native.hint()


@pytest.mark.parametrize("whole", [0.52, 1.5])
@pytest.mark.parametrize("half", [0.7, 2.5])
def test_loops_that_lose_are_not_used(anew: Path, whole: float, half: float) -> None:
    best = native.best_instruction_set()
    (anew / "lstm-1.so").touch()
    native.measured_path().write_text('{"another processor": 3.0}')
    lost = f"TensorFlow's loops; the compiled ones ({best}) were measured"
    won = f"compiled loops ({best}), measured"
    expected = []
    than = " as TensorFlow's on this processor"
    for dtype, ratio, end in ((tf.float32, whole, than), (tf.bfloat16, half, "")):
        native._keep(native._key(best, dtype), ratio)
        if dtype == tf.bfloat16 and best not in native.HALF_SETS:
            continue
        said = won if ratio > 1 else lost
        expected.append(f"{said} {ratio:.2f} times as fast{end}")
        assert (native.choice(dtype).instruction_set is not None) == (ratio > 1)
    assert native.measured()["another processor"] == 3.0
    assert native.hint() == f"lstm: {'; in bfloat16 '.join(expected)}"


def test_without_instructions_for_bfloat16_the_choice_is_that_of_float32(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # with which TensorFlow must not try it
    (anew / "lstm-1.so").touch()
    native._keep(native._key("portable", tf.float32), 1.25)
    assert native.choice(tf.bfloat16) == native.choice(tf.float32)
    assert native.hint().startswith("lstm: compiled loops (portable), measured 1.25 times")


def test_what_a_variable_asks_for_is_used_unmeasured(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (anew / "lstm-1.so").touch()
    monkeypatch.setenv(native.CHOICE, SETS[0])
    assert native.hint() == f"lstm: compiled loops ({SETS[0]}), WARMSTATE_NATIVE={SETS[0]}"
    native.choice.cache_clear()
    monkeypatch.setenv(native.CHOICE, "0")
    assert native.hint() == "lstm: TensorFlow's loops; WARMSTATE_NATIVE=0"
    native.choice.cache_clear()
    monkeypatch.setenv(native.CHOICE, "avx3")
    with pytest.raises(InputError, match=r"WARMSTATE_NATIVE=avx3: this machine can have 0, \w+"):
        native.hint()


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        ("", "amx_bf16"),
        ("DEFAULT", "amx_bf16"),
        ("AVX512_CORE_AMX", "amx_bf16"),
        ("AVX512_CORE_AMX_FP16", "amx_bf16"),
        ("AVX10_1_512_AMX", "amx_bf16"),
        ("AVX10_1_512", "avx512_bf16"),
        ("AVX512_CORE_BF16", "avx512_bf16"),
        ("avx512_core_vnni", "avx512"),
        ("AVX2_VNNI_2", "avx2"),
        ("AVX2", "avx2"),
        ("AVX", "portable"),
        ("SSE41", "portable"),
    ],
)
def test_the_variable_of_onednn_holds_for_the_loops(
    most: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    sets = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    monkeypatch.setattr(native, "instruction_sets", lambda: sets)
    assert native.best_instruction_set() == expected
    # Which asks for no more than the processor has.
    monkeypatch.setattr(native, "instruction_sets", lambda: sets[:2])
    assert native.best_instruction_set() == min(expected, "avx2", key=sets.index)


def test_what_cannot_be_kept_is_measured_at_each_start(
    library: Path, anew: Path, monkeypatch: pytest.MonkeyPatch, forks: None
) -> None:
    if library.parent != native.FOLDER / "build":
        pytest.skip("this checkout has no build: make native")
    monkeypatch.setattr(native, "measured_path", lambda: anew / "no such folder" / "lstm-1.json")
    (anew / "lstm-1.so").touch()
    assert re.search(r"measured \d\.\d\d times as fast as TensorFlow's on this", native.hint())
    assert native.measured() == {}


def test_a_measurement_that_fails_is_said(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (anew / "lstm-1.so").touch()
    native.measured_path().write_text("{")
    monkeypatch.setattr(native, "MEASURE", "no.such.module")
    assert "lstm: TensorFlow's loops; the compiled ones could not be measured: " in native.hint()
    assert native.choice(tf.float32).instruction_set is None


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.bfloat16)])
def test_the_loops_are_timed_against_tensorflows(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_speed, "SIZES", [(6, 5, 16, 32)])
    monkeypatch.setattr(native_speed, "TURNS", 2)
    assert 0.01 < native_speed.ratio(native.best_instruction_set(), dtype) < 100


# ---- The build ----


@pytest.mark.slow("half a minute of g++; quick: what a failed build leaves")
def test_two_builds_at_once_leave_one_whole_library(tmp_path: Path) -> None:
    library = tmp_path / "new" / "lstm.so"
    with ThreadPoolExecutor() as pool:
        list(pool.map(build, [library] * 2))
    assert [path.name for path in library.parent.iterdir()] == ["lstm.so"]
    program = f"import tensorflow as tf; print(tf.load_op_library({str(library)!r}).warmstate_lstm)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=300)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-flag"):
        build(tmp_path / "lstm.so", extra=["-no-such-flag"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", INSTRUCTION_SETS.values(), ids=SETS)
def test_the_loops_share_no_symbol_with_the_rest(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The linker would keep one of each, perhaps with instructions that a processor lacks."""
    source, made = native.FOLDER / "loops.cc", tmp_path / "loops.o"
    command = [COMPILER, "-O3", "-std=c++17", "-DWARMSTATE_LOOPS=portable", *flags, "-c"]
    subprocess.run([*command, str(source), "-o", str(made)], check=True)
    listed = subprocess.run(
        ["nm", "--extern-only", "--defined-only", str(made)], check=True, capture_output=True
    )
    (line,) = listed.stdout.decode().splitlines()
    assert "warmstate" in line and "portable" in line
