import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.models.encoder import Encoder
from trainer.models.language_model import LanguageModel
from trainer.models.text_model import Noise

VOCAB_SIZE, DIM, UNITS = 30, 4, 6


@pytest.fixture(scope="module", params=[False, True], ids=["own", "tied"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    model = LanguageModel(Encoder(VOCAB_SIZE, DIM, UNITS, seed=1), tied=request.param)
    model.build()
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) * 0.5)
    return model


def documents(lengths: list[int], time: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(2).integers(3, VOCAB_SIZE, (len(lengths), time))
    tokens[np.arange(time) >= np.array(lengths)[:, None]] = 0
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": np.array(lengths, np.int32),
        "weights": np.ones(len(lengths), np.float32),
    }


def stock_loss(model: LanguageModel, document: np.ndarray, start: list | None = None) -> float:
    """The next-word loss through a stock Keras LSTM, word by word in NumPy after it."""
    encoder = model.encoder
    stock = keras.layers.LSTM(UNITS, return_sequences=True)
    stock.build((None, None, DIM))
    stock.set_weights(encoder.lstms[0].cell.get_weights())
    h, c = start or [part.numpy() for part in encoder.initial_states[0]]
    embedded = encoder.embeddings.numpy()[document][None]
    outputs = stock(embedded, initial_state=[h[None], c[None]]).numpy()[0]
    hidden = np.concatenate([h[None], outputs[:-1]])
    kernel = model.softmax_kernel.numpy()
    if model.tied:
        hidden, kernel = hidden @ kernel, encoder.embeddings.numpy()
    logits = (hidden @ kernel.T + model.softmax_bias.numpy()).astype(np.float64)
    normaliser = np.log(np.exp(logits).sum(1))
    return float((normaliser - logits[np.arange(len(document)), document]).sum())


def test_the_loss_is_that_of_each_next_word(model: LanguageModel) -> None:
    rows = documents([5, 1, 7, 3], time=9)
    total, count = model.loss_sum(rows, training=True)
    expected = sum(
        stock_loss(model, t[:n]) for t, n in zip(rows["tokens"], rows["lengths"], strict=True)
    )
    assert count == 16
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_a_text_in_carried_pieces_has_the_loss_of_the_whole(model: LanguageModel) -> None:
    rows = documents([11, 12, 9], time=12)
    whole, _ = model.loss_sum(rows, training=False)
    carried = tf.fill([3, model.carried_size], np.float32("nan"))  # not used where nothing carries
    total = 0.0
    for start, stop in ((0, 5), (5, 8), (8, 12)):
        piece = {
            "tokens": rows["tokens"][:, start:stop],
            "lengths": np.clip(rows["lengths"] - start, 1, stop - start),
            "weights": rows["weights"],
            "carried": carried,
            "carries": tf.fill([3], float(start > 0)),
        }
        loss, _, carried = model.loss_sum(piece, training=False)
        total += float(loss)
    assert total == pytest.approx(float(whole), rel=1e-5)
    _, [(h, c)] = model.encoder(rows["tokens"], rows["lengths"])
    np.testing.assert_allclose(carried, tf.concat([h, c], axis=1), rtol=1e-5, atol=1e-6)


def test_only_rows_that_carry_go_on_and_no_gradient_passes(model: LanguageModel) -> None:
    rows = documents([4, 4], time=4)
    carried = tf.constant(np.random.default_rng(3).normal(size=(2, 2 * UNITS)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(carried)
        more = {"carried": carried, "carries": tf.constant([1.0, 0.0])}
        loss, _, _ = model.loss_sum(rows | more, training=True)
    gradients = tape.gradient(loss, [carried, model.encoder.initial_states[0][0].value])
    assert gradients[0] is None and np.abs(gradients[1]).max() > 0
    h, c = np.split(carried.numpy()[0], 2)
    expected = stock_loss(model, rows["tokens"][0], [h, c])
    expected += stock_loss(model, rows["tokens"][1])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_every_weight_and_the_initial_state_get_a_gradient(model: LanguageModel) -> None:
    rows = documents([5, 3], time=5)
    seed = tf.constant([1, 2])
    noise = Noise(0.2, seed, seed + 1, 0.2, seed + 2, 0.1, seed + 3, num_sampled=8,
                  softmax_seed=seed + 4)  # fmt: skip
    for how in (Noise(), noise):
        with tf.GradientTape() as tape:
            total, _ = model.loss_sum(rows, training=True, noise=how)
        gradients = tape.gradient(total, [v.value for v in model.trainable_variables])
        assert len(gradients) == 8
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            assert np.abs(tf.convert_to_tensor(gradient)).max() > 0, variable.path


def test_padding_and_rows_of_no_weight_change_nothing(model: LanguageModel) -> None:
    rows = documents([5, 2], time=5)
    expected, count = model.loss_sum(rows, training=False)
    more = {
        "tokens": np.pad(rows["tokens"], [(0, 1), (0, 6)], constant_values=7),
        "lengths": np.append(rows["lengths"], 9),
        "weights": np.append(rows["weights"], np.float32(0)),
    }
    total, again = model.loss_sum(more, training=False)
    assert float(total) == pytest.approx(float(expected), rel=1e-6) and again == count == 7
