"""The moving average is that of the formula, and never mixes with the weights in training."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.training.ema import MovingAverage


@pytest.fixture
def weights(two_shards: Any) -> dict[str, keras.Variable]:
    with two_shards.scope():
        return {"w": keras.Variable(np.ones(3, np.float32)), "v": keras.Variable(2.0)}


def test_it_follows_the_formula(two_shards: Any, weights: dict[str, keras.Variable]) -> None:
    average = MovingAverage(weights, 0.5, two_shards)
    expected = 1.0
    for step in range(1, 12):
        weights["w"].assign(np.full(3, step, np.float32))
        average.update(tf.constant(step, tf.int64))
        kept = min(0.5, (1 + step) / (10 + step))  # 2/11 at first, 0.5 from the eighth step on
        expected = kept * expected + (1 - kept) * step
        found = average.variables["average/w"].numpy()
        np.testing.assert_allclose(found, [expected] * 3, rtol=1e-6)
    assert average.variables["average/v"].numpy() == 2.0


def test_the_weights_hold_it_only_inside_of_the_context(
    two_shards: Any, weights: dict[str, keras.Variable]
) -> None:
    average = MovingAverage(weights, 0.9, two_shards)
    weights["v"].assign(8.0)
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert weights["v"].numpy() == 2.0
        raise ZeroDivisionError
    assert weights["v"].numpy() == 8.0
    average.put_in_place()
    assert weights["v"].numpy() == 2.0
