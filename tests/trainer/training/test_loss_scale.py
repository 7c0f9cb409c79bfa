"""The loss scale finds its size, is the same for all workers, and survives a resumed run."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import loop_settings
from trainer.distribution.tf_distribute import one_device
from trainer.training import checkpoint, loop, loss_scale
from trainer.training.health import NonFiniteError
from trainer.training.loss_scale import LossScale
from trainer.training.task import Task

STEPS = 12
BATCHES = loop_settings.TokenBatches(np.random.default_rng(0).geometric(0.05, (60, 2, 1)))


def train(distributor: Any, folder: Path, factor: float, steps: int = STEPS, **changes: Any) -> Any:
    """Trains a weight whose gradient passes through float16, `factor` times as large there."""
    keras.utils.clear_session(free_memory=False)
    with distributor.scope():
        weight = keras.Variable(np.ones(3, np.float32), name="weight")

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, tf.Tensor]:
        through = tf.cast(weight.value, tf.float16)
        large = tf.cast(through, tf.float32) * factor
        return tf.reduce_sum(large) * tf.reduce_sum(rows["weights"]), tf.reduce_sum(rows["weights"])

    flags = {
        "steps": steps, "checkpoint_every_steps": 4, "evaluate_every_steps": STEPS,
        "resume": "auto", "precision": "mixed_float16",
    } | changes  # fmt: skip
    stage = loop_settings.stage(**flags)
    task = Task("pretrain", folder, stage, {"weight": weight}, loss_sum, dict)
    loop.train(loop_settings.run(distributor, **flags), task, BATCHES)
    _, tensors = checkpoint.read(folder / "checkpoints" / f"step-{steps:08d}")
    return weight.numpy(), {k: v for k, v in tensors.items() if k.startswith("loss_scale")}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_gradient_that_overflows_is_tried_again(
    two_shards: Any, tmp_path: Path, shards: int
) -> None:
    distributor = one_device() if shards == 1 else two_shards
    weight, scale = train(distributor, tmp_path, factor=1e6)
    assert np.isfinite(weight).all() and (weight < 1).all()
    assert scale["loss_scale/scale"] <= 2**-4  # 65504 over 1e6 a row, by halves
    assert scale["loss_scale/steps_since_change"] == STEPS


def test_it_grows_and_a_resumed_run_is_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "STEPS_TO_DOUBLE", 3)
    whole, scale = train(one_device(), tmp_path / "whole", factor=1e3)
    assert scale["loss_scale/scale"] == 2.0 ** (STEPS // 3)
    train(one_device(), tmp_path / "cut", factor=1e3, steps=8)
    resumed, again = train(one_device(), tmp_path / "cut", factor=1e3)
    assert resumed.tobytes() == whole.tobytes() and again == scale


def test_a_loss_that_is_none_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 1 is not finite"):
        train(one_device(), tmp_path, factor=np.nan)


def test_it_gives_up_at_the_smallest_and_begins_anew() -> None:
    scale = LossScale()
    tries = 0
    smallest = 1.0
    while scale.shrink():
        tries, smallest = tries + 1, float(scale.factor())
    assert (tries, smallest) == (24, loss_scale.SMALLEST)
    assert float(scale.factor()) == 1.0
