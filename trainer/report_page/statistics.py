"""Statistics of the report: intervals of errors, calibration, and a projection of states."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

Z95 = float(ndtri(0.975))  # 95 % of the normal distribution lie within


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def proportion(count: float, total: int) -> Interval:
    """Returns count / total with Wilson's interval, which holds for small counts and zero too."""
    share, z2 = count / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # Rounding must not exclude the share itself.
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def paired_difference(first_wrong: np.ndarray, second_wrong: np.ndarray) -> Interval:
    """Returns the mean of first - second over the same documents, bool [n] each.

    Pairing removes the difficulty that both share, so it is narrower than two intervals suggest.
    """
    difference = first_wrong.astype(np.float64) - second_wrong
    mean = float(difference.mean())
    half = Z95 * float(difference.std()) / math.sqrt(len(difference))
    return Interval(mean, mean - half, mean + half)


def unpaired_difference(first: Interval, second: Interval) -> Interval:
    """Returns first - second of two independent proportions (Newcombe 1998, method 10)."""
    value = first.value - second.value
    low = math.hypot(first.value - first.low, second.high - second.value)
    high = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - low, value + high)


def mean_of_runs(values: list[float]) -> Interval:
    """Returns the mean of at least two values, with Student's interval."""
    degrees = len(values) - 1
    half = float(stdtrit(degrees, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return Interval(mean, mean - half, mean + half)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns the number of documents by label (row) and predicted class (column).

    Args:
        labels, predicted: Integers [n] in 0 .. classes - 1.
    """
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def by_class(counts: np.ndarray) -> np.ndarray:
    """Returns precision, recall and F1 of each class: float64 [classes, 3], 0 where undefined.

    Args:
        counts: As `confusion` returns them.
    """
    right = np.diag(counts).astype(np.float64)
    labels, predicted = counts.sum(axis=1), counts.sum(axis=0)
    wholes = np.stack([predicted, labels, (labels + predicted) / 2], axis=1)
    return np.where(wholes, right[:, None] / np.maximum(wholes, 0.5), 0.0)


class Calibration(NamedTuple):
    """Accuracy by confidence."""

    edges: np.ndarray  # of the bins of confidence, [bins + 1]
    confidence: np.ndarray  # mean in each bin, NaN in an empty one, [bins]
    accuracy: np.ndarray  # in each bin, NaN in an empty one, [bins]
    documents: np.ndarray  # number in each bin, [bins]
    error: float  # expected calibration error: |accuracy - confidence|, averaged over documents


def calibration(
    confidence: np.ndarray, is_right: np.ndarray, classes: int, bins: int = 10
) -> Calibration:
    """Returns the calibration of the predicted class, in bins of equal width (Guo et al. 2017).

    Args:
        confidence: Probability of the predicted class, [n].
        is_right: Bool [n].
        classes: Their number; no confidence is below 1 / classes.
        bins: Their number.
    """
    edges = np.linspace(1 / classes, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        accuracy = np.bincount(place, is_right, bins) / count
    filled = count > 0
    gap = np.abs(accuracy - mean)[filled] * count[filled]
    return Calibration(edges, mean, accuracy, count, float(gap.sum() / len(is_right)))


class Projection(NamedTuple):
    """Points projected to the plane in which they spread most."""

    points: np.ndarray  # [n, 2]
    explained: np.ndarray  # share of the variance on each axis, [2]


def principal_plane(rows: np.ndarray) -> Projection:
    """Returns the first two principal components of `rows` [n, width].

    The largest weight of each axis is positive, so that the picture does not flip.
    """
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    total = float((sizes**2).sum())
    explained = sizes[:2] ** 2 / total if total else np.zeros(len(sizes[:2]))
    points, share = np.zeros((len(rows), 2)), np.zeros(2)
    points[:, : len(axes)], share[: len(axes)] = centred @ axes.T, explained
    return Projection(points, share)
