import numpy as np
import pytest
import tensorflow as tf

from trainer import config
from trainer.models.classifier import (
    POOLED_VECTORS,
    Classifier,
    losses_and_errors,
    pooled,
    targets,
)
from trainer.models.encoder import Encoder

VOCAB_SIZE, DIM, UNITS = 30, 4, 6
TOKENS = np.array([[5, 9, 2, 0], [7, 7, 8, 2]], np.int32)
LENGTHS = np.array([3, 4], np.int32)


def make(
    num_classes: int = 2, with_reader: bool = False, pooling: str = "last", num_layers: int = 1
) -> Classifier:
    encoder, reader = (
        Encoder(VOCAB_SIZE, DIM, UNITS, seed=seed, num_layers=num_layers) for seed in (1, 9)
    )
    reader = reader if with_reader else None
    classifier = Classifier(encoder, num_classes, reader=reader, pooling=pooling)
    classifier.build()
    return classifier


def test_concat_pooling_reads_the_last_the_mean_and_the_maximum_of_the_outputs() -> None:
    classifier = make(pooling="concat")
    read = []
    for row, length in zip(TOKENS, LENGTHS, strict=True):
        words = row[None, :length]
        outputs, _ = classifier.encoder(words, np.array([length]))
        one = np.asarray(outputs)[0]
        read.append(np.concatenate([one[-1], one.mean(0), one.max(0)]))
    kernel, bias = classifier.hidden.kernel.numpy(), classifier.hidden.bias.numpy()
    hidden = np.maximum(np.stack(read) @ kernel + bias, 0)
    expected = hidden @ classifier.output_layer.kernel.numpy()
    found = classifier.logits(TOKENS, LENGTHS, training=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_linear_head_reads_the_mean_of_the_outputs_in_both_directions() -> None:
    encoders = [Encoder(VOCAB_SIZE, DIM, UNITS, seed=seed) for seed in (1, 9)]
    backward = Classifier(encoders[1], 2, hidden_units=0, pooling="mean")
    both = Classifier(encoders[0], 2, hidden_units=0, pooling="mean", backward=backward)
    both.build()
    expected, means = np.zeros((2, 1)), [[], []]
    for row, (tokens, length) in enumerate(zip(TOKENS, LENGTHS, strict=True)):
        end = length - 1
        words = [tokens[:length], [*tokens[:end][::-1], tokens[end]]]
        for number, direction in enumerate(both.directions()):
            outputs, _ = direction.encoder(np.array([words[number]], np.int32), LENGTHS[row][None])
            means[number].append(np.asarray(outputs)[0].mean(0))
            expected[row] += means[number][-1] @ direction.output_layer.kernel.numpy() / 2
    found = both.logits(TOKENS, LENGTHS, training=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(both.head_inputs(TOKENS, LENGTHS), means, rtol=1e-5)


def test_every_pooling_has_a_flag() -> None:
    assert tuple(POOLED_VECTORS) == config.POOLINGS


def test_the_initial_state_matters_and_is_trained() -> None:
    classifier = make()
    before = classifier.logits(TOKENS, LENGTHS, training=False)
    h, c = classifier.encoder.initial_states[0]
    c.assign(np.ones(UNITS))
    with tf.GradientTape() as tape:
        after = classifier.logits(TOKENS, LENGTHS, training=True)
    assert np.abs(after - before).max() > 1e-4
    gradient = tape.gradient(after, h.value)
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_reader_sets_the_state_and_is_not_trained(num_layers: int) -> None:
    classifier = make(with_reader=True, num_layers=num_layers)
    _, read = classifier.reader(TOKENS, LENGTHS)
    mask = tf.sequence_mask(LENGTHS, 4)
    embedded = classifier.encoder.embed(TOKENS)
    outputs, states = classifier.encoder.read(embedded, mask, read, training=False)
    np.testing.assert_array_equal(states[-1][0][1], outputs[1, -1])
    expected = classifier.output_layer(classifier.hidden(states[-1][0]))
    with tf.GradientTape() as tape:
        logits = classifier.logits(TOKENS, LENGTHS, training=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    reader = [v.value for v in classifier.reader.variables]
    assert classifier.reader.trainable_variables == []
    assert all(gradient is None for gradient in tape.gradient(logits, reader))


@pytest.mark.parametrize("with_reader", [False, True])
def test_two_directions_average_their_logits(with_reader: bool) -> None:
    forward, backward = make(with_reader=with_reader), make(with_reader=with_reader)
    for variable in backward.weights:
        variable.assign(np.random.default_rng(3).normal(size=variable.shape))
    both = Classifier(forward.encoder, 2, reader=forward.reader, backward=backward)
    both.build()
    for ours, theirs in zip(
        (both.hidden, both.output_layer), (forward.hidden, forward.output_layer), strict=True
    ):
        ours.set_weights(theirs.get_weights())
    reverse = np.array([[9, 5, 2, 0], [8, 7, 7, 2]], np.int32)  # of TOKENS, the end token last
    expected = forward.logits(TOKENS, LENGTHS, training=False)
    expected += backward.logits(reverse, LENGTHS, training=False)
    found = both.logits(TOKENS, LENGTHS, training=False)
    np.testing.assert_allclose(found, expected / 2, rtol=1e-5)
    embedded = both.embed(TOKENS, LENGTHS, 0.5, tf.constant([1, 2]))
    start = both.start(TOKENS, LENGTHS)
    dropped = both.read(embedded, LENGTHS, start, True, 0.5, tf.constant([3, 4]))
    assert np.abs(dropped - found).max() > 1e-3


def test_contexts_add_to_the_initial_state() -> None:
    backward, forward = (
        Classifier(Encoder(VOCAB_SIZE, DIM, UNITS, seed, num_layers=2), 2, num_contexts=3)
        for seed in (1, 2)
    )
    forward.backward = backward
    forward.build()
    random = np.random.default_rng(3)
    for variable in forward.weights:
        variable.assign(random.normal(size=variable.shape))
    contexts = np.array([2, -1], np.int32)
    for direction, start in zip(
        (forward, backward), forward.start(TOKENS, LENGTHS, contexts), strict=True
    ):
        plain = direction.encoder.start(2)
        for layer, table in enumerate(direction.contexts):
            rows = table.table.numpy()
            added = np.stack([rows[2], rows.mean(axis=0)])  # an unknown one has the mean
            for part, before, more in zip(
                start[layer], plain[layer], np.split(added, 2, 1), strict=True
            ):
                np.testing.assert_allclose(part, before + more, rtol=1e-5)
    found = forward.logits(TOKENS, LENGTHS, training=False, contexts=contexts)
    start = forward.start(TOKENS, LENGTHS, contexts)
    expected = forward.read(forward.words(TOKENS, LENGTHS), LENGTHS, start, training=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    unknown = forward.logits(TOKENS, LENGTHS, training=False)
    assert np.abs(found - unknown)[0].max() > 1e-3
    np.testing.assert_allclose(found[1], unknown[1], rtol=1e-5)


def test_losses_and_errors_of_two_classes() -> None:
    logits = tf.constant([[2.0], [-1.0], [0.5]])
    losses, errors = losses_and_errors(logits, tf.constant([1, 1, 0]))
    expected = np.log1p(np.exp([-2.0, 1.0, 0.5]))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert errors.numpy().tolist() == [0, 1, 1]


def test_losses_and_errors_of_more_classes() -> None:
    classifier = make(num_classes=3)
    logits = classifier.logits(TOKENS, LENGTHS, training=False)
    assert logits.shape == (2, 3)
    predicted = np.argmax(logits, 1)
    losses, errors = losses_and_errors(logits, tf.constant(predicted, tf.int32))
    assert errors.numpy().tolist() == [0, 0]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(losses, -np.log(probabilities.max(1)), rtol=1e-5)


def test_losses_and_errors_of_sets() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(5, 3)).astype(np.float32)
    sets, labels = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 1]], np.uint8), np.array([1, 0, 2, 2, 1])
    truth = targets(tf.constant(labels, tf.int32), sets)
    np.testing.assert_array_equal(truth, sets[labels])
    assert targets(tf.constant(labels), None).numpy().tolist() == labels.tolist()
    weights = np.array([2.0, 1.0, 0.5], np.float32)
    losses, errors = losses_and_errors(tf.constant(logits), truth, 0.1, weights)
    p, y = 1 / (1 + np.exp(-logits)), sets[labels] * 0.9 + 0.05
    expected = -(weights * y * np.log(p) + (1 - y) * np.log(1 - p)).sum(axis=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(errors, ((logits > 0) != sets[labels]).any(axis=1))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_label_smoothing_spreads_a_part_of_the_label(num_classes: int) -> None:
    logits = np.random.default_rng(0).normal(size=(5, num_classes)).astype(np.float32)
    labels = np.array([0, 1, 1, 0, num_classes - 1], np.int32)
    truth = np.eye(num_classes)[labels] * 0.8 + 0.2 / num_classes
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    # Of two classes the model gives the difference only.
    given = logits[:, 1:] - logits[:, :1] if num_classes == 2 else logits
    losses, errors = losses_and_errors(tf.constant(given), labels, smoothing=0.2)
    np.testing.assert_allclose(losses, -(truth * log_probabilities).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(errors, logits.argmax(1) != labels)


@pytest.mark.parametrize("with_reader", [False, True])
def test_weights_are_a_function_of_the_seed(with_reader: bool) -> None:
    first, second = make(with_reader=with_reader), make(with_reader=with_reader)
    for a, b in zip(first.weights, second.weights, strict=True):
        assert (a.numpy() == b.numpy()).all()


def test_the_gradient_of_pooling_is_tensorflow_s() -> None:
    outputs = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    outputs[1, 3] = outputs[1, 2]  # the largest is there twice
    outputs[2, 2:] = 9  # masked
    mask = np.arange(5) < np.array([[5], [4], [2]])
    weights = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
    last = tf.constant(outputs[:, -1])
    found = tf.Variable(outputs)
    with tf.GradientTape(persistent=True) as tape:
        ours = pooled("concat", found, last, tf.constant(mask))
        shown = tf.where(mask[:, :, None], found, 0.0)
        mean = tf.reduce_sum(shown, 1) / mask.sum(1, keepdims=True).astype(np.float32)
        largest = tf.reduce_max(tf.where(mask[:, :, None], found, -1e9), 1)
        theirs = tf.concat([last, mean, largest], 1)
        sums = [tf.reduce_sum(each * weights) for each in (ours, theirs)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    one, other = (tape.gradient(total, found) for total in sums)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
