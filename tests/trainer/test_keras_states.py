"""States of Keras's own layers: read from encoders, and set as what layers start from."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests import forked
from tests.conftest import REPOSITORY
from trainer import states
from trainer.models.lstm import WarmLSTM

STEPS, WIDTH, UNITS = 4, 3, 5
X = np.random.default_rng(0).normal(size=(10, STEPS, WIDTH)).astype("float32")


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(0)


# ---- from_encoder: what a person may have in hand ----


def whole_autoencoder() -> tuple[keras.Model, str, list]:
    inputs = keras.Input((STEPS, WIDTH))
    code = layers.LSTM(UNITS, name="encoder")(inputs)
    outputs = layers.LSTM(WIDTH, return_sequences=True)(layers.RepeatVector(STEPS)(code))
    model = keras.Model(inputs, outputs)
    return model, "encoder", returned_states(model.get_layer("encoder"))


def encoder_half() -> tuple[keras.Model, None, list]:
    inputs = keras.Input((STEPS, WIDTH))
    layer = layers.LSTM(UNITS)
    model = keras.Model(inputs, layer(inputs))
    return model, None, returned_states(layer)


def returns_states() -> tuple[keras.Model, None, list]:
    inputs = keras.Input((STEPS, WIDTH))
    layer = layers.LSTM(UNITS, return_state=True)
    _, h, c = layer(inputs)
    return keras.Model(inputs, [h, c]), None, returned_states(layer)


def returns_output_and_states() -> tuple[keras.Model, None, list]:
    inputs = keras.Input((STEPS, WIDTH))
    layer = layers.LSTM(UNITS, return_state=True, return_sequences=True)
    return keras.Model(inputs, layer(inputs)), None, returned_states(layer)


def sequential_bidirectional() -> tuple[keras.Model, None, list]:
    layer = layers.Bidirectional(layers.LSTM(UNITS), merge_mode="sum")
    model = keras.Sequential([keras.Input((STEPS, WIDTH)), layer, layers.Dense(1)])
    backward = returned_states(layer.backward_layer)
    return model, None, returned_states(layer.forward_layer) + backward


def stack() -> tuple[keras.Model, list[str], list]:
    lower, upper = layers.LSTM(UNITS, return_sequences=True), layers.LSTM(2)
    model = keras.Sequential([keras.Input((STEPS, WIDTH)), lower, upper])
    return (
        model,
        [lower.name, upper.name],
        returned_states(lower) + returned_states(upper, lower(X)),
    )


def stacked_cells() -> tuple[keras.layers.Layer, None, list]:
    cells = [layers.LSTMCell(UNITS), layers.LSTMCell(2)]
    layer = layers.RNN(layers.StackedRNNCells(cells))
    layer(X)
    lower, upper = layers.RNN(cells[0], return_sequences=True), layers.RNN(cells[1])
    return layer, None, returned_states(lower) + returned_states(upper, lower(X))


def subclass() -> tuple[keras.Model, None, list]:
    class Encoder(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = layers.LSTM(UNITS, return_state=True)

        def call(self, inputs: tf.Tensor) -> list[tf.Tensor]:
            return self.lstm(inputs)[1:]

    model = Encoder()
    return model, None, model(X)


def a_layer() -> tuple[keras.layers.Layer, None, list]:
    layer = layers.LSTM(UNITS, stateful=True)
    layer(X)
    layer.reset_state()
    return layer, None, returned_states(layer)


def returned_states(layer: keras.layers.RNN, inputs: np.ndarray = X) -> list:
    """Returns [h, c] by the definition: NumPy's loop over Keras's cell."""
    h = c = np.zeros((len(inputs), layer.cell.units), "float32")
    steps = np.asarray(inputs).transpose(1, 0, 2)
    for step in steps[::-1] if layer.go_backwards else steps:
        h, (_, c) = layer.cell(step, [h, c])
    return [h, c]


ENCODERS = [
    whole_autoencoder,
    encoder_half,
    returns_states,
    returns_output_and_states,
    sequential_bidirectional,
    stack,
    stacked_cells,
    subclass,
    a_layer,
]


@pytest.mark.parametrize("make", ENCODERS, ids=lambda make: make.__name__)
def test_from_encoder_reads_what_the_encoder_ends_with(make: Callable) -> None:
    encoder, names, expected = make()
    found = states.from_encoder(encoder, X, "encode", layers=names, batch_size=5)
    mean = states.from_encoder(encoder, X, layers=names, batch_size=5)
    assert len(found) == len(mean) == len(expected) // 2
    for part, average, wanted in zip(
        tf.nest.flatten(found), tf.nest.flatten(mean), expected, strict=True
    ):
        np.testing.assert_allclose(part, wanted, atol=1e-6)
        np.testing.assert_allclose(average, np.mean(wanted, axis=0), atol=1e-6)
        assert average.dtype == np.float32


def test_from_encoder_reads_text_with_masks_and_ignores_labels() -> None:
    texts = ["a b c", "c", "a a b b", "b a"]
    vectorize = layers.TextVectorization()
    vectorize.adapt(texts)
    embedding, lstm = layers.Embedding(9, WIDTH, mask_zero=True), layers.LSTM(UNITS)
    model = keras.Sequential([vectorize, embedding, lstm])
    model(tf.constant(texts))
    state = states.from_encoder(model, texts, "encode")
    alone = [states.from_encoder(model, [text], "encode") for text in texts]
    np.testing.assert_allclose(state[0].h, [found[0].h[0] for found in alone], atol=1e-6)
    labelled = tf.data.Dataset.from_tensor_slices((texts, [0, 1, 0, 1])).batch(3)
    np.testing.assert_allclose(states.from_encoder(model, labelled, "encode"), state, atol=1e-6)


def test_from_encoder_says_what_it_lacks() -> None:
    model, _, _ = whole_autoencoder()
    for arguments, message in (
        ({}, r"has 2 LSTMs, \['encoder', .*name those whose state you want"),
        ({"layers": "lstm"}, r"has no LSTM \['lstm'\]; it has"),
        ({"how": "last"}, "how='last' is neither"),
        ({"data": X[:0], "layers": "encoder"}, "no documents"),
    ):
        with pytest.raises(ValueError, match=message):
            states.from_encoder(**{"encoder": model, "data": X} | arguments)
    with pytest.raises(ValueError, match="dense returns no states.*return_state=True"):
        states.from_encoder(layers.Dense(2, name="dense"), X[:, 0])
    with pytest.raises(ValueError, match="was never called"):
        states.from_encoder(layers.LSTM(2), X)
    inputs = keras.Input((STEPS, WIDTH))
    _, h = layers.GRU(2, return_state=True, name="gru")(inputs)
    with pytest.raises(ValueError, match="gru is not an LSTM"):
        states.from_encoder(keras.Model(inputs, [h, h]), X)


# ---- apply ----

STATE = states.LearnedState(*np.random.default_rng(1).normal(size=(2, UNITS)).astype("float32"))
OTHER = states.LearnedState(*np.random.default_rng(2).normal(size=(2, UNITS)).astype("float32"))


def rows(*given: states.LearnedState) -> list[np.ndarray]:
    """Returns [h, c, ...] for the batch X, to be given in a call."""
    return [np.tile(part, (len(X), 1)) for state in given for part in state]


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("mixed_bfloat16", marks=pytest.mark.bfloat16)]
)
@pytest.mark.parametrize("cls", [layers.LSTM, WarmLSTM])
@pytest.mark.parametrize("options", [{}, {"stateful": True}, {"go_backwards": True}], ids=str)
def test_a_layer_starts_from_the_state(cls: type, options: dict, dtype: str) -> None:
    layer = cls(UNITS, dtype=dtype, **options)
    zero = layer(X)
    expected = layer(X, initial_state=rows(STATE))
    states.apply(layer, STATE)
    found = layer(X)
    tolerance = {"float32": 1e-6, "mixed_bfloat16": 0.02}[dtype]
    np.testing.assert_allclose(
        tf.cast(found, "float32"), tf.cast(expected, "float32"), atol=tolerance
    )
    assert np.abs(tf.cast(zero, "float32") - tf.cast(found, "float32")).max() > 0.02
    if not options.get("stateful"):
        again = tf.cast(layer(X[:3]), "float32")  # any batch, at every call
        np.testing.assert_allclose(again, tf.cast(found[:3], "float32"), atol=tolerance)
        assert isinstance(layer, keras.layers.LSTM) and type(layer) is WarmLSTM


def test_a_layer_that_was_never_called_and_a_stateful_one_with_a_state_a_row() -> None:
    layer = layers.LSTM(UNITS)
    states.apply(layer, [STATE.h, STATE.c])
    np.testing.assert_allclose(layer(X), layer(X, initial_state=rows(STATE)), atol=1e-6)
    stateful = layers.LSTM(UNITS, stateful=True)
    stateful.build((10, STEPS, WIDTH))
    of_each = np.random.default_rng(3).normal(size=(2, 10, UNITS)).astype("float32")
    states.apply(stateful, states.LearnedState(*of_each))
    np.testing.assert_array_equal(stateful.states, of_each)


def functional() -> tuple[keras.Model, list]:
    inputs = keras.Input((STEPS, WIDTH))
    outputs = layers.LSTM(UNITS, return_sequences=True)(inputs)
    return keras.Model(inputs, layers.LSTM(UNITS)(outputs)), [STATE, OTHER]


def sequential_with_bidirectional() -> tuple[keras.Model, list]:
    both = layers.Bidirectional(layers.LSTM(UNITS))
    return keras.Sequential([keras.Input((STEPS, WIDTH)), both]), [STATE, OTHER]


def learned() -> tuple[keras.Model, list]:
    layer = WarmLSTM(UNITS, initial_state="learned")
    return keras.Sequential([keras.Input((STEPS, WIDTH)), layer]), [STATE]


MODELS = [functional, sequential_with_bidirectional, learned]


def expected_of(model: keras.Model) -> np.ndarray:
    """Returns what the LSTMs give that are told, in each call, to start from STATE (and OTHER)."""
    if isinstance(model.layers[-1], layers.Bidirectional):
        return model.layers[-1](X, initial_state=rows(STATE, OTHER)).numpy()
    outputs = X
    found = [layer for layer in model.layers if isinstance(layer, layers.LSTM)]
    for layer, state in zip(found, (STATE, OTHER), strict=False):
        outputs = layer(outputs, initial_state=rows(state))
    return outputs.numpy()


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_starts_from_the_states_also_when_it_is_loaded(
    make: Callable, tmp_path: Path
) -> None:
    model, wanted = make()
    expected = expected_of(model)
    assert np.abs(model.predict(X, verbose=0) - expected).max() > 0.02  # is traced with zeros
    states.apply(model, wanted)
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, atol=1e-6)
    assert [w.name for w in loaded.trainable_weights] == [w.name for w in model.trainable_weights]


def test_a_model_is_loaded_in_another_process_that_imports_the_module(tmp_path: Path) -> None:
    model, wanted = functional()
    states.apply(model, wanted)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", X)
    program = (
        "import keras, numpy as np\n"
        "try: keras.models.load_model('model.keras'); raise SystemExit('loaded')\n"
        "except TypeError: pass\n"
        "from trainer import states\n"
        "model = keras.models.load_model('model.keras')\n"
        "np.save('y.npy', model.predict(np.load('x.npy'), verbose=0))\n"
    )
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = forked.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected_of(model), atol=1e-6)


def test_a_subclass_starts_from_the_states() -> None:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.lower = layers.LSTM(UNITS, return_sequences=True)
            self.upper = layers.LSTM(UNITS)

        def call(self, inputs: tf.Tensor) -> tf.Tensor:
            return self.upper(self.lower(inputs))

    model = Model()
    model(X)
    states.apply(model, [STATE, OTHER])
    lower = model.lower(X, initial_state=rows(STATE))
    np.testing.assert_allclose(model(X), model.upper(lower, initial_state=rows(OTHER)), atol=1e-6)
    states.apply(model, OTHER, layers=model.upper.name)  # one of the two
    np.testing.assert_array_equal(model.lower.initial_h, STATE.h)


@pytest.mark.parametrize("trainable", [True, False, None])
@pytest.mark.parametrize("cls", [layers.LSTM, WarmLSTM])
def test_the_state_is_trained_if_that_is_asked_for(cls: type, trainable: bool | None) -> None:
    options = {"initial_state": "learned"} if cls is WarmLSTM else {}
    layer = cls(UNITS, **options)
    model = keras.Sequential([keras.Input((STEPS, WIDTH)), layer])
    states.apply(model, STATE, trainable=trainable)
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((10, UNITS)), verbose=0)
    is_trained = trainable or (trainable is None and cls is WarmLSTM)
    for variable, value in zip((layer.initial_h, layer.initial_c), STATE, strict=True):
        assert (np.abs(variable.numpy() - value).max() > 0) == is_trained


def test_apply_says_what_to_do_instead() -> None:
    model, wanted = functional()
    inputs = keras.Input((STEPS, WIDTH))
    _, *handed = layers.LSTM(UNITS, return_state=True)(inputs)
    told = layers.LSTM(UNITS, name="decoder")
    told(inputs, initial_state=handed)

    class Mine(layers.LSTM):
        pass

    of_rows = states.LearnedState(*np.zeros((2, 10, UNITS)))
    small = states.LearnedState(*np.zeros((2, 2)))
    for target, state, message in (
        (model, STATE, "1 states for 2 LSTMs .*layers="),
        (model, [STATE, small], r"takes h of shape \(5,\), but got \(2,\)$"),
        (layers.LSTM(UNITS), of_rows, r"got \(10, 5\); every row starts from one state"),
        (layers.LSTM(UNITS), [STATE.h], "a state is h and c"),
        (layers.LSTM(UNITS, stateful=True), STATE, "batch size is unknown"),
        (layers.GRU(UNITS), STATE, "GRU of GRUCell: only keras.layers.LSTM can"),
        (layers.RNN(layers.LSTMCell(UNITS)), STATE, "RNN of LSTMCell: only .*initial_state="),
        (Mine(UNITS), STATE, "of the class Mine.*derive that from"),
        (told, STATE, "decoder is called with initial_state"),
    ):
        with pytest.raises(ValueError, match=message):
            states.apply(target, state)
    with pytest.raises(ValueError, match=r"no LSTM \['other'\]"):
        states.apply(model, wanted, layers=["other"])
    stateful = layers.LSTM(UNITS, stateful=True)
    stateful(X)
    with pytest.raises(ValueError, match="trainable=True needs a layer that is not stateful"):
        states.apply(stateful, STATE, trainable=True)
    assert type(model.layers[1]) is layers.LSTM  # nothing was changed


def test_the_constructor_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="is not None, 'learned' or 'fixed'; tensors go to"):
        WarmLSTM(UNITS, initial_state="zero")
    with pytest.raises(ValueError, match=r"stateful layer .* reset_state\(states="):
        WarmLSTM(UNITS, initial_state="learned", stateful=True)


# ---- tune ----


@pytest.mark.parametrize(
    ("train", "of_lstm"),
    [("head", set()), ("state", {"initial_h", "initial_c"}), ("bias", {"bias"})],
)
def test_tuning_moves_the_head_and_what_is_named_and_nothing_else(
    train: str, of_lstm: set[str]
) -> None:
    model = keras.Sequential(
        [
            keras.Input((STEPS, WIDTH)),
            layers.Dense(WIDTH),
            layers.Bidirectional(layers.LSTM(UNITS, return_sequences=True)),
            layers.LSTM(UNITS, name="top"),
            layers.Dense(1, name="head"),
        ]
    )
    states.tune(model, train)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    before = [variable.numpy() for variable in model.variables]
    model.fit(X, np.ones((10, 1)), epochs=2, verbose=0)
    moved = [
        variable.path.split("/")
        for variable, held in zip(model.variables, before, strict=True)
        if (variable.numpy() != held).any()
    ]
    assert {path[-1] for path in moved if "head" in path} == {"kernel", "bias"}
    assert {path[-1] for path in moved if "head" not in path} == of_lstm
    assert len(moved) == 2 + 3 * len(of_lstm)
    # Adam has two moments of each, its count of steps and its learning rate.
    assert len(model.optimizer.variables) == 2 * len(moved) + 2


def test_what_cannot_be_tuned_is_refused() -> None:
    model = keras.Sequential([keras.Input((STEPS, WIDTH)), layers.Flatten(), layers.Dense(1)])
    with pytest.raises(ValueError, match="has no LSTM"):
        states.tune(model)
    with pytest.raises(ValueError, match="train='all' is not one of head, state"):
        states.tune(model, "all")
    stateful = keras.Sequential([keras.Input((STEPS, WIDTH), batch_size=2)])
    stateful.add(layers.LSTM(UNITS, stateful=True))
    with pytest.raises(ValueError, match="is stateful"):
        states.tune(stateful)
