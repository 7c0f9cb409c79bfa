"""The losses and their gradients against NumPy, which knows gradients as differences only."""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from trainer import seeds
from trainer.config import Config
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.objectives import adversarial
from trainer.stages.finetune_loss import loss_sum

VOCAB_SIZE, DIM, UNITS, NORM = 12, 3, 4, 0.7
TOKENS = np.array([[5, 9, 2, 0, 0], [7, 7, 8, 3, 2], [4, 11, 6, 2, 0], [2, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([3, 5, 4, 1], np.int32)
LABELS = np.array([1, 0, -1, 1], np.int32)
WEIGHTS = np.array([1, 1, 1, 0], np.float32)  # the last row is filler
MOVABLE = np.arange(5)[None] < LENGTHS[:, None] - 1
STEP, SHARD = 3, 0


def make(num_classes: int) -> Classifier:
    encoder = Encoder(VOCAB_SIZE, DIM, UNITS, seed=1, embedding_scale=1.0, normalised=True)
    classifier = Classifier(encoder, num_classes, hidden_units=5)
    classifier.build()
    random = np.random.default_rng(0)
    encoder.frequencies.assign(random.dirichlet(np.ones(VOCAB_SIZE)))
    classifier.hidden.bias.assign(random.normal(size=5))
    for variable in encoder.initial_states[0]:
        variable.assign(random.normal(size=UNITS))
    return classifier


class Reference:
    """The classifier in NumPy, float64."""

    def __init__(self, classifier: Classifier):
        encoder, cell = classifier.encoder, classifier.encoder.lstms[0].cell
        variables = {
            "table": encoder.embeddings,
            "frequencies": encoder.frequencies,
            "kernel": cell.kernel,
            "recurrent": cell.recurrent_kernel,
            "bias": cell.bias,
            "h": encoder.initial_states[0][0],
            "c": encoder.initial_states[0][1],
            "hidden": classifier.hidden.kernel,
            "hidden_bias": classifier.hidden.bias,
            "output": classifier.output_layer.kernel,
            "output_bias": classifier.output_layer.bias,
        }
        self.variables = variables
        self.values = {name: v.numpy().astype(np.float64) for name, v in variables.items()}

    def embed(self) -> np.ndarray:
        table, weights = self.values["table"], self.values["frequencies"][:, None]
        mean = (weights * table).sum(0)
        deviation = np.sqrt((weights * (table - mean) ** 2).sum(0) + 1e-6)
        return ((table - mean) / deviation)[TOKENS]

    def log_probabilities(self, embedded: np.ndarray) -> np.ndarray:
        v, found = self.values, []
        for row, length in zip(embedded, LENGTHS, strict=True):
            h, c = v["h"], v["c"]
            for word in row[:length]:
                i, f, g, o = np.split(word @ v["kernel"] + h @ v["recurrent"] + v["bias"], 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            hidden = np.maximum(h @ v["hidden"] + v["hidden_bias"], 0)
            logits = hidden @ v["output"] + v["output_bias"]
            logits = np.array([0, *logits]) if len(logits) == 1 else logits
            found.append(logits - np.log(np.exp(logits).sum()))
        return np.stack(found)

    def label_losses(self, embedded: np.ndarray) -> np.ndarray:
        picked = self.log_probabilities(embedded)[np.arange(4), np.maximum(LABELS, 0)]
        return -picked * WEIGHTS * (LABELS >= 0)

    def divergences(self, log_p: np.ndarray, embedded: np.ndarray) -> np.ndarray:
        return (np.exp(log_p) * (log_p - self.log_probabilities(embedded))).sum(1)

    def loss(self, moves: np.ndarray, virtual: np.ndarray, log_p: np.ndarray) -> float:
        """Returns the whole loss for moves, and a prediction, that are constants."""
        embedded = self.embed()
        labelled = self.label_losses(embedded) + 0.5 * self.label_losses(embedded + moves)
        # A mean over all three documents, of which two are labelled.
        changed = (self.divergences(log_p, embedded + virtual) * WEIGHTS).sum() / 3
        return labelled.sum() + 2 * 0.25 * changed


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def differences(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Returns the gradient of `function` by central differences."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-5
        found[index] = (function(at + step) - function(at - step)) / 2e-5
    return found


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
        total, weight = tf.function(loss_sum(config, classifier))(rows, tf.constant(STEP), SHARD)
    gradients = tape.gradient(total, [reference.variables[name].value for name in names])
    assert float(weight) == 2
    np.testing.assert_allclose(total, reference.loss(moves, virtual, log_p), rtol=1e-4)

    def whole(name: str, value: np.ndarray) -> float:
        kept = reference.values[name]
        reference.values[name] = value
        found = reference.loss(moves, virtual, log_p)
        reference.values[name] = kept
        return found

    for name, gradient in zip(names, gradients, strict=True):
        expected = differences(lambda v, name=name: whole(name, v), reference.values[name])
        difference = np.abs(tf.convert_to_tensor(gradient) - expected).max()
        assert difference < 3e-3 * np.abs(expected).max(), name


def test_moves_have_the_norm_and_leave_ends_and_padding_alone() -> None:
    direction = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    direction[0] *= 1e-30  # of which the square is 0
    direction[2] = 0
    movable = adversarial.movable_words(LENGTHS, 5)
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
