"""`WarmLSTM` against `keras.layers.LSTM`, NumPy and finite differences."""

import json
import os
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import forked
from tests.conftest import REPOSITORY
from tests.trainer.rounding import OF_HALF_PRECISION_LSTM, bound
from trainer.models.lstm import Mode, WarmLSTM, lstm
from trainer.native import library_path

WIDTH, UNITS = 4, 5
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def layers(shape: tuple[int, int, int], **options: Any) -> tuple[keras.layers.LSTM, WarmLSTM]:
    """Returns Keras's layer and ours with the same weights; the bias is not left at its zeros."""
    rng = np.random.default_rng(1)
    made = keras.layers.LSTM(UNITS, **options), WarmLSTM(UNITS, **options)
    for layer in made:
        layer.build(shape)
    weights = [
        rng.normal(size=w.shape) * 0.5 for w in made[0].weights[: 3 if made[0].use_bias else 2]
    ]
    for layer in made:
        for variable, value in zip(layer.trainable_variables, weights, strict=True):
            variable.assign(value)
    return made


def example(batch: int, steps: int, dtype: str = "float32") -> tuple[tf.Tensor, list[tf.Tensor]]:
    rng = np.random.default_rng(2)
    shapes = [(batch, steps, WIDTH), (batch, UNITS), (batch, UNITS)]
    inputs, h, c = (tf.constant(rng.normal(size=shape), dtype) for shape in shapes)
    return inputs, [h, c]


def masks(batch: int, steps: int) -> dict[str, tf.Tensor | None]:
    rng = np.random.default_rng(3)
    arbitrary = rng.random((batch, steps)) > 0.5
    with_empty_row = arbitrary.copy()
    with_empty_row[0] = False
    return {
        "none": None,
        "right_padded": tf.sequence_mask(rng.integers(1, steps + 1, size=batch), steps),
        "arbitrary": tf.constant(arbitrary),
        "empty_row": tf.constant(with_empty_row),
    }


def results_and_gradients(
    layer: keras.layers.LSTM,
    inputs: tf.Tensor,
    mask: tf.Tensor | None,
    state: list[tf.Tensor] | None,
    training: bool = True,
) -> list[tf.Tensor]:
    """Returns what the layer returns, then the gradients of inputs, state if given, and weights."""
    sources = [inputs, *(state or [])]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        results = tf.nest.flatten(layer(inputs, mask=mask, initial_state=state, training=training))
        # Each element of each result gets another upstream gradient.
        loss = sum(tf.reduce_sum(tf.sin(3.0 * r) * k) for k, r in enumerate(results, start=1))
    sources += [variable.value for variable in layer.trainable_variables]
    return [*results, *tape.gradient(loss, sources)]


def assert_close(ours: list[tf.Tensor], theirs: list[tf.Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a.numpy(), b.numpy()
        assert a.shape == b.shape and a.dtype == b.dtype
        error = np.max(np.abs(a - b))
        assert error <= tolerance * max(np.max(np.abs(b)), 1e-3), f"result {index}: {error}"


@pytest.mark.parametrize("given_state", [True, False], ids=["state", "zero_state"])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("sequences", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize("mask_name", ["none", "right_padded", "arbitrary", "empty_row"])
def test_equals_keras(mask_name: str, sequences: bool, backwards: bool, given_state: bool) -> None:
    options = {"return_sequences": sequences, "go_backwards": backwards, "return_state": True}
    theirs, ours = layers((3, 6, WIDTH), **options)
    inputs, state = example(3, 6)
    mask = masks(3, 6)[mask_name]
    state = state if given_state else None
    expected = results_and_gradients(theirs, inputs, mask, state)
    assert_close(results_and_gradients(ours, inputs, mask, state), expected, TOLERANCE["float32"])


@pytest.mark.parametrize(("batch", "steps"), [(3, 6), (1, 1), (1, 6), (3, 1)])
@pytest.mark.parametrize("mask_name", ["none", "empty_row"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_keras_in_sizes_and_types(
    batch: int, steps: int, mask_name: str, dtype: str
) -> None:
    options = {"return_sequences": True, "return_state": True, "dtype": dtype}
    theirs, ours = layers((batch, steps, WIDTH), **options)
    inputs, state = example(batch, steps, dtype)
    mask = masks(batch, steps)[mask_name]
    expected = results_and_gradients(theirs, inputs, mask, state)
    assert_close(results_and_gradients(ours, inputs, mask, state), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_keras_in_a_graph_of_unknown_sizes(jit_compile: bool, masked: bool) -> None:
    theirs, ours = layers((3, 6, WIDTH), return_sequences=True, return_state=True)
    inputs, state = example(3, 6)
    mask = masks(3, 6)["arbitrary"]
    signature = [tf.TensorSpec((None, None, WIDTH)), tf.TensorSpec((None, None), tf.bool)]
    signature += [tf.TensorSpec((None, UNITS))] * 2

    @tf.function(input_signature=signature, jit_compile=jit_compile)
    def compiled(inputs: tf.Tensor, mask: tf.Tensor, h: tf.Tensor, c: tf.Tensor) -> list[tf.Tensor]:
        return results_and_gradients(ours, inputs, mask if masked else None, [h, c])

    expected = results_and_gradients(theirs, inputs, mask if masked else None, state)
    assert_close(compiled(inputs, mask, *state), expected, TOLERANCE["float32"])


@pytest.mark.parametrize(
    "options",
    [
        {"use_bias": False},
        {"zero_output_for_mask": True},
        {"activation": "relu"},
        {"unroll": True},
        {"implementation": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_equals_keras_with_options(options: dict[str, Any]) -> None:
    theirs, ours = layers((3, 6, WIDTH), return_sequences=True, return_state=True, **options)
    inputs, state = example(3, 6)
    mask = masks(3, 6)["arbitrary"]
    expected = results_and_gradients(theirs, inputs, mask, state)
    assert_close(results_and_gradients(ours, inputs, mask, state), expected, TOLERANCE["float32"])


@pytest.mark.skipif(bool(tf.config.list_logical_devices("GPU")), reason="a GPU runs Keras's path")
@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"dropout": 0.5, "use_bias": False, "stateful": True}, True),
        ({"recurrent_activation": "hard_sigmoid"}, False),
        ({"activation": None}, False),
        ({"recurrent_dropout": 0.5}, False),
        ({"dropout": 0.5, "implementation": 1}, False),
        ({"unroll": True}, False),
        ({"use_cudnn": True}, False),
    ],
    ids=str,
)
def test_which_layers_run_our_loop(options: dict[str, Any], own: bool) -> None:
    assert WarmLSTM(UNITS, **options)._runs_own_loop() is own


@pytest.mark.parametrize("dropout", [{"dropout": 0.5}, {"recurrent_dropout": 0.5}])
def test_dropout_draws_what_keras_draws(dropout: dict[str, float]) -> None:
    theirs, ours = layers((3, 6, WIDTH), return_sequences=True, seed=7, **dropout)
    inputs, _ = example(3, 6)
    expected = results_and_gradients(theirs, inputs, None, None)
    assert_close(results_and_gradients(ours, inputs, None, None), expected, TOLERANCE["float32"])
    assert np.max(np.abs(ours(inputs, training=True) - ours(inputs, training=False))) > 1e-3


@pytest.mark.parametrize("sequences", [True, False])
def test_gradients_without_training_are_the_same(sequences: bool) -> None:
    _, ours = layers((3, 6, WIDTH), return_sequences=sequences, return_state=True)
    inputs, state = example(3, 6)
    mask = masks(3, 6)["arbitrary"]
    kept = results_and_gradients(ours, inputs, mask, state, training=True)
    recomputed = results_and_gradients(ours, inputs, mask, state, training=False)
    assert_close(recomputed, kept, 0.0)


PEAK_MEMORY = """
import json
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly()
import tensorflow as tf
from benchmarks.processes import peak_megabytes
from trainer.models.lstm import WarmLSTM

layers = [WarmLSTM(64, return_sequences=True) for _ in range(5)]

@tf.function(reduce_retracing=True)
def step(values, recompute):
    with tf.GradientTape() as tape:
        tape.watch(values)
        outputs = values
        for layer in layers:
            layer.recompute = recompute
            outputs = layer(outputs, training=True)
    return tf.reduce_sum(tape.gradient(outputs, values))

sums, peaks = [], []
for steps, recompute in ((1, True), (1, False), (100, True), (100, False)):
    sums.append(float(step(tf.ones([128, steps, 64]), recompute)))
    peaks.append(peak_megabytes())
print(json.dumps([*sums[2:], *peaks[1:]]))
"""


@pytest.mark.parametrize(
    "native", [pytest.param("0", marks=pytest.mark.slow("quick: the compiled loops")), ""]
)
def test_less_is_held_where_activations_are_computed_again(native: str) -> None:
    # What one of the five layers keeps for the backward pass is 25 MiB.
    if not native and not library_path().exists():
        pytest.skip("the loops are not built: make native")
    done = forked.run(
        [sys.executable, "-c", PEAK_MEMORY],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"WARMSTATE_NATIVE": native},
    )
    assert done.returncode == 0, done.stderr
    again, kept, before, less, more = json.loads(done.stdout.splitlines()[-1])
    print(f"peak above {before:.0f} MiB: {less - before:.0f} MiB, kept {more - before:.0f}")
    assert again == kept
    assert more - less > 50


def test_gradients_equal_finite_differences() -> None:
    rng = np.random.default_rng(4)
    shapes = [(2, 3, 2), (2, 2), (2, 2), (2, 8), (2, 8), (8,)]
    values = [rng.normal(size=shape) for shape in shapes]
    mask = tf.constant([[True, False, True], [False, True, False]])

    def run(*tensors: tf.Tensor) -> tf.Tensor:
        mode = Mode(return_sequences=True, keep_activations=True)
        outputs, h, c = lstm(*tensors[:3], tensors[3:], mask, mode)
        return tf.reduce_sum(tf.sin(outputs)) + tf.reduce_sum(tf.cos(h)) + tf.reduce_sum(c * c)

    exact, numeric = tf.test.compute_gradient(run, values, delta=1e-5)
    for a, b in zip(exact, numeric, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", pytest.param("mixed_bfloat16", marks=pytest.mark.bfloat16)]
)
def test_masked_steps_repeat_to_the_bit(dtype: str) -> None:
    _, layer = layers((2, 4, WIDTH), return_sequences=True, return_state=True, dtype=dtype)
    inputs, state = example(2, 4)
    mask = tf.constant([[True, False, True, False], [False, False, False, False]])
    outputs, h, c = layer(inputs, mask=mask, initial_state=state)
    _, h_of_three, c_of_three = layer(inputs[:, :3], mask=mask[:, :3], initial_state=state)
    np.testing.assert_array_equal(outputs[0, 1], outputs[0, 0])
    np.testing.assert_array_equal(outputs[0, 3], outputs[0, 2])
    np.testing.assert_array_equal(outputs[1], tf.zeros_like(outputs[1]))
    for found, before, start in zip((h, c), (h_of_three, c_of_three), state, strict=True):
        np.testing.assert_array_equal(found, before)
        np.testing.assert_array_equal(found[1], tf.cast(start, found.dtype)[1])


@pytest.mark.parametrize("mask_name", ["none", "right_padded"])
def test_a_bias_a_row_is_the_bias_of_a_layer_that_reads_this_row(mask_name: str) -> None:
    _, layer = layers((3, 6, WIDTH), return_sequences=True, return_state=True, dtype="float64")
    inputs, state = example(3, 6, "float64")
    mask = masks(3, 6)[mask_name]
    biases = tf.Variable(np.random.default_rng(5).normal(size=(3, 4 * UNITS)))

    def of(rows: slice, source: tf.Variable) -> list[tf.Tensor]:
        """Returns the results of some rows, and the gradient of `source`."""
        given = None if mask is None else mask[rows]
        with tf.GradientTape() as tape:
            layer.row_bias = biases.value()[rows] if source is biases else None
            found = layer(
                inputs[rows], mask=given, initial_state=[s[rows] for s in state], training=True
            )
            loss = sum(tf.reduce_sum(tf.sin(3.0 * r) * k) for k, r in enumerate(found, start=1))
        return [*found, tape.gradient(loss, source)]

    together = of(slice(None), biases)
    for row in range(3):
        layer.cell.bias.assign(biases[row])
        alone = of(slice(row, row + 1), layer.cell.bias.value)
        for whole, expected in zip(together[:3], alone[:3], strict=True):
            np.testing.assert_allclose(whole[row], expected[0], rtol=0, atol=1e-13)
        np.testing.assert_allclose(together[3][row], alone[3], rtol=0, atol=1e-12)


def gradients_of_steps(
    layer: WarmLSTM, inputs: tf.Tensor, mask: np.ndarray, state: list[tf.Tensor], clip_norm: float
) -> list[tf.Tensor]:
    """Returns the gradients that `clipped` asks for, by Keras's cell and automatic gradients."""

    @tf.custom_gradient
    def handed_on(h: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            return tf.clip_by_norm(upstream, clip_norm, axes=[1])

        return tf.identity(h), gradient

    kernel, recurrent, bias = (variable.value for variable in layer.trainable_variables)
    with tf.GradientTape() as tape:
        tape.watch([inputs, *state])
        (h, c), outputs = state, []
        for t in range(inputs.shape[1]):
            z = inputs[:, t] @ kernel + handed_on(h) @ recurrent + bias
            i, f, g, o = tf.split(z, 4, 1)
            shown = mask[:, t, None]
            new_c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
            h, c = tf.where(shown, tf.sigmoid(o) * tf.tanh(new_c), h), tf.where(shown, new_c, c)
            outputs.append(h)
        loss = tf.reduce_sum(tf.sin(3.0 * tf.stack(outputs, 1))) + tf.reduce_sum(h * c)
    return tape.gradient(loss, [inputs, *state, kernel, recurrent, bias])


def clipped(
    layer: WarmLSTM, inputs: tf.Tensor, mask: np.ndarray, state: list[tf.Tensor], clip_norm: float
) -> list[tf.Tensor]:
    """Returns the gradients of inputs, states and weights where steps clip what they hand on."""
    layer.clip_norm = clip_norm
    sources = [inputs, *state, *(variable.value for variable in layer.trainable_variables)]
    with tf.GradientTape() as tape:
        tape.watch(sources[:3])
        outputs, h, c = layer(inputs, mask=tf.constant(mask), initial_state=state, training=True)
        loss = tf.reduce_sum(tf.sin(3.0 * outputs)) + tf.reduce_sum(h * c)
    return tape.gradient(loss, sources)


def exploding(steps: int) -> tuple[WarmLSTM, tf.Tensor, np.ndarray, list[tf.Tensor]]:
    """Returns a layer, inputs, mask and states; back through time the first row's gradient grows.

    The other rows are too short for that.
    """
    _, layer = layers((3, steps, WIDTH), return_sequences=True, return_state=True, dtype="float64")
    kernel, recurrent, bias = layer.get_weights()
    layer.set_weights([kernel, 8 * recurrent, 0 * bias])
    inputs, state = example(3, steps, "float64")
    mask = np.arange(steps) < np.array([steps, 3, 2])[:, None]
    return layer, 0.01 * inputs, mask, [0.01 * tensor for tensor in state]


@pytest.mark.parametrize("clip_norm", [0.05, 1.0, 1e9])
def test_each_step_clips_what_it_hands_to_the_step_before_row_by_row(clip_norm: float) -> None:
    layer, *given = exploding(12)
    expected = gradients_of_steps(layer, *given, clip_norm)
    assert_close(clipped(layer, *given, clip_norm), expected, TOLERANCE["float64"])


def test_a_row_that_explodes_leaves_the_others_as_they_are() -> None:
    layer, *given = exploding(60)
    free, bound = clipped(layer, *given, 0.0), clipped(layer, *given, 1000.0)
    norms = [np.linalg.norm(gradients[0], axis=(1, 2)) for gradients in (free, bound)]
    assert norms[0][0] > 500 * norms[0][1:].max(), norms
    assert norms[1][0] < 10 * norms[0][1:].max(), norms
    np.testing.assert_array_equal(free[0][1:], bound[0][1:])


def test_only_one_result_used() -> None:
    """Gradients are right too where the loss reads the final c alone."""
    found = []
    for layer in layers((3, 6, WIDTH), return_state=True):
        inputs, state = example(3, 6)
        with tf.GradientTape() as tape:
            tape.watch([inputs, *state])
            _, _, c = layer(inputs, initial_state=state, training=True)
        found.append(tape.gradient(c, [inputs, *state]))
    assert_close(found[1], found[0], TOLERANCE["float32"])


def test_empty_batch_has_zero_gradients() -> None:
    _, ours = layers((3, 6, WIDTH), return_sequences=True)
    inputs, _ = example(0, 6)
    outputs, d_inputs, *d_weights = results_and_gradients(ours, inputs, None, None)
    assert outputs.shape == (0, 6, UNITS) and d_inputs.shape == (0, 6, WIDTH)
    assert all(np.all(gradient == 0) for gradient in d_weights)


@pytest.mark.bfloat16
def test_mixed_precision_computes_in_bfloat16_and_is_close() -> None:
    _, exact = layers((3, 6, WIDTH), return_sequences=True, return_state=True)
    _, mixed = layers(
        (3, 6, WIDTH), return_sequences=True, return_state=True, dtype="mixed_bfloat16"
    )
    inputs, state = example(3, 6)
    mask = masks(3, 6)["arbitrary"]
    expected = results_and_gradients(exact, inputs, mask, state)
    found = results_and_gradients(mixed, inputs, mask, state)
    assert [t.dtype.name for t in found[:3]] == ["bfloat16"] * 3
    assert [t.dtype.name for t in found[-3:]] == ["float32"] * 3
    assert_close([tf.cast(t, tf.float32) for t in found], expected, 0.03)


def test_same_bits_every_time() -> None:
    layer = WarmLSTM(64, return_sequences=True)
    inputs = tf.random.stateless_normal((16, 20, 32), seed=(1, 2))
    layer.build(inputs.shape)
    first, second = (results_and_gradients(layer, inputs, None, None) for _ in range(2))
    assert_close(first, second, 0.0)


def test_same_under_one_device_strategy() -> None:
    inputs, _ = example(3, 6)
    mask = masks(3, 6)["arbitrary"]
    theirs, _ = layers((3, 6, WIDTH), return_sequences=True)
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        _, ours = layers((3, 6, WIDTH), return_sequences=True)

    @tf.function
    def step(inputs: tf.Tensor, mask: tf.Tensor) -> list[tf.Tensor]:
        return results_and_gradients(ours, inputs, mask, None)

    expected = results_and_gradients(theirs, inputs, mask, None)
    assert_close(strategy.run(step, (inputs, mask)), expected, TOLERANCE["float32"])


# ---- Keras's own contracts: configuration, files, masks, states ----


@pytest.mark.parametrize(("kind", "trained"), [("learned", True), ("fixed", False)])
def test_states_are_trained_only_if_they_are_learned(kind: str, trained: bool) -> None:
    layer = WarmLSTM(UNITS, initial_state=kind)
    layer.build((None, None, WIDTH))
    states = {id(layer.initial_h), id(layer.initial_c)}
    assert (states <= {id(v) for v in layer.trainable_variables}) == trained
    assert (states <= {id(v) for v in layer.non_trainable_variables}) == (not trained)


def test_config_round_trip() -> None:
    layer = WarmLSTM(UNITS, return_sequences=True, go_backwards=True, dropout=0.25, name="encoder")
    assert WarmLSTM.from_config(layer.get_config()).get_config() == layer.get_config()
    assert layer.get_config().keys() == keras.layers.LSTM(UNITS).get_config().keys()


def test_saved_model_round_trip(tmp_path: Any) -> None:
    model = keras.Sequential(
        [
            keras.Input((None,)),
            keras.layers.Embedding(11, WIDTH, mask_zero=True),
            WarmLSTM(UNITS, return_sequences=True),
            WarmLSTM(UNITS),
        ]
    )
    ids = np.array([[3, 1, 4, 0, 0], [1, 5, 9, 2, 6]])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.layers[-1], WarmLSTM)
    assert loaded.output_shape == (None, UNITS)
    np.testing.assert_array_equal(loaded(ids), model(ids))


def test_weights_load_into_keras_and_back() -> None:
    theirs, ours = layers((3, 6, WIDTH))
    assert [w.path.split("/", 1)[1] for w in ours.weights] == [
        w.path.split("/", 1)[1] for w in theirs.weights
    ]


def test_stateful_layer_carries_its_state() -> None:
    inputs, _ = example(3, 6)
    options = {"return_sequences": True, "return_state": True}
    _, whole = layers((3, 6, WIDTH), **options)
    _, parts = layers((3, 3, WIDTH), stateful=True, **options)
    expected, *state = whole(inputs)
    found = [parts(inputs[:, :3])[0], parts(inputs[:, 3:])[0]]
    np.testing.assert_allclose(tf.concat(found, 1), expected, atol=1e-6)
    for variable, value in zip(parts.states, state, strict=True):
        np.testing.assert_allclose(variable, value, atol=1e-6)
    parts.reset_state()
    assert all(np.all(variable.numpy() == 0) for variable in parts.states)
    np.testing.assert_allclose(parts(inputs[:, :3])[0], found[0], atol=1e-6)


# ---- The three ways to start an LSTM from a state ----


def numpy_lstm(inputs: np.ndarray, h: np.ndarray, c: np.ndarray, weights: list) -> np.ndarray:
    """Returns the outputs [batch, time, units] of the textbook equations."""
    kernel, recurrent, bias = weights
    outputs = []
    for x in inputs.transpose(1, 0, 2):
        i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1)


def start_by_variables(inputs: tf.Tensor, state: list[tf.Tensor]) -> tf.Tensor:
    _, layer = layers(inputs.shape, return_sequences=True, stateful=True, dtype="float64")
    for variable, value in zip(layer.states, state, strict=True):
        variable.assign(value)
    return layer(inputs)


def start_by_initial_state(inputs: tf.Tensor, state: list[tf.Tensor]) -> tf.Tensor:
    _, layer = layers(inputs.shape, return_sequences=True, dtype="float64")
    return layer(inputs, initial_state=state)


def start_by_reset_state(inputs: tf.Tensor, state: list[tf.Tensor]) -> tf.Tensor:
    _, layer = layers(inputs.shape, return_sequences=True, stateful=True, dtype="float64")
    layer.reset_state(states=[value.numpy() for value in state])
    return layer(inputs)


@pytest.mark.parametrize(
    "start", [start_by_variables, start_by_initial_state, start_by_reset_state]
)
def test_every_way_to_start_from_an_encoders_state(start: Any) -> None:
    inputs, _ = example(3, 6, "float64")
    encoder = WarmLSTM(UNITS, return_state=True, dtype="float64")
    _, *state = encoder(inputs)
    assert np.max(np.abs(state[0])) > 0.01
    _, layer = layers(inputs.shape, dtype="float64")
    weights = [w.numpy() for w in layer.trainable_variables]
    expected = numpy_lstm(inputs.numpy(), state[0].numpy(), state[1].numpy(), weights)
    np.testing.assert_allclose(start(inputs, state), expected, rtol=0, atol=1e-13)


@pytest.fixture
def stateful() -> WarmLSTM:
    layer = WarmLSTM(UNITS, stateful=True, name="decoder")
    layer.build((3, 6, WIDTH))
    return layer


def test_reset_state_takes_rows_for_the_whole_batch(stateful: WarmLSTM) -> None:
    stateful.reset_state([tf.range(UNITS), np.ones((3, UNITS))])
    np.testing.assert_array_equal(stateful.states[0], np.tile(np.arange(UNITS), (3, 1)))
    np.testing.assert_array_equal(stateful.states[1], np.ones((3, UNITS)))
    stateful.reset_state()
    np.testing.assert_array_equal(stateful.states[0], np.zeros((3, UNITS)))


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([np.zeros(UNITS)], r"decoder.* expects 2 states, \[h, c\]; got 1"),
        ([np.ones(UNITS), np.zeros(7)], r"decoder.* c of shape \(3, 5\) or \(5,\); got \(7,\)"),
        ([np.ones((2, UNITS)), np.zeros(UNITS)], r"h of shape \(3, 5\) or \(5,\); got \(2, 5\)"),
    ],
)
def test_reset_state_refuses_wrong_states(stateful: WarmLSTM, states: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stateful.reset_state(states)
    assert np.all(stateful.states[0].numpy() == 0)


def test_reset_state_needs_a_built_stateful_layer() -> None:
    state = [np.zeros((3, UNITS))] * 2
    with pytest.raises(ValueError, match="plain: .* stateful=True"):
        WarmLSTM(UNITS, name="plain").reset_state(state)
    with pytest.raises(ValueError, match="unbuilt: .* before the layer was built"):
        WarmLSTM(UNITS, stateful=True, name="unbuilt").reset_state(state)


@pytest.mark.parametrize(
    "policy",
    [pytest.param("mixed_bfloat16", marks=pytest.mark.bfloat16), "mixed_float16"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_is_near_float32(policy: str, masked: bool) -> None:
    tolerance = bound(tf.as_dtype(policy.removeprefix("mixed_")), OF_HALF_PRECISION_LSTM)
    random = np.random.default_rng(0)
    inputs = tf.constant(random.normal(size=(6, 150, 5)), tf.float32)
    mask = tf.sequence_mask([150, 1, 149, 80, 3, 120], 150) if masked else None
    results = []
    for dtype in ("float32", policy):
        keras.utils.set_random_seed(0)
        layer = WarmLSTM(16, return_sequences=True, return_state=True, dtype=dtype)
        layer.build(inputs.shape)
        with tf.GradientTape() as tape:
            outputs = layer(inputs, mask=mask, training=True)
            assert {t.dtype.name for t in outputs} == {layer.compute_dtype}
            loss = sum(tf.reduce_sum(tf.cast(t, tf.float32) ** 2) for t in outputs)
        variables = [v.value for v in layer.trainable_variables]
        assert {v.dtype for v in variables} == {tf.float32}
        gradients = tape.gradient(loss, variables)
        results.append([tf.cast(t, tf.float32) for t in [*outputs, *gradients]])
    for exact, half in zip(*results, strict=True):
        assert tf.norm(exact - half) < tolerance * tf.norm(exact)
        assert tf.reduce_any(exact != half)
