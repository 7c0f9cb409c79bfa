"""Training by rows gives what the dense optimizer gives, and touches nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import loop_settings
from trainer.distribution.distributor import reduce_inside_step_only
from trainer.distribution.preemption import Preempted
from trainer.distribution.tf_distribute import one_device
from trainer.training import checkpoint, loop
from trainer.training.lazy_rows import Tables, rule_of
from trainer.training.optimizer import Rate, make_optimizer, optimizer_variables, set_rates
from trainer.training.schedules import Schedule
from trainer.training.task import Task
from trainer.training.train_step import make_train_step
from trainer.variables import lookup

STEPS = 60
ROWS, WIDTH = 40, 3
VOCABULARY = 1_000


def apply_steps(distributor: Any, name: str, rate: Rate, by_rows: bool) -> np.ndarray:
    """Returns a table after STEPS steps of which each has gradients for up to three rows."""
    random = np.random.default_rng(1)
    with distributor.scope():
        table = keras.Variable(np.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH), "float64")
        optimizer = make_optimizer(name, Schedule("exponential", 0.01, 0.99))
        optimizer.build([table])
    reduce_inside_step_only(optimizer)
    set_rates(optimizer, {"table": table}, {"table": rate})
    if by_rows:
        with distributor.scope():
            tables = Tables(
                distributor, optimizer, [table], [True], [True], [rule_of(optimizer, STEPS, *rate)]
            )

    @tf.function(reduce_retracing=True)
    def step(indices: tf.Tensor, values: tf.Tensor) -> None:
        def of_shard(indices: tf.Tensor, values: tf.Tensor) -> None:
            gradient = tf.IndexedSlices(values, indices, (ROWS, WIDTH))
            optimizer.apply([gradient if by_rows else tf.convert_to_tensor(gradient)], [table])

        distributor.run(of_shard, indices, values)

    for k in range(STEPS):
        indices = np.unique(np.minimum(random.geometric(0.1, 3), ROWS - 1))
        values = random.normal(size=(len(indices), WIDTH)) * 10.0 ** -random.integers(1, 5)
        step(tf.constant(indices), tf.constant(values))
        if by_rows and k in (STEPS // 2, STEPS - 1):
            tables.settle()
    return table.numpy()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "nadam"])
@pytest.mark.parametrize("shards", [1, 2])
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


class Batches:
    """A word or two a step, so that most rows are behind."""

    def __call__(self, start: int, stop: int) -> tf.data.Dataset:
        tokens = np.random.default_rng(0).geometric(0.05, (STEPS, 2, 1)).astype(np.int32)

        def load(step: tf.Tensor) -> dict:
            return {
                "tokens": tf.gather(tokens, step),
                "lengths": tf.fill([2], 1),
                "labels": tf.zeros([2], tf.int32),
                "weights": tf.ones([2]),
                "row_starts": tf.constant([0, 1, 2]),
                "step": step,
            }

        return tf.data.Dataset.range(start, stop).map(load)


def train(
    distributor: Any, folder: Path, read: Any = lookup, stop_at: int = 0, **changes: Any
) -> np.ndarray:
    """Trains a table; returns it. With `stop_at`, TERM comes before that step."""
    keras.utils.clear_session()
    with distributor.scope():
        table = keras.Variable(np.ones((VOCABULARY, WIDTH), np.float32), name="table")
    request = SimpleNamespace(received=False)

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, tf.Tensor]:
        targets = tf.sin(tf.cast(rows["tokens"] * step_of(step), tf.float32))[:, :, None]
        losses = (read(table.value, rows["tokens"]) - targets) ** 2
        return tf.reduce_sum(losses), tf.reduce_sum(rows["weights"])

    def step_of(step: tf.Tensor) -> tf.Tensor:
        return tf.cast(step % 7, tf.int32) + 1

    class StopsAt(Batches):
        def __call__(self, start: int, stop: int) -> Any:
            for step, batch in enumerate(super().__call__(start, stop), start + 1):
                request.received = step == stop_at
                yield batch

    class Counted(StopsAt):
        def __call__(self, start: int, stop: int) -> Any:
            return Batches.__call__(self, 0, 1) if stop == 1 else super().__call__(start, stop)

    task = Task("pretrain", {"table": table}, loss_sum, dict)
    settings = loop_settings.settings(
        **{
            "folder": folder, "steps": STEPS, "resume": True,
            "schedule": Schedule("constant", 0.01),
            "checkpoint_every_steps": 50, "evaluate_every_steps": 20, "sparse_reduce": "rows",
        } | changes
    )  # fmt: skip
    loop.train(task, settings, distributor, Counted(), request, lambda line: None)
    return table.numpy()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("shards", [1, 2])
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
    "changes",
    [{}, {"on_nonfinite": "skip"}, {"scale_loss": True}, {"steps_per_call": 4}],
    ids=["plain", "skip", "loss scale", "steps a call"],
)
@pytest.mark.parametrize("shards", [1, 2])
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


def test_a_step_makes_no_tensor_of_the_vocabulary(tmp_path: Path) -> None:
    distributor = one_device()
    with distributor.scope():
        table = keras.Variable(np.ones((VOCABULARY, WIDTH), np.float32), name="table")
        optimizer = make_optimizer("adam", Schedule("exponential", 0.01, 0.9))
        optimizer.build([table])
    reduce_inside_step_only(optimizer)

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.reduce_sum(lookup(table.value, rows["tokens"]) ** 2), tf.constant(2.0)

    task = Task("pretrain", {"table": table}, loss_sum, dict)
    settings = loop_settings.settings(folder=tmp_path, steps=STEPS)
    step, _ = make_train_step(task, optimizer, distributor, settings, Batches())
    assert any("rowsteps" in name for name in optimizer_variables(optimizer))
    made, functions = [], [step.get_concrete_function().graph]
    functions += [f.graph for f in functions[0]._functions.values() if hasattr(f, "graph")]
    for graph in functions:
        for operation in graph.get_operations():
            for tensor in operation.outputs:
                if tensor.dtype != tf.resource and tensor.shape.num_elements():
                    made.append((tensor.shape.num_elements(), operation.name))
    assert made and max(made)[0] < VOCABULARY, max(made)
