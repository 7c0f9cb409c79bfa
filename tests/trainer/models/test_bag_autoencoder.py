import numpy as np
import pytest
import tensorflow as tf

from trainer.models.bag_autoencoder import BagAutoencoder
from trainer.models.encoder import Encoder
from trainer.models.language_model import LanguageModel

VOCAB_SIZE, DIM, UNITS = 30, 4, 6


@pytest.fixture(scope="module")
def model() -> BagAutoencoder:
    model = BagAutoencoder(Encoder(VOCAB_SIZE, DIM, UNITS, seed=1), tied=True, bag_weight=3.0)
    model.build()
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) * 0.5)
    return model


TOKENS = np.random.default_rng(2).integers(3, VOCAB_SIZE, (3, 8)).astype(np.int32)
LENGTHS = np.array([8, 1, 5], np.int32)
TOKENS[np.arange(8) >= LENGTHS[:, None]] = 0


def test_the_loss_is_the_language_models_and_the_bags_error_a_token(model: BagAutoencoder) -> None:
    rows = {"tokens": TOKENS, "lengths": LENGTHS, "weights": np.array([1, 1, 0], np.float32)}
    language_model = LanguageModel(model.encoder, tied=True)
    language_model.build()
    language_model.softmax_kernel.assign(model.softmax_kernel)
    language_model.softmax_bias.assign(model.softmax_bias)
    nats, count = language_model.loss_sum(rows, training=True)
    outputs, _ = model.encoder(TOKENS, LENGTHS)
    errors = []
    for row, length in enumerate(LENGTHS):
        mean = outputs[row, :length].numpy().mean(0)
        rebuilt = model.encoder.embeddings.numpy() @ (mean @ model.bag_kernel.numpy())
        vector = np.zeros(VOCAB_SIZE)
        words, counts = np.unique(TOKENS[row, :length], return_counts=True)
        vector[words] = 1 + np.log(counts)  # idf is 1
        vector /= np.linalg.norm(vector)
        errors.append(np.sum((rebuilt + model.bag_bias.numpy() - vector) ** 2))
    total, tokens = model.loss_sum(rows, training=True)
    assert tokens == count == 9
    assert float(total) == pytest.approx(float(nats) + 3 * (8 * errors[0] + errors[1]), rel=1e-5)
    measured = model.measured(rows)
    assert float(measured["nats_per_token"][0]) == pytest.approx(float(nats), rel=1e-5)
    assert float(measured["bag_error"][0]) == pytest.approx(errors[0] + errors[1], rel=1e-5)
    assert measured["bag_error"][1] == 2


def test_the_bias_starts_as_the_mean_vector_and_words_of_no_document_have_no_weight() -> None:
    model = BagAutoencoder(Encoder(VOCAB_SIZE, DIM, UNITS, seed=1))
    model.build()
    counts = np.zeros(VOCAB_SIZE, np.int64)
    counts[5], counts[7] = 100, 1  # in all documents, and in one
    model.set_idf(counts, documents=100)
    idf, bias = model.idf.numpy(), model.bag_bias.numpy()
    assert idf[5] == 0 and idf[7] == pytest.approx(np.log(101 / 2))
    assert (np.delete(idf, 7) == 0).all() and (np.delete(bias, 7) == 0).all()
    assert bias[7] == pytest.approx(0.01 * idf[7] / np.sqrt(0.01 * idf[7] ** 2))


def test_every_weight_and_the_initial_state_get_a_gradient(model: BagAutoencoder) -> None:
    with tf.GradientTape() as tape:
        rows = {"tokens": TOKENS, "lengths": LENGTHS, "weights": np.ones(3, np.float32)}
        total, _ = model.loss_sum(rows, training=True)
    variables = [variable.value for variable in model.trainable_variables]
    for variable, gradient in zip(variables, tape.gradient(total, variables), strict=True):
        assert np.abs(tf.convert_to_tensor(gradient)).max() > 0, variable.name


def test_codes_are_as_far_apart_as_the_bags_reconstructed_from_them(model: BagAutoencoder) -> None:
    means = np.random.default_rng(3).normal(size=(50, UNITS))
    codes = means @ model.code_kernel(means)
    bags = means @ model.bag_kernel.numpy() @ model.encoder.embeddings.numpy().T
    distance = np.linalg.norm(codes[0] - codes[1])
    assert distance == pytest.approx(np.linalg.norm(bags[0] - bags[1]), rel=1e-4)
    covariance = np.cov(codes.T)
    variances = np.diag(covariance)
    assert (np.diff(variances) < 0).all()
    np.testing.assert_allclose(covariance, np.diag(variances), atol=1e-4 * variances[0])
