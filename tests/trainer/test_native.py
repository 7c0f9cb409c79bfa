"""The compiled loops give what Keras's LSTM gives, and a row does not depend on the others."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer import native
from trainer.models.lstm import WarmLSTM, Words
from trainer.native.build import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The loops, compiled for this module alone, unless this checkout has them.

    A process can load them from one file only.
    """
    if native.library_path().exists():
        yield
        return
    library = tmp_path_factory.mktemp("native") / "lstm.so"
    build(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_load", lambda: tf.load_op_library(str(library)))
        yield


# Right-padded with an empty row; and what a mask may be too.
MASKS = {
    "none": None,
    "padded": np.arange(9)[None] < np.array([9, 7, 0, 1, 8, 3, 9])[:, None],
    "any": np.random.default_rng(3).random((7, 9)) < 0.6,
}


def results(layer: Any, inputs: tf.Tensor, states: list, mask: Any, weights: list) -> list:
    """Returns the layer's outputs, and the gradients of all that it depends on."""
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

    return [tensor.numpy() for tensor in run(inputs, *states)]


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


@pytest.mark.parametrize("units", [16, 48, 80])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("return_sequences", [False, True])
def test_as_keras(units: int, mask: str, return_sequences: bool) -> None:
    inputs, states, weights = problem(units)
    options = {"return_sequences": return_sequences, "return_state": True}
    ours, keras_ = (
        results(kind(units, **options), inputs, states, mask_of(mask), weights)
        for kind in (WarmLSTM, keras.layers.LSTM)
    )
    for found, expected in zip(ours, keras_, strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-6 * max(1, np.abs(expected).max()))


@pytest.mark.bfloat16
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("return_sequences", [False, True])
def test_half_precision_is_near_float32(mask: str, return_sequences: bool) -> None:
    inputs, states, weights = problem(48)
    half, whole = (
        results(
            WarmLSTM(48, return_sequences=return_sequences, return_state=True, dtype=precision),
            inputs,
            states,
            mask_of(mask),
            weights,
        )
        for precision in ("mixed_bfloat16", "float32")
    )
    for found, expected in zip(half, whole, strict=True):
        error = np.linalg.norm(found.astype(np.float32) - expected) / np.linalg.norm(expected)
        assert error < 0.02, error  # a bfloat16 has 8 bits
    layer = WarmLSTM(48, dtype="mixed_bfloat16")
    run = tf.function(lambda x: layer(x, training=True))
    graph = run.get_concrete_function(tf.TensorSpec(inputs.shape)).graph
    (operation,) = (op for op in graph.get_operations() if op.type == "WarmstateLstm")
    assert operation.get_attr("factors") == tf.bfloat16


def half(array: np.ndarray) -> np.ndarray:
    return tf.cast(tf.cast(array, tf.bfloat16), tf.float32).numpy()


def test_only_the_factors_of_the_recurrent_products_are_rounded() -> None:
    """From factors that bfloat16 holds exactly, both kinds of product give the same."""
    operations = native.operations(training=True)
    random = np.random.default_rng(4)
    z = tf.constant(random.normal(size=(5, 1, 128)), tf.float32)
    recurrent, h = half(random.normal(0, 0.3, (32, 128))), half(random.normal(size=(5, 32)))
    c, none = tf.constant(random.normal(size=(5, 32)), tf.float32), tf.zeros([0], tf.bool)
    rounded, whole = (
        operations.warmstate_lstm(z, recurrent, h, c, none, factors=factors)
        for factors in (tf.bfloat16, tf.float32)
    )
    for found, expected in zip(rounded, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for wrong in (np.nan, -np.nan, np.inf):
        broken = operations.warmstate_lstm(
            z, recurrent, np.full_like(h, wrong), c, none, factors=tf.bfloat16
        )
        assert np.isnan(broken.outputs).any(), wrong


def test_it_is_what_training_runs_and_inference_where_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = WarmLSTM(16)
    layer.build((2, 3, 4))

    def operations(training: bool) -> set[str]:
        run = tf.function(lambda x: layer(x, training=training))
        graph = run.get_concrete_function(tf.TensorSpec((2, 3, 4))).graph
        return {operation.type for operation in graph.get_operations()}

    assert "WarmstateLstm" in operations(True) and "WarmstateLstm" not in operations(False)
    monkeypatch.setattr(native, "_in_inference", False)
    native.use_in_inference()
    assert "WarmstateLstm" in operations(False)


@pytest.mark.parametrize("mask", MASKS)
def test_words_that_repeat_are_read_as_all_others(
    mask: str, monkeypatch: pytest.MonkeyPatch
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
    assert "WarmstateLstmRead" in {operation.type for operation in graph.get_operations()}
    for found, expected in zip(layer.read_words(words, given, state), in_tensorflow, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_word_that_is_not_there_is_refused() -> None:
    operations = native.operations(training=True)
    zeros, none = tf.zeros((1, 16)), tf.zeros([0], tf.bool)
    for wrong in (-1, 2):
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"there is no word {wrong}"):
            operations.warmstate_lstm_read(
                tf.zeros((2, 64)),
                tf.constant([[0, wrong]]),
                tf.zeros((16, 64)),
                zeros,
                zeros,
                none,
                return_sequences=False,
            )


def test_the_last_output_alone() -> None:
    operations = native.operations(training=True)
    random = np.random.default_rng(2)
    z = tf.constant(random.normal(size=(3, 64)), tf.float32)
    index = tf.constant(random.integers(0, 3, (5, 6)), tf.int32)
    recurrent = tf.constant(random.normal(0, 0.3, (16, 64)), tf.float32)
    zeros, mask = tf.zeros((5, 16)), tf.constant(MASKS["any"][:5, :6])
    every, last = (
        operations.warmstate_lstm_read(
            z, index, recurrent, zeros, zeros, mask, return_sequences=sequences
        )
        for sequences in (True, False)
    )
    np.testing.assert_array_equal(every.outputs[:, -1:], last.outputs)
    np.testing.assert_array_equal(every.final_h, last.outputs[:, 0])


@pytest.mark.parametrize("factors", [tf.float32, tf.bfloat16])
def test_a_row_alone_has_the_same_bits(factors: tf.DType) -> None:
    operations = native.operations(training=True)
    random = np.random.default_rng(0)
    z = random.normal(size=(13, 20, 64)).astype(np.float32)
    recurrent = tf.constant(random.normal(0, 0.3, (16, 64)), tf.float32)
    zeros, none = tf.zeros((13, 16)), tf.zeros([0], tf.bool)
    together = operations.warmstate_lstm(
        tf.constant(z), recurrent, zeros, zeros, none, factors=factors
    )
    for row in range(13):
        alone = operations.warmstate_lstm(
            tf.constant(z[row : row + 1]), recurrent, zeros[:1], zeros[:1], none, factors=factors
        )
        for one, all_ in zip(alone, together, strict=True):
            assert one[0].numpy().tobytes() == all_[row].numpy().tobytes()


@pytest.mark.parametrize("return_sequences", [False, True])
def test_what_is_computed_again_has_the_same_bits(return_sequences: bool) -> None:
    inputs, states, weights = problem(16)
    found = []
    for recompute in (False, True):
        layer = WarmLSTM(16, return_sequences=return_sequences, return_state=True)
        layer.recompute = recompute
        found.append(results(layer, inputs, states, mask_of("padded"), weights))
    for kept, again in zip(*found, strict=True):
        assert kept.tobytes() == again.tobytes()


def test_a_batch_without_rows() -> None:
    layer = WarmLSTM(16, return_sequences=True)
    layer.build((None, 3, 4))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(tf.zeros((0, 3, 4)), training=True))
    for gradient in tape.gradient(loss, [v.value for v in layer.trainable_variables]):
        assert not np.any(gradient)


def test_what_is_not_a_number_is_seen() -> None:
    operations = native.operations(training=True)
    zeros, none = tf.zeros((1, 16)), tf.zeros([0], tf.bool)
    for gate in range(4):
        for wrong in (np.nan, -np.nan):
            z = np.zeros((1, 2, 64), np.float32)
            z[0, 0, 16 * gate : 16 * gate + 16] = wrong
            found = operations.warmstate_lstm(
                tf.constant(z), tf.zeros((16, 64)), zeros, zeros, none
            )
            assert np.isnan(found.outputs[0, 0]).all(), (gate, wrong)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 30.0, 1e4])
def test_the_functions_of_the_gates_over_their_range(scale: float) -> None:
    operations = native.operations(training=True)
    z = (np.random.default_rng(0).normal(size=(1, 1, 4 * 1600)) * scale).astype(np.float32)
    zeros = tf.zeros((1, 1600))
    found = operations.warmstate_lstm(
        tf.constant(z), tf.zeros((1600, 6400)), zeros, zeros, tf.zeros([0], tf.bool)
    )
    i, f, g, o = np.split(found.gates.numpy()[0, 0], 4)
    z = np.split(z[0, 0].astype(np.float64), 4)
    with np.errstate(over="ignore"):
        for gate, of in ((i, z[0]), (f, z[1]), (o, z[3])):
            np.testing.assert_allclose(gate, 1 / (1 + np.exp(-of)), rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(g, np.tanh(z[2]), rtol=2e-6)


def test_a_build_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "lstm-1.so"
    monkeypatch.setattr(native, "library_path", lambda: library)
    monkeypatch.delenv(native.DISABLED, raising=False)
    assert native.hint() == (
        "lstm: TensorFlow's loops; python -m trainer.native.build compiles faster ones"
    )
    (tmp_path / "lstm-2.so").touch()
    assert "a build for another source, processor or TensorFlow is there" in native.hint()
    library.touch()
    assert native.hint() == ""
    library.unlink()
    monkeypatch.setenv(native.DISABLED, "0")
    assert native.hint() == ""
