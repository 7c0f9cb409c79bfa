"""The probability from which a multi-label classifier answers each class."""

import numpy as np


def best(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """Returns the threshold of each class with the highest F1 on these documents.

    It lies halfway between two neighbouring probabilities. A class that no document has keeps 0.5.

    Args:
        probabilities: float64 [documents, classes].
        labels: 0 or 1 [documents, classes].
    """
    pairs = zip(probabilities.T, labels.T, strict=True)
    return [_best_of(of_class, truth) if truth.any() else 0.5 for of_class, truth in pairs]


def _best_of(probabilities: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.metrics import precision_recall_curve  # a second, which few programs need

    precision, recall, edges = precision_recall_curve(truth, probabilities)
    # F1 without its factor 2, the last point has no edge: it answers nothing.
    f1 = (precision * recall / np.maximum(precision + recall, 1e-12))[:-1]
    place = int(f1.argmax())
    below = edges[place - 1] if place else 0.0
    return float(np.clip((below + edges[place]) / 2, 1e-6, 1 - 1e-6))
