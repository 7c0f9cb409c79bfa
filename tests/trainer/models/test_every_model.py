"""What every layer and model must do. A new one joins by one entry in SUBJECTS."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.distribution.cluster import Cluster
from trainer.distribution.make import make_distributor
from trainer.distribution.over_batches import local_rows
from trainer.models.bag_autoencoder import BagAutoencoder
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.models.language_model import LanguageModel
from trainer.models.lstm import WarmLSTM
from trainer.models.sequence_autoencoder import SequenceAutoencoder
from trainer.models.text_model import TextModel

VOCAB_SIZE, DIM, UNITS = 30, 4, 6
LENGTHS = np.array([3, 6, 1, 5], np.int32)
TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, (4, 6)).astype(np.int32)
TOKENS[np.arange(6) >= LENGTHS[:, None]] = 0
TABLE = np.random.default_rng(1).normal(size=(VOCAB_SIZE, DIM))


@dataclass(frozen=True)
class Subject:
    """A layer or a model.

    Attributes:
      make: returns a new one that computes in float32, float64 or mixed_bfloat16.
      by_row: (model, tokens, lengths) -> what it computes of each row, float [batch, anything].
      total: (model, tokens, lengths) -> a scalar that depends on all of it and is a sum over rows;
        None sums up the sines of what `by_row` gives.
      empty_rows: whether a row may have no tokens.
      has_config: whether `from_config` makes it again.
    """

    make: Callable[[str], keras.layers.Layer]
    by_row: Callable[[Any, tf.Tensor, tf.Tensor], tf.Tensor]
    total: Callable[[Any, tf.Tensor, tf.Tensor], tf.Tensor] | None = None
    empty_rows: bool = True
    has_config: bool = True


def lstm(**options: Any) -> Subject:
    def of_rows(layer: WarmLSTM, tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        inputs = tf.gather(tf.cast(TABLE, layer.compute_dtype), tokens)
        mask = tf.sequence_mask(lengths, tf.shape(tokens)[1])
        outputs, h, c = layer(inputs, mask=mask)
        if layer.return_sequences:
            return side_by_side(outputs, mask, [[h, c]])
        return tf.concat([outputs, h, c], axis=1)

    return Subject(
        lambda dtype: WarmLSTM(UNITS, return_state=True, dtype=dtype, **options), of_rows
    )


def side_by_side(outputs: tf.Tensor, mask: tf.Tensor, states: list) -> tf.Tensor:
    """Returns for each row the outputs of its tokens, weighted by their place, and its states."""
    places = tf.cast(tf.cumsum(tf.cast(mask, tf.int32), axis=1), outputs.dtype)
    weights = tf.where(mask, places, tf.zeros_like(places))
    return tf.concat([tf.einsum("btu,bt->bu", outputs, weights), *tf.nest.flatten(states)], axis=1)


def encoder(**options: Any) -> Subject:
    def of_rows(encoder: Encoder, tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        outputs, states = encoder(tokens, lengths)
        return side_by_side(outputs, tf.sequence_mask(lengths, tf.shape(tokens)[1]), states)

    return Subject(lambda dtype: make_encoder(dtype, **options), of_rows)


def make_encoder(dtype: str, **options: Any) -> Encoder:
    return Encoder(VOCAB_SIZE, DIM, UNITS, seed=1, precision=dtype, **options)


def text_model(cls: type[TextModel], tied: bool = False, **options: Any) -> Subject:
    def of_rows(model: TextModel, tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        # The loss of one row, the others weighing nothing.
        losses = tf.map_fn(
            lambda weights: model.loss_sum(
                {"tokens": tokens, "lengths": lengths, "weights": weights}, training=True
            )[0],
            tf.eye(tf.shape(tokens)[0]),
            fn_output_signature=model.softmax_bias.dtype,
        )
        return losses[:, None]

    def total(model: TextModel, tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        weights = tf.ones(tf.shape(tokens)[:1])
        rows = {"tokens": tokens, "lengths": lengths, "weights": weights}
        return model.loss_sum(rows, training=True)[0]

    def make(dtype: str) -> TextModel:
        return cls(make_encoder(dtype, **options), tied=tied)

    return Subject(make, of_rows, total, has_config=False)


def classifier(
    num_layers: int = 1, reads_first: bool = False, both_ways: bool = False, **options: Any
) -> Subject:
    def make(dtype: str) -> Classifier:
        encoders = [make_encoder(dtype, num_layers=num_layers) for _ in range(3)]
        backward = Classifier(encoders[1], 3, **options) if both_ways else None
        reader = encoders[2] if reads_first else None
        return Classifier(encoders[0], 3, reader=reader, backward=backward, **options)

    return Subject(
        make,
        lambda model, tokens, lengths: model.logits(tokens, lengths, training=True),
        empty_rows=options.get("pooling", "last") == "last",  # not the mean of no outputs
        has_config=False,
    )


SUBJECTS = {
    "WarmLSTM": lstm(),
    "WarmLSTM sequences": lstm(return_sequences=True),
    "WarmLSTM backwards": lstm(go_backwards=True),
    "WarmLSTM zeros for masked": lstm(return_sequences=True, zero_output_for_mask=True),
    "WarmLSTM learned state": lstm(initial_state="learned"),
    "Encoder": encoder(),
    "Encoder of 2 layers": encoder(num_layers=2),
    "Encoder with normalised embeddings": encoder(normalised=True),
    "SequenceAutoencoder": text_model(SequenceAutoencoder),
    "SequenceAutoencoder of 2 layers, tied": text_model(
        SequenceAutoencoder, tied=True, num_layers=2
    ),
    "LanguageModel": text_model(LanguageModel),
    "BagAutoencoder": text_model(BagAutoencoder),
    "BagAutoencoder of 2 layers, tied": text_model(BagAutoencoder, tied=True, num_layers=2),
    "Classifier": classifier(),
    "Classifier of 2 layers, concat": classifier(2, pooling="concat"),
    "Classifier, linear in the mean": classifier(pooling="mean", hidden_units=0),
    "Classifier that reads first": classifier(reads_first=True),
    "Classifier of both directions": classifier(both_ways=True),
}

every = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
SLOW = pytest.mark.slow("variants of a layer or a model on two shards; quick: it without options")
VARIANTS = [name for name in SUBJECTS if name.startswith("WarmLSTM ") or " of 2 layers" in name]
every_but_variants = pytest.mark.parametrize(
    "subject",
    [
        pytest.param(subject, id=name, marks=SLOW if name in VARIANTS else ())
        for name, subject in SUBJECTS.items()
    ],
)


@contextlib.contextmanager
def policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def made(subject: Subject, dtype: str = "float32") -> keras.layers.Layer:
    """Returns a new one; no bias or initial state that is trained is left at zeros."""
    with policy("float64" if dtype == "float64" else "float32"):
        model = subject.make(dtype)
        model.build((None, None, DIM))
    random = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) * 0.5)
    return model


def rows_of(
    subject: Subject, model: Any, tokens: np.ndarray = TOKENS, lengths: np.ndarray = LENGTHS
) -> np.ndarray:
    found = subject.by_row(model, tf.constant(tokens), tf.constant(lengths))
    return tf.cast(found, tf.float64).numpy()


def total_of(subject: Subject, model: Any, tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    if subject.total is not None:
        return subject.total(model, tokens, lengths)
    return tf.reduce_sum(tf.sin(subject.by_row(model, tokens, lengths)))


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Checks that no number differs by more than `tolerance` of its row's largest."""
    assert found.shape == expected.shape and np.isfinite(expected).all()
    worst = np.max(np.abs(found - expected) / np.max(np.abs(expected), axis=1, keepdims=True))
    assert worst <= tolerance, worst


# Of a batch of another size or width the same products may be added up in another order, so the
# bits may differ: by 3e-6 in float32, where that once hid behind a bound of 1e-5, and by this in
# float64, which leaves room for rounding and for no leak.
ROUNDING = 1e-14


@every
def test_padding_changes_nothing(subject: Subject) -> None:
    model = made(subject, "float64")
    wider = np.pad(TOKENS, [(0, 0), (0, 3)], constant_values=7)
    found = rows_of(subject, model, wider)
    assert_close(found, rows_of(subject, model), ROUNDING)


@every
def test_a_row_does_not_depend_on_the_others(subject: Subject) -> None:
    model = made(subject, "float64")
    expected = rows_of(subject, model)
    some = [2, 1]
    assert_close(rows_of(subject, model, TOKENS[some], LENGTHS[some]), expected[some], ROUNDING)
    alone = rows_of(subject, model, TOKENS[:1], LENGTHS[:1])
    assert_close(alone, expected[:1], ROUNDING)


@every
def test_an_empty_row_is_finite_and_disturbs_no_other(subject: Subject) -> None:
    if not subject.empty_rows:
        pytest.skip("a row must have a token: every document ends with the end token")
    model = made(subject, "float64")
    found = rows_of(subject, model, TOKENS, np.array([3, 0, 1, 5], np.int32))
    assert np.isfinite(found).all()
    others = [0, 2, 3]
    assert_close(found[others], rows_of(subject, model)[others], ROUNDING)


@every
def test_from_config_makes_the_same_again(subject: Subject) -> None:
    if not subject.has_config:
        pytest.skip("is made of others, and saved in bundles")
    model = made(subject)
    again = type(model).from_config(model.get_config())
    again.build((None, None, DIM))
    again.set_weights(model.get_weights())
    assert again.get_config() == model.get_config()
    np.testing.assert_array_equal(rows_of(subject, again), rows_of(subject, model))


@pytest.mark.bfloat16
@every
def test_mixed_precision_is_close_and_keeps_float32_weights(subject: Subject) -> None:
    exact, mixed = made(subject), made(subject, "mixed_bfloat16")
    assert {v.dtype for v in mixed.weights} == {"float32"}
    found, expected = rows_of(subject, mixed), rows_of(subject, exact)
    assert_close(found, expected, 0.05)
    assert (found != expected).any()


@every
def test_gradients_equal_numerical_ones(subject: Subject) -> None:
    """Along one random direction through all weights, in float64."""
    model = made(subject, "float64")
    variables = model.trainable_variables
    assert variables and {v.dtype for v in variables} == {"float64"}
    random = np.random.default_rng(3)
    values = [v.numpy() for v in variables]
    direction = [random.normal(size=v.shape) for v in variables]

    def loss() -> tf.Tensor:
        return total_of(subject, model, tf.constant(TOKENS), tf.constant(LENGTHS))

    def at(distance: float) -> float:
        for variable, value, along in zip(variables, values, direction, strict=True):
            variable.assign(value + distance * along)
        return float(loss())

    with tf.GradientTape() as tape:
        total = loss()
    gradients = gradients_of(tape, total, variables)
    exact = sum(
        float(tf.reduce_sum(gradient * along))
        for gradient, along in zip(gradients, direction, strict=True)
    )
    step = 1e-4  # Richardson's extrapolation: the error is of the fourth order
    slopes = [(at(s) - at(-s)) / (2 * s) for s in (step, 2 * step)]
    numeric = (4 * slopes[0] - slopes[1]) / 3
    assert exact == pytest.approx(numeric, rel=1e-7)
    assert abs(exact) > 1e-2


@every_but_variants
def test_two_shards_compute_what_one_device_does(subject: Subject, two_shards: Any) -> None:
    one = make_distributor("one_device", Cluster(0, 1), 10)
    batch = {
        "tokens": tf.constant(TOKENS),
        "lengths": tf.constant(LENGTHS),
        "labels": tf.zeros(4, tf.int32),
        "weights": tf.ones(4),
        "row_starts": tf.constant([0, 1, 4]),
    }
    found = []
    for distributor in (one, two_shards):
        with distributor.scope():
            model = made(subject, "float64")

        def step(distributor: Any = distributor, model: Any = model) -> list[tf.Tensor]:
            rows = local_rows(distributor, batch)
            return distributor.all_reduce_sum(sum_and_gradients(subject, model, rows))

        found.append(tf.function(lambda run=distributor.run, step=step: run(step))())
    for one_device, mirrored in zip(*found, strict=True):
        np.testing.assert_allclose(mirrored, one_device, rtol=1e-10, atol=1e-12)


def sum_and_gradients(subject: Subject, model: Any, rows: dict) -> list[tf.Tensor]:
    with tf.GradientTape() as tape:
        total = total_of(subject, model, rows["tokens"], rows["lengths"])
    return [total, *gradients_of(tape, total, model.trainable_variables)]


def gradients_of(tape: tf.GradientTape, total: tf.Tensor, variables: list) -> list[tf.Tensor]:
    """Returns all gradients, zeros of what has no part in `total` (of a state that is not used)."""
    sources = [v.value for v in variables]
    gradients = tape.gradient(total, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [tf.convert_to_tensor(gradient) for gradient in gradients]
