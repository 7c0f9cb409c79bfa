import keras
import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.reserved_ids import END_ID
from trainer.models.encoder import Encoder
from trainer.models.sequence_autoencoder import SequenceAutoencoder, same_rows
from trainer.models.text_model import Noise, drop_words, kept_words

VOCAB_SIZE, DIM, UNITS = 30, 4, 6


@pytest.fixture(scope="module")
def model() -> SequenceAutoencoder:
    model = SequenceAutoencoder(Encoder(VOCAB_SIZE, DIM, UNITS, seed=1))
    model.build()
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) * 0.5)
    return model


def documents(lengths: list[int], time: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(2).integers(3, VOCAB_SIZE, (len(lengths), time))
    tokens[np.arange(time) >= np.array(lengths)[:, None]] = 0
    return tokens.astype(np.int32), np.array(lengths, np.int32)


def rows_of(*parts) -> dict[str, tf.Tensor]:
    return dict(zip(("tokens", "lengths", "weights"), map(tf.constant, parts), strict=True))


def loss(model: SequenceAutoencoder, tokens, lengths, weights=None) -> tuple[float, float]:
    weights = np.ones(len(tokens), np.float32) if weights is None else weights
    total, count = model.loss_sum(rows_of(tokens, lengths, weights), training=True)
    return float(total), float(count)


def paper_loss(model: SequenceAutoencoder, document: np.ndarray) -> float:
    """One sequence of 2n - 1 inputs through a stock Keras LSTM, the loss on the last n outputs."""
    encoder = model.encoder
    stock = keras.layers.LSTM(UNITS, return_sequences=True)
    stock.build((None, None, DIM))
    stock.set_weights(encoder.lstms[0].cell.get_weights())
    inputs = np.concatenate([document, document[:-1]])
    start = [part.value[None] for part in encoder.initial_states[0]]
    outputs = stock(tf.gather(encoder.embeddings.value, inputs)[None], initial_state=start)
    written = outputs[0, len(document) - 1 :]
    logits = written @ tf.transpose(model.softmax_kernel.value) + model.softmax_bias.value
    return float(tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(document, logits)))


def test_two_passes_are_the_papers_one_sequence(model: SequenceAutoencoder) -> None:
    tokens, lengths = documents([5, 1, 7, 3], time=9)
    total, count = loss(model, tokens, lengths)
    expected = sum(paper_loss(model, t[:n]) for t, n in zip(tokens, lengths, strict=True))
    assert count == 16
    assert total == pytest.approx(expected, rel=1e-5)


def test_padding_and_rows_of_no_weight_change_nothing(model: SequenceAutoencoder) -> None:
    tokens, lengths = documents([5, 2], time=5)
    expected = loss(model, tokens, lengths)
    wider = np.pad(tokens, [(0, 0), (0, 6)])
    assert loss(model, wider, lengths) == pytest.approx(expected, rel=1e-6)
    more = np.concatenate([wider, np.full_like(wider[:1], 7)])
    weights = np.array([1, 1, 0], np.float32)
    assert loss(model, more, np.append(lengths, 9), weights) == pytest.approx(expected, rel=1e-6)


def test_a_document_is_read_before_it_is_written(model: SequenceAutoencoder) -> None:
    # The first written token depends on the last read one: the state is handed over.
    tokens, _lengths = documents([4], time=4)
    mask = tf.ones([1, 4], bool)
    embedded = model.encoder.embed(tokens)
    first = model.predicting_outputs(embedded, embedded, mask, training=False)
    tokens[0, 3] = 3 if tokens[0, 3] != 3 else 4
    embedded = model.encoder.embed(tokens)
    other = model.predicting_outputs(embedded, embedded, mask, training=False)
    assert np.abs(first[0, 0] - other[0, 0]).max() > 1e-3


def test_every_weight_and_the_initial_state_get_a_gradient(model: SequenceAutoencoder) -> None:
    tokens, lengths = documents([5, 3], time=5)
    with tf.GradientTape() as tape:
        total, _ = model.loss_sum(rows_of(tokens, lengths, np.ones(2, np.float32)), training=True)
    gradients = tape.gradient(total, [v.value for v in model.trainable_variables])
    assert len(gradients) == 8
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        assert np.abs(tf.convert_to_tensor(gradient)).max() > 0, variable.path


@pytest.mark.parametrize("num_layers", [2, 3])
def test_a_stack_is_the_papers_one_sequence_too(num_layers: int) -> None:
    model = SequenceAutoencoder(Encoder(VOCAB_SIZE, DIM, UNITS, seed=1, num_layers=num_layers))
    model.build()
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) * 0.5)
    tokens, lengths = documents([4], time=4)
    encoder = model.encoder
    inputs = np.concatenate([tokens[0], tokens[0, :-1]])
    outputs = tf.gather(encoder.embeddings.value, inputs)[None]
    for lstm, state in zip(encoder.lstms, encoder.initial_states, strict=True):
        stock = keras.layers.LSTM(UNITS, return_sequences=True)
        stock.build((None, None, outputs.shape[-1]))
        stock.set_weights(lstm.cell.get_weights())
        outputs = stock(outputs, initial_state=[part.value[None] for part in state])
    written = outputs[0, 3:]
    logits = written @ tf.transpose(model.softmax_kernel.value) + model.softmax_bias.value
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tokens[0], logits)
    assert loss(model, tokens, lengths)[0] == pytest.approx(float(sum(losses)), rel=1e-5)


def test_dropout_is_a_function_of_its_seed(model: SequenceAutoencoder) -> None:
    tokens, lengths = documents([5, 3], time=5)

    def with_seed(number: int) -> float:
        seed = tf.constant([number, 1])
        weights = np.ones(2, np.float32)
        noise = Noise(dropout_rate=0.5, embedding_seed=seed, output_seed=seed + 7)
        rows = rows_of(tokens, lengths, weights)
        return float(model.loss_sum(rows, training=True, noise=noise)[0])

    assert with_seed(1) == with_seed(1) != with_seed(2)


def test_word_dropout_hides_words_from_the_decoder_alone(model: SequenceAutoencoder) -> None:
    tokens, lengths = documents([5, 3], time=5)
    weights = np.ones(2, np.float32)

    def with_rate(rate: float) -> float:
        noise = Noise(word_dropout_rate=rate, word_seed=tf.constant([1, 2]))
        rows = rows_of(tokens, lengths, weights)
        return float(model.loss_sum(rows, training=True, noise=noise)[0])

    assert with_rate(0.0) == loss(model, tokens, lengths)[0]
    assert with_rate(0.5) != with_rate(0.0) != with_rate(1.0)
    # With no word left to see, only the state tells the decoder what to write.
    encoder, mask = model.encoder, tf.ones([1, 4], bool)
    embedded = encoder.embed(tokens[:1, :4])
    hidden = drop_words(embedded, 1.0, tf.constant([1, 2]))
    assert not hidden.numpy().any()
    outputs = model.predicting_outputs(embedded, hidden, mask, training=False)
    _, states = encoder.read(embedded, mask, encoder.start(1), training=False)
    expected, _ = encoder.read(hidden[:, 1:], mask[:, 1:], states, training=False)
    np.testing.assert_allclose(outputs[:, 1:], expected, rtol=1e-6)


def test_frequent_words_are_left_out_more_often() -> None:
    tokens = tf.tile(tf.constant([[3], [30], [300], [999]]), [1, 4000])
    kept = kept_words(tokens, 1000, 1e-3, tf.constant([1, 2]))
    shares = tf.reduce_mean(tf.cast(kept, tf.float32), axis=1).numpy()
    frequency = np.log((np.array([3, 30, 300, 999]) + 2) / (np.array([3, 30, 300, 999]) + 1))
    ratio = 1e-3 / (frequency / np.log(1001))
    np.testing.assert_allclose(shares, np.minimum(1, np.sqrt(ratio) + ratio), atol=0.03)
    assert shares[0] < shares[1] < shares[2] == shares[3] == 1


def test_words_that_are_left_out_do_not_count() -> None:
    model = SequenceAutoencoder(Encoder(50, 4, 5, seed=0))
    model.build()
    tokens, lengths = tf.fill([3, 8], 4), tf.constant([8, 5, 1])
    arguments = {"tokens": tokens, "lengths": lengths, "weights": tf.ones([3])}
    whole, all_tokens = model.loss_sum(arguments, training=True)
    seed = tf.constant([1, 2])
    loss, counted = model.loss_sum(
        arguments, training=True, noise=Noise(subsampling=1e-2, subsampling_seed=seed)
    )
    kept = kept_words(tokens, 50, 1e-2, seed).numpy() & (np.arange(8) < lengths.numpy()[:, None])
    assert counted == kept.sum() and all_tokens == 14 and loss < whole


def test_rows_are_written_greedily_up_to_their_end() -> None:
    encoder = Encoder(12, 4, 6, seed=3, num_layers=2)
    model = SequenceAutoencoder(encoder, tied=True)
    model.build()
    random = np.random.default_rng(11)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    tokens = random.integers(3, 12, (24, 5)).astype(np.int32)
    lengths = random.integers(1, 6, 24).astype(np.int32)
    tokens[np.arange(5) >= lengths[:, None]] = 0
    rewrite = tf.function(lambda *rows: model.reconstruct(*rows, max_tokens=7))
    written, written_lengths = (x.numpy() for x in rewrite(tokens, lengths))
    assert written.shape == (24, 7)
    for row, length, found, count in zip(tokens, lengths, written, written_lengths, strict=True):
        _, state = encoder(row[None, :length], [length])
        expected: list[int] = []
        while len(expected) < 7 and END_ID not in expected:
            scores = model.logits(state[-1][0]).numpy()[0]
            expected.append(int(np.argmax(scores[1:])) + 1)  # never padding
            embedded = encoder.embed(tf.constant([expected[-1:]]))
            _, state = encoder.read(embedded, tf.ones([1, 1], bool), state, training=False)
        assert found.tolist() == expected + [0] * (7 - len(expected))
        assert count == len(expected)
    assert {END_ID in row for row in written.tolist()} == {True, False}


def test_rows_are_the_same_whatever_their_padding() -> None:
    first = tf.constant([[3, 4, 2], [3, 2, 0], [3, 4, 5]])
    second = tf.constant([[3, 4, 2, 0], [3, 2, 2, 0], [3, 4, 5, 2]])
    assert same_rows(first, second).numpy().tolist() == [True, False, False]
    assert same_rows(second, first).numpy().tolist() == [True, False, False]
