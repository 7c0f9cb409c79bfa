import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.distribution.distributor import reduce_inside_step_only
from trainer.distribution.tf_distribute import one_device
from trainer.training.optimizer import Rate, make_optimizer, set_rates
from trainer.training.schedules import Schedule

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
        # A weight decay of AdamW would move what is frozen; its factor is tested elsewhere.
        optimizer = make_optimizer(name, Schedule("constant", 0.1))
        optimizer.weight_decay = None
        optimizer.build(list(variables.values()))
    reduce_inside_step_only(optimizer)
    set_rates(optimizer, variables, RATES)

    @tf.function
    def step() -> None:
        gradients = [tf.constant([1.0, -2.0], tf.float64)] * 3
        distributor.run(lambda: optimizer.apply(gradients, list(variables.values())))

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
