"""Multinomial logistic regression in NumPy: where a classifier's linear head starts from."""

import functools

import numpy as np
from scipy import special

MAX_STEPS = 500
TOLERANCE = 1e-6  # of the gradient's norm, beside that at zero


def fit(
    features: np.ndarray, labels: np.ndarray, num_classes: int, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel [width, outputs] and the bias [outputs] of the best linear classifier.

    Minimises the summed cross-entropy plus penalty / 2 times the squared norm of kernel and bias.
    Every step goes to the minimum of a quadratic bound on the loss (Boehning 1992), so none is too
    long and no step size is searched. For two classes there is one output, the second's logit.

    Args:
        features: [documents, width]; of a size of about 1 a row, or `penalty` means something else.
        labels: Integers [documents]; or of sets of labels, 0 or 1 [documents, num_classes]: then
            there is an output for each class, and the loss is the sum of their cross-entropies.
        penalty: Above 0.
    """
    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    is_binary = labels.ndim == 2 or num_classes == 2
    truth = labels.astype(np.float64) if labels.ndim == 2 else np.eye(num_classes)[labels]
    if labels.ndim == 1 and num_classes == 2:
        truth = truth[:, 1:]
    link = sigmoid if is_binary else functools.partial(special.softmax, axis=1)

    def gradient(weights: np.ndarray) -> np.ndarray:
        return inputs.T @ (link(inputs @ weights) - truth) + penalty * weights

    # The curvature of one row's cross-entropy is at most 1/4 for two classes, 1/2 for more.
    bound = 0.25 if is_binary else 0.5
    inverse = np.linalg.inv(bound * inputs.T @ inputs + penalty * np.eye(inputs.shape[1]))
    weights = np.zeros((inputs.shape[1], truth.shape[1]))
    slope = gradient(weights)
    enough = TOLERANCE * np.linalg.norm(slope)
    for _ in range(MAX_STEPS):
        weights = weights - inverse @ slope
        slope = gradient(weights)
        if np.linalg.norm(slope) <= enough:
            break
    return weights[:-1], weights[-1]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns 1 / (1 + exp(-logits)), of any shape."""
    with np.errstate(over="ignore"):  # to infinity, whose inverse is 0
        return 1 / (1 + np.exp(-logits))
