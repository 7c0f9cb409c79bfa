"""The losses and their gradients against NumPy, which knows gradients as differences only."""

import numpy as np
import pytest
import tensorflow as tf

from tests.numpy_classifier import LABELS, LENGTHS, TOKENS, WEIGHTS, Reference, differences, make
from trainer.config import Config
from trainer.losses import adversarial
from trainer.stages.finetune_loss import FinetuneLoss
from trainer.training import seeds

NORM, STEP, SHARD = 0.7, 3, 0
MOVABLE = np.arange(5)[None] < LENGTHS[:, None] - 1


def loss(reference: Reference, moves: np.ndarray, virtual: np.ndarray, log_p: np.ndarray) -> float:
    """Returns the whole loss for moves, and a prediction, that are constants."""
    embedded = reference.embed()
    labelled = reference.label_losses(embedded) + 0.5 * reference.label_losses(embedded + moves)
    # A mean over all three documents, of which two are labelled.
    changed = (reference.divergences(log_p, embedded + virtual) * WEIGHTS).sum() / 3
    return labelled.sum() + 2 * 0.25 * changed


def scaled(direction: np.ndarray, norm: float) -> np.ndarray:
    direction = direction * MOVABLE[:, :, None]
    length = np.sqrt((direction**2).sum((1, 2), keepdims=True))
    return np.where(length > 0, norm * direction / np.maximum(length, 1e-300), 0)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_losses_and_gradients_are_those_of_numpy(num_classes: int) -> None:
    classifier = make(num_classes)
    config = Config(
        adversarial_weight=0.5,
        virtual_adversarial_weight=0.25,
        perturbation_norm=NORM,
        finetune_dropout=0.0,
        seed=5,
    )
    rows = {
        "tokens": tf.constant(TOKENS),
        "lengths": tf.constant(LENGTHS),
        "labels": tf.constant(LABELS),
        "weights": tf.constant(WEIGHTS),
        "global_counts": tf.constant([[2.0, 3.0, 8.0]] * 4),
    }
    reference = Reference(classifier)
    embedded = reference.embed()
    moves = scaled(differences(lambda e: reference.label_losses(e).sum(), embedded), NORM)
    seed = seeds.fold(5, seeds.VIRTUAL_ADVERSARIAL_DIRECTION, tf.constant(STEP))
    guess = adversarial.random_direction(tf.constant(embedded, tf.float32), rows["tokens"], seed)
    log_p = reference.log_probabilities(embedded)
    virtual = scaled(
        differences(
            lambda d: reference.divergences(log_p, embedded + d).sum(),
            scaled(tf.cast(guess, tf.float64).numpy(), adversarial.XI),
        ),
        NORM,
    )
    names = ["output", "bias", "hidden_bias", "table", "h"]
    with tf.GradientTape() as tape:
        total, weight = tf.function(FinetuneLoss(config, classifier))(
            rows, tf.constant(STEP), SHARD
        )
    gradients = tape.gradient(total, [reference.variables[name].value for name in names])
    assert float(weight) == 2
    np.testing.assert_allclose(total, loss(reference, moves, virtual, log_p), rtol=1e-4)

    def whole(name: str, value: np.ndarray) -> float:
        kept = reference.values[name]
        reference.values[name] = value
        found = loss(reference, moves, virtual, log_p)
        reference.values[name] = kept
        return found

    for name, gradient in zip(names, gradients, strict=True):
        expected = differences(lambda v, name=name: whole(name, v), reference.values[name])
        difference = np.abs(tf.convert_to_tensor(gradient) - expected).max()
        assert difference < 3e-3 * np.abs(expected).max(), name


def test_the_divergence_of_sets_is_the_sum_of_their_classes() -> None:
    logits, others = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    found = adversarial.divergence(logits, others, multi_label=True)
    pairs = zip(logits.T, others.T, strict=True)
    classes = [adversarial.divergence(a[:, None], b[:, None]) for a, b in pairs]
    np.testing.assert_allclose(found, np.sum(classes, axis=0), rtol=1e-5)
    assert (found.numpy() > 0).all()


def moved_loss(precision: str, bias: float, head: float, **weights: float) -> np.ndarray:
    """Returns the loss of two classes, all labels 0, with the head's weights times `head`."""
    classifier = make(2, precision)
    classifier.output_layer.bias.assign([bias])
    classifier.hidden.kernel.assign(head * classifier.hidden.kernel)
    config = Config(perturbation_norm=NORM, finetune_dropout=0.0, **weights)
    rows = {
        "tokens": tf.constant(TOKENS),
        "lengths": tf.constant(LENGTHS),
        "labels": tf.zeros(4, tf.int32),
        "weights": tf.constant(WEIGHTS),
        "global_counts": tf.constant([[3.0, 3.0, 8.0]] * 4),
    }
    return FinetuneLoss(config, classifier)(rows, tf.constant(STEP), SHARD)[0].numpy()


@pytest.mark.parametrize("name", ["adversarial_weight", "virtual_adversarial_weight"])
def test_a_gradient_too_small_for_float16_moves_as_in_float32(name: str) -> None:
    sure = {"bias": -20.0, "head": 30.0}  # the loss is of 1e-6
    bare = moved_loss("float32", **sure)
    unmoved = bare if name == "adversarial_weight" else 0
    exact, half = (
        (moved_loss(precision, **sure, **{name: 1e3}) - bare) / 1e3 - unmoved
        for precision in ("float32", "mixed_float16")
    )
    assert exact > 0.01 * bare
    np.testing.assert_allclose(half, exact, rtol=0.1)  # float16 rounds what is predicted too


@pytest.mark.parametrize("name", ["adversarial_weight", "virtual_adversarial_weight"])
def test_a_gradient_too_large_for_float16_leaves_the_loss_finite(name: str) -> None:
    assert np.isfinite(moved_loss("mixed_float16", bias=0.0, head=1e7, **{name: 1.0}))


def test_moves_have_the_norm_and_leave_ends_and_padding_alone() -> None:
    direction = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    direction[0] *= 1e-30  # of which the square is 0
    direction[2] = 0
    movable = adversarial.perturbed_words(LENGTHS, 5)
    np.testing.assert_array_equal(movable, MOVABLE)
    found = adversarial.of_norm(direction, movable, 5.0).numpy()
    assert (found[~MOVABLE] == 0).all()
    np.testing.assert_allclose(np.sqrt((found**2).sum((1, 2))), [5, 5, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(found, scaled(direction.astype(np.float64), 5.0), rtol=1e-4)


def test_a_random_direction_is_of_the_document_and_not_of_its_place() -> None:
    embedded, seed = tf.zeros([4, 5, 3]), tf.constant([1, 2])
    found = adversarial.random_direction(embedded, TOKENS, seed).numpy()
    other = adversarial.random_direction(embedded[:2], TOKENS[[2, 0]], seed).numpy()
    np.testing.assert_array_equal(other, found[[2, 0]])
    none = tf.function(adversarial.random_direction)(embedded[:0], TOKENS[:0], seed)
    assert none.shape == (0, 5, 3)
    assert abs(found.mean()) < 0.3 and 0.7 < found.std() < 1.3
    assert len(np.unique(found)) == found.size
    later = adversarial.random_direction(embedded, TOKENS, tf.constant([1, 3])).numpy()
    assert (later != found).all()
