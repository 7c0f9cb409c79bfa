import numpy as np
import tensorflow as tf

from tests.trainer.rounding import bound
from trainer.losses.label_gain import linear_weights
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.stages.finetune_loss import label_losses

TOKENS = np.array([[5, 9, 2, 0, 0], [7, 7, 8, 3, 2], [2, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([3, 5, 1], np.int32)
LABELS = np.array([1, 0, 1], np.int32)
WIDTH, UNITS = 4, 6
# At each step a sum of inputs, state and bias, and ten operations with gates; in both programs.
# Losses and logits are about 1, but a logit may be a difference near 0.
TOLERANCE = bound(tf.float32, 2 * TOKENS.shape[1] * (WIDTH + UNITS + 1 + 10))
CLOSE = {"rtol": TOLERANCE, "atol": TOLERANCE}


def test_weights_rise_linearly_from_zero_and_add_up_to_one() -> None:
    expected = np.array([[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [1, 0, 0, 0, 0]]) / [[3], [10], [1]]
    np.testing.assert_allclose(linear_weights(LENGTHS, 5), expected, rtol=1e-6)


def reference(classifier: Classifier, num_classes: int) -> np.ndarray:
    """Returns the documents' losses in NumPy: each prefix of a document is predicted by itself."""
    found = []
    for row, length, label in zip(TOKENS, LENGTHS, LABELS, strict=True):
        gains = np.arange(length) / max(length - 1, 1) if length > 1 else np.ones(1)
        losses = []
        for stop in range(1, length + 1):
            logits = classifier.logits(row[None, :stop], np.array([stop]), training=False).numpy()[
                0
            ]
            if num_classes == 2:
                logits = np.array([0, logits[0]])
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
        found.append((gains * losses).sum() / gains.sum())
    return np.array(found)


def test_the_loss_is_that_of_all_prefixes() -> None:
    for num_classes in (2, 3):
        classifier = Classifier(Encoder(30, WIDTH, UNITS, seed=1), num_classes)
        classifier.build()
        classifier.encoder.initial_states[0][0].assign(np.linspace(-1, 1, UNITS))
        logits = classifier.read(
            classifier.embed(TOKENS, LENGTHS),
            LENGTHS,
            classifier.start(TOKENS, LENGTHS),
            training=True,
            every_step=True,
        )
        found = label_losses(logits, LABELS, LENGTHS)
        np.testing.assert_allclose(found, reference(classifier, num_classes), **CLOSE)
        # Test time uses the end.
        at_end = tf.gather(logits, LENGTHS - 1, batch_dims=1)
        expected = classifier.logits(TOKENS, LENGTHS, training=False)
        np.testing.assert_allclose(at_end, expected, **CLOSE)
