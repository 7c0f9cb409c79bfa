"""Training by rows gives what the dense optimizer gives, and touches nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import loop_settings
from tests.pairs import each_value
from trainer.distribution.preemption import Preempted
from trainer.distribution.tf_distribute import one_device
from trainer.distribution.variables import lookup
from trainer.training import checkpoint, loop
from trainer.training.lazy_rows import rule_of
from trainer.training.optimizer import Optimizer, Rate
from trainer.training.schedules import LearningRate
from trainer.training.task import Task

STEPS = 60
ROWS, WIDTH = 40, 3
VOCABULARY = 1_000


def apply_steps(
    distributor: Any, name: str, rate: Rate, by_rows: bool, scale: float = 1.0
) -> np.ndarray:
    """Returns a table after STEPS steps of which each has gradients for up to three rows."""
    random = np.random.default_rng(1)
    with distributor.scope():
        table = keras.Variable(np.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH), "float64")
    stage = loop_settings.stage(
        steps=STEPS, schedule="exponential", learning_rate=0.01, learning_rate_decay=0.99
    )
    optimizer = Optimizer(name, stage, {"table": table}, distributor, {"table": rate})
    if by_rows:
        optimizer.train_by_rows([True], [True])

    @tf.function(reduce_retracing=True)
    def step(indices: tf.Tensor, values: tf.Tensor) -> None:
        def of_shard(indices: tf.Tensor, values: tf.Tensor) -> None:
            gradient = tf.IndexedSlices(values, indices, (ROWS, WIDTH))
            optimizer.apply([gradient if by_rows else tf.convert_to_tensor(gradient)])

        distributor.run(of_shard, indices, values)

    for k in range(STEPS):
        indices = np.unique(np.minimum(random.geometric(0.1, 3), ROWS - 1))
        values = random.normal(size=(len(indices), WIDTH)) * 10.0 ** -random.integers(1, 5) * scale
        step(tf.constant(indices), tf.constant(values))
        if by_rows and k in (STEPS // 2, STEPS - 1):
            optimizer.settle()
    return table.numpy()


@pytest.mark.parametrize(
    ("name", "shards"),
    each_value(
        ("sgd", "adam", "adamw", "nadam"),
        (1, 2),
        pytest.mark.slow("other pairs; quick: each optimizer, one shard and two"),
    ),
)
def test_rows_are_trained_as_the_dense_optimizer_trains_them(
    two_shards: Any, name: str, shards: int
) -> None:
    distributor = one_device() if shards == 1 else two_shards
    rate = Rate(0.25, 0 if name == "adamw" else 7)  # AdamW's decay would move what is frozen
    dense, rows = (apply_steps(distributor, name, rate, by_rows) for by_rows in (False, True))
    moved = np.abs(dense - np.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)).max()
    assert moved > 1e-3
    # Keras takes its coefficients in float32.
    np.testing.assert_allclose(rows, dense, atol=3e-5 * moved)


def test_gradients_far_below_epsilon_move_rows_by_the_epsilon_of_their_steps() -> None:
    # Nadam's grows with the steps, from a thirtieth of the flag's; here it is the whole divisor.
    distributor, start = one_device(), np.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)
    dense, rows = (
        apply_steps(distributor, "nadam", Rate(1.0, 0), by_rows, scale=1e-7) - start
        for by_rows in (False, True)
    )
    assert np.linalg.norm(rows - dense) < 0.2 * np.linalg.norm(dense)


# A word or two a step, so that most rows are behind.
TOKENS = np.random.default_rng(0).geometric(0.05, (STEPS, 2, 1))


def train(
    distributor: Any, folder: Path, read: Any = lookup, stop_at: int = 0, **changes: Any
) -> np.ndarray:
    """Trains a table; returns it. With `stop_at`, TERM comes before that step."""
    keras.utils.clear_session(free_memory=False)
    with distributor.scope():
        table = keras.Variable(np.ones((VOCABULARY, WIDTH), np.float32), name="table")
    request = SimpleNamespace(received=False)

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, tf.Tensor]:
        targets = tf.sin(tf.cast(rows["tokens"] * step_of(step), tf.float32))[:, :, None]
        losses = (read(table.value, rows["tokens"]) - targets) ** 2
        return tf.reduce_sum(losses), tf.reduce_sum(rows["weights"])

    def step_of(step: tf.Tensor) -> tf.Tensor:
        return tf.cast(step % 7, tf.int32) + 1

    class StopsAt(loop_settings.TokenBatches):
        def __call__(self, start: int, stop: int) -> Any:
            dataset = super().__call__(start, stop)
            return dataset if stop == 1 else self._one_by_one(dataset, start)

        def _one_by_one(self, dataset: Any, start: int) -> Any:
            for step, batch in enumerate(dataset, start + 1):
                request.received = step == stop_at
                yield batch

    flags = {
        "steps": STEPS, "resume": "auto", "learning_rate": 0.01,
        "checkpoint_every_steps": 50, "evaluate_every_steps": 20, "sparse_reduce": "rows",
    } | changes  # fmt: skip
    stage = loop_settings.stage(**flags)
    task = Task("pretrain", folder, stage, {"table": table}, loss_sum, dict)
    loop.train(loop_settings.run(distributor, request, **flags), task, StopsAt(TOKENS))
    return table.numpy()


@pytest.mark.parametrize(
    ("on_nonfinite", "shards"),
    each_value(
        ("stop", "skip"), (2, 1), pytest.mark.slow("other pairs; quick: each way, each number")
    ),
)
def test_a_run_by_rows_equals_a_dense_one(
    two_shards: Any, tmp_path: Path, shards: int, on_nonfinite: str
) -> None:
    distributor = one_device() if shards == 1 else two_shards
    options = {"on_nonfinite": on_nonfinite}
    dense = train(distributor, tmp_path / "dense", tf.gather, **options)
    rows = train(distributor, tmp_path / "rows", **options)
    np.testing.assert_allclose(rows, dense, atol=2e-6)
    assert np.abs(dense - 1).max() > 0.1
    _, tensors = checkpoint.read(tmp_path / "rows" / "checkpoints" / "step-00000050")
    (steps,) = (v for k, v in tensors.items() if "rowsteps" in k)
    assert set(steps) - {40, 50}  # evaluated at 40, and trained by rows since


@pytest.mark.parametrize(
    ("changes", "shards"),
    each_value(
        ({}, {"on_nonfinite": "skip"}, {"steps_per_call": 4}, {"precision": "mixed_float16"}),
        (2, 1),
        pytest.mark.slow("other pairs; quick: each way to step, one shard and two"),
    ),
)
def test_a_step_is_traced_twice_and_the_optimizer_once(
    two_shards: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    changes: dict[str, Any],
) -> None:
    traces = {"loss": 0, "apply": 0}  # Python runs their code in traces only
    apply = keras.optimizers.Adam.apply

    def counted_apply(*args: Any) -> Any:
        traces["apply"] += 1
        return apply(*args)

    def counted_read(*args: Any) -> tf.Tensor:
        traces["loss"] += 1
        return lookup(*args)

    monkeypatch.setattr(keras.optimizers.Adam, "apply", counted_apply)
    distributor = one_device() if shards == 1 else two_shards
    train(distributor, tmp_path, counted_read, steps=8, sparse_reduce="auto", **changes)
    # Once to see which gradients are of a few rows, before the optimizer's variables are made.
    assert traces == {"loss": 2 * shards, "apply": shards}


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    whole = train(one_device(), tmp_path / "whole")
    with pytest.raises(Preempted):
        train(one_device(), tmp_path / "cut", stop_at=33)
    assert train(one_device(), tmp_path / "cut").tobytes() == whole.tobytes()


@pytest.mark.parametrize("first", ["dense", "rows"])
def test_the_way_may_change_between_two_sittings(
    two_shards: Any, tmp_path: Path, first: str
) -> None:
    second = {"dense": "rows", "rows": "dense"}[first]
    with pytest.raises(Preempted):
        train(two_shards, tmp_path / "cut", stop_at=33, sparse_reduce=first)
    changed = train(two_shards, tmp_path / "cut", sparse_reduce=second)
    whole = train(two_shards, tmp_path / "whole", sparse_reduce="dense")
    np.testing.assert_allclose(changed, whole, atol=2e-6)


def test_an_optimizer_without_a_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="Ftrl has no rule"):
        rule_of(keras.optimizers.Ftrl(LearningRate(loop_settings.stage())), STEPS)
