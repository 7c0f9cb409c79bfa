import math

import numpy as np
import pytest
import tensorflow as tf

from trainer import config
from trainer.config import StageConfig
from trainer.training.schedules import FACTORS, LearningRate


def rates(kind: str, steps: int, **values: float) -> np.ndarray:
    rate = LearningRate(StageConfig(steps, 0.5, kind, **values))
    return np.array([float(rate(tf.constant(step))) for step in range(steps)])


def test_constant_and_exponential() -> None:
    np.testing.assert_array_equal(rates("constant", 4, learning_rate_decay=0.5), [0.5] * 4)
    np.testing.assert_allclose(
        rates("exponential", 4, learning_rate_decay=0.5), [0.5, 0.25, 0.125, 0.0625]
    )


def test_cosine() -> None:
    found = rates("cosine", 10, warmup_fraction=0.4)
    np.testing.assert_allclose(found[:4], [0.125, 0.25, 0.375, 0.5])
    expected = [0.25 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    np.testing.assert_allclose(found[4:], expected, rtol=1e-6)
    after = LearningRate(StageConfig(10, 0.5, "cosine", warmup_fraction=0.4))(tf.constant(10))
    assert float(after) == 0


def test_slanted_triangular_is_that_of_the_paper() -> None:
    # Howard & Ruder 2018, equation 3: cut_frac 0.1, ratio 32.
    steps, cut_frac, ratio = 40, 0.1, 32
    cut = math.floor(steps * cut_frac)
    expected = []
    for t in range(steps):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        expected.append(0.5 * (1 + p * (ratio - 1)) / ratio)
    np.testing.assert_allclose(rates("triangular", steps, warmup_fraction=0.1), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_rates_are_positive_and_at_most_the_peak(kind: str, steps: int, warmup: float) -> None:
    found = rates(kind, steps, warmup_fraction=warmup, learning_rate_decay=0.9)
    assert (found > 0).all() and (found <= 0.5).all()


def test_every_schedule_has_a_flag() -> None:
    assert tuple(FACTORS) == (*config.SCHEDULES, "range")  # the last one is --lr_range's
