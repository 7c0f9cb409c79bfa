import keras
import numpy as np
import tensorflow as tf

from trainer.models.encoder import ChronoBias, Encoder, Initial, dropout, dropped_weights


def test_chrono_bias_spreads_the_cells_memories() -> None:
    bias = ChronoBias(longest=50, seed=1)((4 * 1000,), "float32").numpy()
    inputs, forget, candidate, output = np.split(bias, 4)
    np.testing.assert_array_equal(inputs, -forget)
    assert not candidate.any() and not output.any()
    steps = np.exp(forget)
    assert 1 <= steps.min() < 2 and 49 < steps.max() <= 50
    assert abs(steps.mean() - 25.5) < 1.5
    np.testing.assert_array_equal(bias, ChronoBias(longest=50, seed=1)((4000,), "float32"))


def test_an_encoder_starts_with_it_and_is_a_function_of_its_seed() -> None:
    first, again, other = (
        Encoder(30, 4, 6, seed=s, initial=Initial(memory_steps=20)) for s in (1, 1, 2)
    )
    for encoder in (first, again, other):
        encoder.build()
    forget = first.lstms[0].cell.bias.numpy()[6:12]
    assert forget.min() >= 0 and forget.max() <= np.log(20)
    for a, b in zip(first.weights, again.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.embeddings.numpy() != other.embeddings.numpy()).any()


def test_config_round_trip() -> None:
    encoder = Encoder(30, 4, 6, seed=1, initial=Initial(20, 0.1), num_layers=2)
    again = Encoder.from_config(encoder.get_config())
    assert again.get_config() == encoder.get_config()
    bias = keras.initializers.deserialize(keras.initializers.serialize(ChronoBias(9, 2)))
    assert (bias.longest, bias.seed) == (9, 2)


def test_layers_differ_and_each_has_a_state_of_its_own() -> None:
    encoder = Encoder(30, 6, 6, seed=1, num_layers=3)
    encoder.build()
    assert [lstm.name for lstm in encoder.lstms] == ["lstm_0", "lstm_1", "lstm_2"]
    for first, second in zip(encoder.lstms, encoder.lstms[1:], strict=False):
        for a, b in zip(first.cell.weights, second.cell.weights, strict=True):
            assert (a.numpy() != b.numpy()).any()
    outputs, states = encoder(np.array([[5, 9, 2]]), np.array([3]))
    assert outputs.shape == (1, 3, 6) and len(states) == 3
    np.testing.assert_array_equal(states[-1][0], outputs[:, -1])  # the top layer's
    before = [h.numpy() for h, _ in states]
    encoder.initial_states[1][1].assign(np.ones(6))  # the middle layer's cell state
    _, states = encoder(np.array([[5, 9, 2]]), np.array([3]))
    changed = [bool((h.numpy() != b).any()) for (h, _), b in zip(states, before, strict=True)]
    assert changed == [False, True, True]


def test_dropout_between_layers_is_a_function_of_its_seed_and_of_the_layer() -> None:
    one, two = (Encoder(30, 4, 6, seed=1, num_layers=n) for n in (1, 2))
    for encoder in (one, two):
        encoder.build()
    tokens, mask = np.array([[5, 9, 2]]), np.ones((1, 3), bool)

    def read(encoder: Encoder, rate: float, seed: int) -> np.ndarray:
        embedded, start = encoder.embed(tokens), encoder.start(1)
        return encoder.read(embedded, mask, start, True, rate, tf.constant([seed, 0]))[0].numpy()

    np.testing.assert_array_equal(read(one, 0.5, 1), read(one, 0.0, 1))
    np.testing.assert_array_equal(read(two, 0.5, 1), read(two, 0.5, 1))
    assert (read(two, 0.5, 1) != read(two, 0.5, 2)).any()
    assert (read(two, 0.5, 1) != read(two, 0.0, 1)).any()


def test_words_are_read_as_their_embeddings_are() -> None:
    encoder = Encoder(9, 4, 6, seed=0, num_layers=2)
    encoder.build()
    tokens = tf.constant([[3, 5, 3, 8], [5, 5, 0, 0]])
    mask, start = tf.sequence_mask([4, 2], 4), encoder.start(2)
    words = encoder.words(tokens)
    assert words.rows.shape == (4, 4)
    found, expected = (
        tf.nest.flatten(encoder.read(read, mask, start, training=False))
        for read in (words, encoder.embed(tokens))
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_first_rows_are_dropped_alike_without_the_others() -> None:
    """As the label's terms read them in virtual adversarial training."""
    x = tf.ones((7, 5, 3))
    for rows in (0, 1, 4):
        for rate in (0.3, 0.5):
            first = dropout(x[:rows], rate, tf.constant([3, 4]))
            np.testing.assert_array_equal(first, dropout(x, rate, tf.constant([3, 4]))[:rows])


def test_no_dropout_is_the_same_tensor() -> None:
    x = np.ones(3)
    assert dropout(x, 0.0, None) is x


def test_normalised_embeddings_have_mean_0_and_variance_1_over_a_text() -> None:
    encoder = Encoder(6, 3, 4, seed=0, normalised=True)
    encoder.build()
    counts = np.array([0, 1, 4, 3, 0, 2])
    encoder.frequencies.assign(counts / counts.sum())
    encoder.embeddings.assign(np.random.default_rng(0).normal(3, 2, (6, 3)))
    text = np.repeat(np.arange(6), counts)[None]
    embedded = encoder.embed(text).numpy()[0]
    np.testing.assert_allclose(embedded.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(embedded.std(0), 1, rtol=1e-5)
    assert all(variable is not encoder.frequencies for variable in encoder.trainable_variables)


def test_weights_of_plain_embeddings_read_the_same_from_normalised_ones() -> None:
    plain, normalised = (Encoder(6, 3, 4, seed=0, normalised=how) for how in (False, True))
    for encoder in (plain, normalised):
        encoder.build()
        encoder.embeddings.assign(np.random.default_rng(0).normal(3, 2, (6, 3)))
    normalised.absorb_normalisation()
    tokens, lengths = np.array([[3, 5, 1, 2], [4, 2, 0, 0]]), np.array([4, 2])
    expected, found = (encoder(tokens, lengths)[0] for encoder in (plain, normalised))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_dropped_weights_are_the_same_for_all_that_is_read() -> None:
    encoder, by_hand = (Encoder(9, 3, 20, seed=0, num_layers=2) for _ in range(2))
    tokens, lengths = np.array([[3, 5, 1, 2], [4, 2, 0, 0]]), np.array([4, 2])
    for each in (encoder, by_hand):
        each.build()
    plain = encoder(tokens, lengths)[0]
    kernels = [lstm.cell.recurrent_kernel for lstm in encoder.lstms]

    def outputs(training: bool) -> tf.Tensor:
        embedded, mask = encoder.embed(tokens), tf.sequence_mask(lengths, 4)
        return encoder.read(embedded, mask, encoder.start(2), training)[0]

    with dropped_weights([encoder], 0.4, tf.constant([1, 2])):
        masks = [lstm.recurrent_mask.numpy() for lstm in encoder.lstms]
        with tf.GradientTape() as tape:
            first = outputs(training=True)
        gradients = tape.gradient(first, [kernel.value for kernel in kernels])
        np.testing.assert_array_equal(first, outputs(training=False))
    for mask, gradient, lstm in zip(masks, gradients, by_hand.lstms, strict=True):
        assert 0.3 < (mask == 0).mean() < 0.5
        np.testing.assert_allclose(mask[mask > 0], 1 / 0.6, rtol=2**-16 / 0.6)  # of 16 bits
        assert not gradient.numpy()[mask == 0].any() and gradient.numpy()[mask > 0].any()
        lstm.cell.recurrent_kernel.assign(lstm.cell.recurrent_kernel.numpy() * mask)
    assert (masks[0] != masks[1]).any()
    np.testing.assert_allclose(first, by_hand(tokens, lengths)[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(encoder(tokens, lengths)[0], plain)


def test_outputs_of_right_padded_rows_need_no_mask() -> None:
    encoder = Encoder(9, 3, 16, seed=0, num_layers=2)
    encoder.build()
    tokens, lengths = np.array([[3, 5, 1, 2], [4, 2, 0, 0]]), np.array([4, 2])
    found = encoder(tokens, lengths)[0].numpy()
    for lstm in encoder.lstms:
        lstm.right_padded = False
    np.testing.assert_array_equal(found, encoder(tokens, lengths)[0])
    np.testing.assert_array_equal(found[1, 2:], found[1, [1, 1]])
