"""One step computes what its formula says, in every way in which it is run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import loop_settings
from trainer.distribution.tf_distribute import one_device
from trainer.distribution.variables import lookup
from trainer.training.loss_scale import LossScale
from trainer.training.optimizer import Optimizer
from trainer.training.task import Task
from trainer.training.train_step import TrainStep

ROWS, TIME = 3, 2
TARGETS = np.arange(12.0).reshape(4, ROWS).astype(np.float32)
BATCHES = loop_settings.TokenBatches(np.ones((4, ROWS, TIME)))
GO_ON = tf.constant(0.0)


def make_step(distributor: Any, **flags: Any) -> SimpleNamespace:
    """Returns a step that fits a weight to TARGETS by SGD; its third row is filler."""
    keras.utils.clear_session()
    with distributor.scope():
        weight = keras.Variable(0.25, name="weight")

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, tf.Tensor]:
        targets = tf.gather(tf.constant(TARGETS), step)[: tf.shape(rows["weights"])[0]]
        losses = (weight.value - targets) ** 2 * rows["weights"]
        return tf.reduce_sum(losses), tf.reduce_sum(rows["weights"])

    stage = loop_settings.stage(steps=4)
    task = Task("pretrain", Path(), stage, {"weight": weight}, loss_sum, dict)
    optimizer = Optimizer("sgd", stage, task.variables, distributor)
    with distributor.scope():
        scale = LossScale() if flags.pop("scales_loss", False) else None
    config = loop_settings.config(**flags)
    step = TrainStep(task, config, distributor, optimizer, with_filler(0, 1), scale)
    return SimpleNamespace(weight=weight, step=step)


def with_filler(start: int, stop: int) -> tf.data.Dataset:
    weights = tf.constant([1.0, 1.0, 0.0])
    return BATCHES(start, stop).map(lambda batch: {**batch, "weights": weights})


@pytest.mark.parametrize(
    "flags",
    [{}, {"on_nonfinite": "skip"}, {"scales_loss": True}],
    ids=["one call", "two calls", "loss scale"],
)
def test_the_update_is_gradient_mean_clipping_and_momentum(flags: dict[str, Any]) -> None:
    made = make_step(one_device(), clip_norm=1.5, **flags)
    weight, momentum = 0.25, 0.0
    for number, batch in enumerate(with_filler(0, 4)):
        outcome = made.step(batch, tf.constant(float(number == 2)))
        differences = weight - TARGETS[number, :2]
        gradient = np.mean(2 * differences)
        np.testing.assert_allclose(outcome.loss, np.mean(differences**2), rtol=1e-6)
        np.testing.assert_allclose(outcome.norms, [abs(gradient)], rtol=1e-6)
        assert (outcome.tokens, outcome.stops) == (2 * TIME, float(number == 2))
        momentum = 0.9 * momentum - 0.1 * gradient * min(1, 1.5 / abs(gradient))
        weight += momentum
        np.testing.assert_allclose(made.weight, weight, rtol=1e-5)


def test_several_steps_in_a_call_are_the_same_steps() -> None:
    single, several = make_step(one_device()), make_step(one_device())
    outcomes = [single.step(batch, GO_ON) for batch in with_filler(0, 4)]
    found = several.step.several(iter(with_filler(0, 4)), 4, GO_ON)
    assert [float(o.loss) for o in found] == [float(o.loss) for o in outcomes]
    assert float(found[-1].norms[0]) == float(outcomes[-1].norms[0])
    assert several.weight.numpy() == single.weight.numpy()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_step_makes_no_tensor_of_the_vocabulary(two_shards: Any, shards: int) -> None:
    vocabulary, distributor = 1_000, two_shards if shards == 2 else one_device()
    with distributor.scope():
        table = keras.Variable(np.ones((vocabulary, 3), np.float32), name="table")

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.reduce_sum(lookup(table.value, rows["tokens"]) ** 2), tf.constant(2.0)

    stage = loop_settings.stage(steps=60, schedule="exponential", learning_rate_decay=0.9)
    task = Task("pretrain", Path(), stage, {"table": table}, loss_sum, dict)
    optimizer = Optimizer("adam", stage, task.variables, distributor)
    config = loop_settings.config(sparse_reduce="rows")
    step = TrainStep(task, config, distributor, optimizer, BATCHES(0, 1))
    assert any("rowsteps" in name for name in optimizer.variables)
    made, functions = [], [step.function.get_concrete_function().graph]
    functions += [f.graph for f in functions[0]._functions.values() if hasattr(f, "graph")]
    for graph in functions:
        for operation in graph.get_operations():
            for tensor in operation.outputs:
                if tensor.dtype != tf.resource and tensor.shape.num_elements():
                    made.append((tensor.shape.num_elements(), operation.name))
    assert made and max(made)[0] < vocabulary, max(made)
