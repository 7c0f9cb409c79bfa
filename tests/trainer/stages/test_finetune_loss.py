"""Joint training against NumPy: the label's loss, and the objective's a token."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.numpy_classifier import (
    LABELS,
    LENGTHS,
    TOKENS,
    VOCAB_SIZE,
    WEIGHTS,
    Reference,
    differences,
    make,
)
from trainer import native
from trainer.config import Config
from trainer.models.bag_autoencoder import BagAutoencoder
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.models.text_model import TextModel
from trainer.stages.finetune_loss import FinetuneLoss
from trainer.stages.pretrain import OBJECTIVES

LABELLED = WEIGHTS * (LABELS >= 0)
NUM_LABELLED, NUM_TOKENS = 2, int((LENGTHS * LABELLED).sum())


def objective_loss(reference: Reference, objective: TextModel) -> float:
    """Returns the objective's loss of the labelled documents, in nats a token."""
    kernel = objective.softmax_kernel.numpy().astype(np.float64)
    bias = objective.softmax_bias.numpy().astype(np.float64)
    embedded, total = reference.embed(), 0.0
    for row, tokens, length in zip(embedded, TOKENS, LENGTHS * LABELLED.astype(int), strict=True):
        first, state = reference.values["h"], None
        if type(objective).__name__ == "SequenceAutoencoder":
            _, state = reference.read(row[:length])
            first = state[0]
        written, _ = reference.read(row[: max(length - 1, 0)], state)
        for output, token in zip([first, *written][:length], tokens, strict=False):
            logits = kernel @ output + bias
            total += np.log(np.exp(logits).sum()) - logits[token]
        if isinstance(objective, BagAutoencoder) and length:
            total += length * bag_error(reference, objective, row[:length], tokens[:length])
    return total / NUM_TOKENS


def bag_error(
    reference: Reference, objective: BagAutoencoder, words: np.ndarray, tokens: np.ndarray
) -> float:
    """Returns the squared error of one document's reconstruction; each word has an idf of 1."""
    outputs, _ = reference.read(words)
    code = np.mean(outputs, axis=0) @ objective.bag_kernel.numpy().astype(np.float64)
    found, counts = np.unique(tokens, return_counts=True)
    vector = np.zeros(VOCAB_SIZE)
    vector[found] = 1 + np.log(counts)
    vector /= np.linalg.norm(vector)
    rebuilt = reference.values["table"] @ code + objective.bag_bias.numpy()
    return float(np.sum((rebuilt - vector) ** 2))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.slow("quick: the bag autoencoder's, which is more")
            if name == "language_model"
            else (),
        )
        for name in OBJECTIVES
    ],
)
def test_the_joint_loss_and_its_gradient_are_those_of_numpy(name: str) -> None:
    classifier = make(num_classes=2)
    objective = OBJECTIVES[name](classifier.encoder)
    objective.build()
    rows = {
        "tokens": tf.constant(TOKENS),
        "lengths": tf.constant(LENGTHS),
        "labels": tf.constant(LABELS),
        "weights": tf.constant(WEIGHTS),
        "global_counts": tf.constant([[NUM_LABELLED, 3, NUM_TOKENS]] * 4, tf.float32),
    }
    config = Config(joint_weight=0.5, finetune_dropout=0.0, sampled_softmax=0)
    loss = tf.function(FinetuneLoss(config, classifier, objective))
    reference = Reference(classifier)
    recurrent = reference.variables["recurrent"].value
    with tf.GradientTape() as tape:
        total, weight = loss(rows, tf.constant(0), 0)
        mean = total / weight
    gradient = tape.gradient(mean, recurrent)

    def expected(value: np.ndarray) -> float:
        reference.values["recurrent"] = value
        labels = reference.label_losses(reference.embed()).sum() / NUM_LABELLED
        return labels + 0.5 * objective_loss(reference, objective)

    value = recurrent.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, expected(value), rtol=1e-5)
    by_differences = differences(expected, value)
    assert np.abs(gradient - by_differences).max() < 1e-3 * np.abs(by_differences).max()
    # A document's weight is its class's, in the label's loss alone.
    weights = np.array([0.25, 1.75], np.float32)
    weighted, _ = tf.function(FinetuneLoss(config, classifier, objective, weights))(
        rows, tf.constant(0), 0
    )
    losses = reference.label_losses(reference.embed())
    more = np.sum(losses * (weights[np.maximum(LABELS, 0)] - 1))
    np.testing.assert_allclose(weighted - total, more, rtol=1e-4)
    # A slice without rows, as a part of a small batch may be, adds nothing.
    nothing, none = loss({k: v[:0] for k, v in rows.items()}, tf.constant(0), 0)
    assert float(nothing) == float(none) == 0


def test_adversarial_training_runs_two_backward_passes_not_three(
    tmp_path: Path, rewriting: None
) -> None:
    if not native.operations(True):
        pytest.skip("the compiled loops are not built or not faster here")
    encoder = Encoder(50, 8, 16, seed=0, normalised=True)
    classifier = Classifier(encoder, 2, pooling="concat")
    classifier.build()
    loss = FinetuneLoss(Config(adversarial_weight=1.0, finetune_dropout=0.3), classifier)
    variables = [variable.value for variable in classifier.trainable_variables]
    spec = {name: tf.TensorSpec([None], tf.int32) for name in ("lengths", "labels")}
    spec |= {"tokens": tf.TensorSpec([None, None], tf.int32), "weights": tf.TensorSpec([None])}

    @tf.function(input_signature=[spec], autograph=False)
    def gradients(rows: dict) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            total, _ = loss(rows, tf.constant(3), 0)
        return [tf.convert_to_tensor(g) for g in tape.gradient(total, variables)]

    rows = {
        "tokens": np.random.default_rng(0).integers(3, 50, (4, 9), np.int32),
        "lengths": np.array([9, 5, 3, 9], np.int32),
        "labels": np.array([0, 1, 1, 0], np.int32),
        "weights": np.ones(4, np.float32),
    }
    gradients(rows)
    with tf.profiler.experimental.Profile(str(tmp_path)):
        gradients(rows)
    (path,) = tmp_path.rglob("*.xplane.pb")
    names = re.findall(rb"lstm_backward[\w/]*:WarmstateLstmGrad", path.read_bytes())
    assert len(set(names)) == 2, names


def test_the_labels_terms_are_those_of_the_labelled_documents_alone() -> None:
    encoder = Encoder(50, 8, 16, seed=0, normalised=True, num_layers=2)
    classifier = Classifier(encoder, 2, pooling="concat")
    classifier.build()
    variables = [variable.value for variable in classifier.trainable_variables]
    random = np.random.default_rng(0)
    rows = {
        "tokens": tf.constant(random.integers(3, 50, (5, 9), np.int32)),
        "lengths": tf.constant([9, 5, 3, 9, 6]),
        "labels": tf.constant([0, 1, 1, -1, -1]),
        "weights": tf.ones(5),
        "global_counts": tf.constant([[3.0, 5.0, 17.0]] * 5),
    }

    def of(adversarial: float, virtual: float, rows: dict) -> list[np.ndarray]:
        """Returns the loss, the number of labelled documents, and the gradients."""
        config = Config(
            adversarial_weight=adversarial,
            virtual_adversarial_weight=virtual,
            finetune_dropout=0.3,
            perturbation_norm=2.0,
        )
        with tf.GradientTape() as tape:
            total, weight = tf.function(FinetuneLoss(config, classifier))(rows, tf.constant(3), 0)
        gradients = tape.gradient(total, variables)
        return [tf.convert_to_tensor(t).numpy() for t in (total, weight, *gradients)]

    labelled = {name: tensor[:3] for name, tensor in rows.items()}
    both, virtual = of(1, 1, rows), of(0, 1, rows)
    adversarial, plain = of(1, 0, labelled), of(0, 0, labelled)
    assert both[1] == virtual[1] == plain[1] == 3
    for found, *parts in zip(both, virtual, adversarial, plain, strict=True):
        expected = parts[0] + parts[1] - parts[2]
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    unlabelled = {name: tensor[3:] for name, tensor in rows.items()}
    assert float(of(1, 1, unlabelled)[1]) == 0 < float(of(1, 1, unlabelled)[0])
