from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.states import ContextState

ROWS = 24
RANDOM = np.random.default_rng(0)
FORCES = RANDOM.normal(size=(ROWS, 7, 3)).astype("float32")
# The arguments, the context, and the shape and type of one row.
KINDS: dict[str, tuple[dict, np.ndarray, Any]] = {
    "names": ({"ids": ["ann", "bob", "cy"]}, np.array(["ann", "bob", "zoe"] * 8), ((), "string")),
    "numbers": ({"ids": 3}, np.array([0, 2, -1] * 8), ((), "int32")),
    "vector": ({"hidden_units": 5}, RANDOM.normal(size=(ROWS, 4)).astype("float32"), ((4,), None)),
    "observations": ({"burn_in": 3}, FORCES, ((7, 3), None)),
}


def batches(*inputs: np.ndarray) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((inputs,)).batch(8)


def from_context(kind: str, **settings: Any) -> keras.Model:
    """Returns a model of a stock LSTM that starts from context."""
    arguments, _, (shape, dtype) = KINDS[kind]
    forces, context = keras.Input((7, 3)), keras.Input(shape, dtype=dtype)
    state = ContextState(6, **arguments, **settings, name="state")(context)
    outputs = keras.layers.Dense(1)(keras.layers.LSTM(6)(forces, initial_state=state))
    return keras.Model([forces, context], outputs)


@pytest.mark.parametrize(
    "kind",
    [
        "names",
        pytest.param("numbers", marks=pytest.mark.slow("quick: names")),
        "vector",
        "observations",
    ],
)
def test_a_stock_lstm_starts_from_it_and_the_model_is_saved_with_it(
    kind: str, tmp_path: Path
) -> None:
    model, context = from_context(kind), KINDS[kind][1]
    model.compile(keras.optimizers.Adam(0.1), "mse")  # six steps that change the states clearly
    data = batches(FORCES, context)
    targets = tf.data.Dataset.from_tensor_slices(RANDOM.normal(size=(ROWS, 1))).batch(8)
    before = model.get_layer("state").get_weights()
    model.fit(tf.data.Dataset.zip(data.map(lambda x: x), targets), epochs=2, verbose=0)
    after = model.get_layer("state").get_weights()
    assert all(np.abs(a - b).max() > 0 for a, b in zip(after, before, strict=True))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(data, verbose=0), model.predict(data, verbose=0))
    h, c = model.get_layer("state")(context)
    lstm = model.layers[-2]
    outputs = model.layers[-1](lstm(FORCES, initial_state=[h, c]))
    np.testing.assert_allclose(model.predict(data, verbose=0), outputs, atol=1e-6)
    assert np.abs(outputs - model.layers[-1](lstm(FORCES))).max() > 1e-3


@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_an_unknown_id_has_the_mean_and_does_not_train_it(kind: str) -> None:
    arguments, context, _ = KINDS[kind]
    layer = ContextState(2, **arguments)
    layer(context)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4) ** 2
    layer.table.assign(rows)
    last = {"names": 1, "numbers": 2}[kind]
    expected = np.stack([rows[0], rows[last], rows.mean(axis=0)] * 8)
    np.testing.assert_allclose(np.concatenate(layer(context), axis=1), expected)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(context)[0])
    gradient = tf.convert_to_tensor(tape.gradient(total, layer.table.value)).numpy()
    np.testing.assert_array_equal(gradient[[0, last], :2], 8)
    assert not gradient[3 - last].any()


def test_only_the_first_observations_count() -> None:
    layer = ContextState(4, burn_in=3)
    changed = FORCES.copy()
    changed[:, 3:] = 9
    np.testing.assert_array_equal(layer(FORCES)[0], layer(changed)[0])
    changed[:, 2] = 9
    assert np.abs(layer(FORCES)[0] - layer(changed)[0]).max() > 1e-3


def test_noise_is_of_training_alone_and_has_its_size() -> None:
    layer, context = ContextState(400, ids=3, noise=0.5), KINDS["numbers"][1]
    np.testing.assert_array_equal(layer(context), np.zeros((2, ROWS, 400)))
    h, c = layer(context, training=True)
    for part in (h, c):
        assert np.std(part) == pytest.approx(0.5, rel=0.05)
    assert np.abs(h - c).max() > 0.1
    assert np.abs(h - layer(context, training=True)[0]).max() > 0.1
    again = ContextState(400, ids=3, noise=0.5)
    np.testing.assert_array_equal(again(context, training=True)[0], h)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give one of ids, hidden_units and burn_in"),
        ({"ids": 3, "burn_in": 2}, "give one of ids, hidden_units and burn_in"),
        ({"ids": ["a", "b", "a"]}, "ids are repeated"),
        ({"ids": []}, "ids=0 is less than 1"),
        ({"hidden_units": 0}, "hidden_units=0 is less than 1"),
        ({"ids": 3, "noise": -1}, "noise=-1 is negative"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ContextState(4, **arguments)
