import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import loop_settings
from trainer.config import OPTIMIZERS
from trainer.distribution.tf_distribute import one_device
from trainer.training.optimizer import KINDS, Optimizer, Rate
from trainer.training.schedules import LearningRate

RATES = {"table": Rate(factor=0.25, frozen_steps=2)}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "nadam"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_rate_of_its_own(two_shards: object, name: str, shards: int) -> None:
    distributor = one_device() if shards == 1 else two_shards
    with distributor.scope():
        variables = {
            key: keras.Variable(np.ones(2), dtype="float64", name=key)
            for key in ("table", "head", "like_table_but_not_frozen")
        }
    optimizer = Optimizer(name, loop_settings.stage(), variables, distributor, RATES)
    # A weight decay of AdamW would move what is frozen; its factor is tested elsewhere.
    optimizer.keras.weight_decay = None

    @tf.function
    def step() -> None:
        gradients = [tf.constant([1.0, -2.0], tf.float64)] * 3
        distributor.run(lambda: optimizer.apply(gradients))

    history = []
    for _ in range(4):
        step()
        history.append({key: variable.numpy() for key, variable in variables.items()})
    np.testing.assert_array_equal(history[1]["table"], [1, 1])
    moved = {key: history[3][key] - history[2][key] for key in variables}
    np.testing.assert_array_equal(moved["head"], moved["like_table_but_not_frozen"])
    assert np.all(moved["head"] != 0)
    if name == "sgd":
        # Momentum holds updates, which the rate is part of, since the third step only.
        np.testing.assert_allclose(moved["table"], [-0.025 * 1.9, 0.05 * 1.9])
    else:
        np.testing.assert_allclose(moved["table"], 0.25 * moved["head"], rtol=1e-9)


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="'adma' is not one of adam, adamw, nadam, sgd"):
        Optimizer("adma", loop_settings.stage(), {}, one_device())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_flag(name: str) -> None:
    assert name in KINDS and len(KINDS) == len(OPTIMIZERS)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_in_one_pass_is_keras_s(name: str) -> None:
    distributor, steps = one_device(), 4
    stage = loop_settings.stage(steps=steps, learning_rate=0.1, schedule="cosine")
    start = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    gradients = np.random.default_rng(1).normal(size=(steps, 5, 3)).astype(np.float32)
    gradients[:, 2] = 0
    with distributor.scope():
        ours, theirs = (keras.Variable(start) for _ in range(2))
    optimizer = Optimizer(name, stage, {"v": ours}, distributor)
    kind, options = KINDS[name]
    expected = kind(LearningRate(stage), **options)
    expected.build([theirs])
    apply = tf.function(lambda g: distributor.run(lambda g: optimizer.apply([g]), g))
    for gradient in gradients:
        apply(tf.constant(gradient))
        expected.apply([tf.constant(gradient)], [theirs])
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert np.abs(ours.numpy() - start)[[0, 1, 3, 4]].min() > 0.01
