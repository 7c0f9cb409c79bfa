"""The loop's behaviour around steps that are not finite, checkpoints that fail, and TERM."""

import json
import math
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.errors import InputError
from tests import loop_settings
from tests.pairs import each_value
from trainer import safe_files
from trainer.distribution.cluster import Cluster
from trainer.distribution.make import make_distributor
from trainer.distribution.over_batches import sum_over_batches
from trainer.distribution.preemption import Preempted
from trainer.reporting.status_server import Vitals, serving
from trainer.training import checkpoint, loop, progress
from trainer.training.health import NonFiniteError
from trainer.training.task import Task

STEPS = 8
ROWS = 4


BATCHES = loop_settings.TokenBatches(np.random.default_rng(0).integers(1, 5, (STEPS, ROWS, 3)))
USUAL = {
    "steps": STEPS,
    "schedule": "exponential",
    "learning_rate_decay": 0.9,
    "checkpoint_every_steps": 2,
    "evaluate_every_steps": 4,
    "resume": "auto",
}


def spoilt_loss(value: tf.Tensor, step: tf.Tensor, how: str, at: tuple[int, ...]) -> tf.Tensor:
    """Returns `value`, but in the steps `at` (from 0) with a loss or a gradient that is none."""
    spoilt = tf.reduce_any(step == tf.constant(at or (-1,), tf.int64))
    if how == "loss":
        return value * tf.where(spoilt, np.float32("nan"), 1.0)
    # The root of 0: its value is 0, its gradient infinite.
    return value + tf.where(spoilt, 1.0, 0.0) * tf.sqrt(value - tf.stop_gradient(value))


def train(
    distributor: Any,
    folder: Path,
    how: str = "loss",
    at: tuple[int, ...] = (),
    evaluate: Callable[[], dict] = dict,
    stop_request: Any = None,
    select_by: str = "",
    vitals: Vitals | None = None,
    replay_step: int = 0,
    **changes: Any,
) -> SimpleNamespace:
    """Trains a small model; returns its variables' values and the lines of the log."""
    keras.utils.clear_session(
        free_memory=False
    )  # names of the optimizer's variables as in a new process
    with distributor.scope():
        variables = {
            "w": keras.Variable(np.ones((5, 2), np.float32)),
            "v": keras.Variable(np.ones(2, np.float32)),
        }

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, tf.Tensor]:
        embedded = tf.reduce_mean(tf.gather(variables["w"].value, rows["tokens"]), 1)
        losses = (tf.reduce_sum(embedded * variables["v"].value, 1) - 3) ** 2
        loss = spoilt_loss(tf.reduce_sum(losses), step, how, at)
        return loss, tf.reduce_sum(rows["weights"])

    lines: list[str] = []
    flags = USUAL | changes
    task = Task(
        "pretrain", folder, loop_settings.stage(**flags), variables, loss_sum, evaluate,
        select_by=select_by, ranked_by="metric",
    )  # fmt: skip
    run = loop_settings.run(distributor, stop_request, lines.append, vitals, **flags)
    if replay_step:
        outcome, start, _ = loop.Training(run, task, BATCHES).replay(BATCHES, replay_step)
        return SimpleNamespace(outcome=outcome, start=start)
    loop.train(run, task, BATCHES)
    return SimpleNamespace(
        values={name: variable.numpy() for name, variable in variables.items()}, lines=lines
    )


@pytest.fixture
def one() -> Any:
    return make_distributor("one_device", Cluster(0, 1), 10)


DISTRIBUTORS = ("one", "two_shards")


@pytest.fixture(params=DISTRIBUTORS)
def distributor(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def state(folder: Path, step: int) -> dict[str, bytes]:
    _, tensors = checkpoint.read(folder / "checkpoints" / f"step-{step:08d}")
    return {name: array.tobytes() for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("distributor", "how"),
    each_value(
        DISTRIBUTORS,
        ("loss", "gradient"),
        pytest.mark.slow("other pairs; quick: each distributor, each cause"),
    ),
    indirect=["distributor"],
)
def test_a_step_that_is_not_finite_stops_the_run_and_says_where(
    distributor: Any, tmp_path: Path, how: str
) -> None:
    with pytest.raises(NonFiniteError) as error:
        train(distributor, tmp_path, how, at=(4,))
    said = str(error.value)
    assert said.startswith("pretrain: step 5 is not finite: loss ")
    assert ("loss nan" in said) == (how == "loss")
    assert re.search(r"by their norm: [wv] (nan|inf), [wv] (nan|inf);", said)
    assert "examples of the batch: 40, 41, 42, 43;" in said
    assert "--pretrain_learning_rate" in said and "--on_nonfinite=skip" in said
    # Nothing of it is saved.
    assert all(np.isfinite(np.frombuffer(v, np.float32)).all()
               for k, v in state(tmp_path, 4).items() if "iteration" not in k)  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir())[-1] == "step-00000004"


@pytest.mark.parametrize(
    ("distributor", "optimizer"),
    each_value(
        DISTRIBUTORS,
        ("nadam", "adamw"),
        pytest.mark.slow("other pairs; quick: each distributor, each optimizer"),
    ),
    indirect=["distributor"],
)
def test_a_skipped_step_changes_nothing(distributor: Any, tmp_path: Path, optimizer: str) -> None:
    flags = {"on_nonfinite": "skip", "optimizer": optimizer, "checkpoint_every_steps": 1,
             "keep_checkpoints": STEPS}  # fmt: skip
    done = train(distributor, tmp_path, "gradient", at=(2, 3), **flags)
    assert state(tmp_path, 2) == state(tmp_path, 3) == state(tmp_path, 4) != state(tmp_path, 5)
    skipped = [line for line in done.lines if "skipped, " in line]
    assert len(skipped) == 2 and "skipped, 2 of 10" in skipped[1]
    assert np.isfinite(done.values["w"]).all()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 5, 6, 7, 8]
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [1, 2]


def test_skips_are_bounded_over_all_sittings(one: Any, tmp_path: Path) -> None:
    flags = {"on_nonfinite": "skip", "max_skipped_steps": 2}
    train(one, tmp_path / "a", at=(1, 5), **flags)
    with pytest.raises(NonFiniteError, match="step 7 .* 2 were skipped before it"):
        train(one, tmp_path / "b", at=(1, 5, 6), **flags)
    # The checkpoint of step 6 remembers both.
    with pytest.raises(NonFiniteError, match="step 7 .* 2 were skipped before it"):
        train(one, tmp_path / "b", at=(6,), **flags)


def test_skip_and_stop_train_alike_while_all_is_finite(one: Any, tmp_path: Path) -> None:
    stop, skip = (train(one, tmp_path / how, on_nonfinite=how).values for how in ("stop", "skip"))
    for name in stop:
        np.testing.assert_allclose(stop[name], skip[name], rtol=1e-6)


@pytest.mark.parametrize("step", [4, STEPS])
def test_a_run_that_term_stops_in_an_evaluation_begins_with_it(
    one: Any, tmp_path: Path, step: int
) -> None:
    evaluated: list[int] = []

    def evaluate() -> dict[str, float]:
        evaluated.append(1)
        if len(evaluated) in (step // 4, step // 4 + 1):  # the second time, it has been resumed
            raise Preempted("as `sum_over_batches` does")
        return {"metric": 1.0}

    for _ in range(2):
        with pytest.raises(Preempted, match=f"stopped by TERM after step {step}; state saved"):
            train(one, tmp_path, evaluate=evaluate)
    whole = train(one, tmp_path / "whole", evaluate=lambda: {"metric": 1.0})
    resumed = train(one, tmp_path, evaluate=lambda: {"metric": 1.0})
    assert resumed.lines[0] == f"pretrain: resumed after step {step}"
    assert resumed.lines[1].startswith(f"pretrain step {step} · validation")
    for name, value in whole.values.items():
        assert value.tobytes() == resumed.values[name].tobytes()
    assert without_times(tmp_path / "whole") == without_times(tmp_path)


def without_times(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("unix_time", "tokens_per_second", "input_wait_percent")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def test_term_stops_a_sum_over_batches_in_all_shards(distributor: Any) -> None:
    request = SimpleNamespace(received=False)

    def sums(rows: dict) -> list[tf.Tensor]:
        return [tf.reduce_sum(rows["weights"])]

    total = sum_over_batches(distributor, sums, BATCHES(0, STEPS), request)
    assert total() == [STEPS * ROWS]
    request.received = True
    with pytest.raises(Preempted):
        total()


def test_the_best_checkpoints_are_those_of_the_lowest_metric(one: Any, tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 4.0, 9.0])
    flags = {"evaluate_every_steps": 3, "checkpoint_every_steps": 4, "keep_checkpoints": 1}
    train(one, tmp_path, evaluate=lambda: {"metric": next(values)}, keep_best=2, **flags)
    # Evaluated after 3, 6 and 8; a checkpoint after 4 and 8 by their interval.
    kept = sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["6", "8"]
    assert state(tmp_path, 6)


def test_averaged_weights_are_what_is_evaluated_and_kept(distributor: Any, tmp_path: Path) -> None:
    flags = {"optimizer": "sgd", "checkpoint_every_steps": 1, "keep_checkpoints": STEPS}
    plain = train(distributor, tmp_path / "plain", **flags)
    averaged = train(distributor, tmp_path / "averaged", ema=0.3, **flags)
    average = np.ones(2, np.float64)
    for step in range(1, STEPS + 1):
        _, tensors = checkpoint.read(tmp_path / "averaged" / "checkpoints" / f"step-{step:08d}")
        kept = min(0.3, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * tensors["v"]
        np.testing.assert_allclose(tensors["average/v"], average, rtol=1e-6)
    # Training itself goes on from the weights, not from their averages.
    np.testing.assert_array_equal(tensors["v"], plain.values["v"])
    np.testing.assert_array_equal(averaged.values["v"], tensors["average/v"])
    assert np.abs(tensors["v"] - tensors["average/v"]).max() > 1e-4


def test_a_run_with_averages_resumes_with_the_same_bits(one: Any, tmp_path: Path) -> None:
    evaluated: list[float] = []

    def evaluate() -> dict[str, float]:
        evaluated.append(float(len(evaluated)))
        return {"metric": -evaluated[-1]}

    flags = {"ema": 0.9, "select_by": "metric", "evaluate": evaluate, "evaluate_every_steps": 3}
    whole = train(one, tmp_path / "whole", **flags)
    request = SimpleNamespace(received=True)
    for _ in range(4):
        with pytest.raises(Preempted):
            train(one, tmp_path / "cut", stop_request=request, **flags)
    cut = train(one, tmp_path / "cut", **flags)
    assert state(tmp_path / "whole", STEPS) == state(tmp_path / "cut", STEPS)
    for name in whole.values:
        assert whole.values[name].tobytes() == cut.values[name].tobytes()
        assert whole.values[name].tobytes() == state(tmp_path / "cut", STEPS)[f"average/{name}"]


def test_a_run_that_ends_early_ends_there_again(one: Any, tmp_path: Path) -> None:
    flags = {"select_by": "metric", "evaluate_every_steps": 2, "early_stopping": 2}

    def metrics(*values: float) -> Callable[[], dict[str, float]]:
        found = iter(values)
        return lambda: {"metric": next(found)}

    whole = train(one, tmp_path, evaluate=metrics(3.0, 4.0, 5.0), **flags)
    assert any("ended after step 6 of 8: no better since step 2" in line for line in whole.lines)
    again = train(one, tmp_path, evaluate=metrics(), **flags)  # takes no step, evaluates nothing
    assert again.values["w"].tobytes() == whole.values["w"].tobytes()
    best = train(one, tmp_path / "best", evaluate=metrics(3.0), **flags | {"steps": 2})
    assert whole.values["w"].tobytes() == best.values["w"].tobytes()


def test_a_step_that_is_replayed_has_the_same_numbers_and_leaves_the_run_alone(
    distributor: Any, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match="--stage=replay --run_dir=.* --step=6` shows"):
        train(distributor, tmp_path, at=(5,), log_every_steps=1, keep_checkpoints=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for step, start in ((6, 4), (3, 0)):  # of the checkpoints only that of step 4 is left
        replayed = train(distributor, tmp_path, at=(5,), keep_checkpoints=1, replay_step=step)
        assert replayed.start == start
        assert replayed.outcome.norms.shape == (2,)
        np.testing.assert_equal(float(replayed.outcome.loss), losses.get(step, math.nan))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_run_says_over_http_how_far_it_is(one: Any, tmp_path: Path) -> None:
    vitals, said = Vitals(), []
    with serving("127.0.0.1", 0, vitals) as port:

        def evaluate() -> dict[str, float]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                said.append(answer.read().decode())
            return {"metric": 1.0}

        train(one, tmp_path, evaluate=evaluate, vitals=vitals)
    for step, text in zip((4, 8), said, strict=True):
        values = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
        assert float(values['warmstate_step{stage="pretrain"}']) == step
        assert float(values['warmstate_steps{stage="pretrain"}']) == 8
        assert float(values['warmstate_loss{stage="pretrain"}']) > 0
        assert float(values['warmstate_tokens_per_second{stage="pretrain"}']) > 0
        assert 0 <= float(values['warmstate_seconds_since_last_step{stage="pretrain"}']) < 60
    # By then, for the save after step 4 waited for it, the one of step 2 is written.
    assert 0 <= float(values['warmstate_checkpoint_age_seconds{stage="pretrain"}']) < 60


def test_a_run_without_lines_gives_a_sign_of_life(
    one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.0)
    done = train(one, tmp_path, log_every_steps=5)
    assert "pretrain step 2/8 · still running" in done.lines
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("heartbeat")] == list(range(1, 9))


@pytest.mark.parametrize("errors", ["stop", "warn"])
def test_a_metrics_file_that_cannot_be_written_is_treated_as_a_checkpoint(
    one: Any, tmp_path: Path, errors: str
) -> None:
    path = tmp_path / "metrics.jsonl"

    def evaluate() -> dict[str, float]:
        path.unlink()
        path.symlink_to("elsewhere")  # what is written follows no link
        return {"metric": 1.0}

    says = "metrics.jsonl cannot be written after step 4: Too many levels of symbolic links"
    if errors == "stop":
        with pytest.raises(InputError, match=says):
            train(one, tmp_path, evaluate=evaluate)
    else:
        lines = train(one, tmp_path, evaluate=evaluate, checkpoint_errors="warn").lines
        assert any("warning: " in line and says in line for line in lines)
        assert any("step 8/8" in line for line in lines)
        assert state(tmp_path, 8)


def test_a_metrics_file_that_cannot_be_read_is_said_before_a_step(one: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="metrics.jsonl.* Is a directory: make"):
        train(one, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_with_other_notes_is_refused(one: Any, tmp_path: Path) -> None:
    train(one, tmp_path)
    path = tmp_path / "checkpoints" / f"step-{STEPS:08d}" / "state.json"
    values = safe_files.read_sealed(path)
    values["notes"]["seconds"] = "many"
    path.write_bytes(safe_files.sealed(values))
    with pytest.raises(ValueError, match="another version of this program"):
        train(one, tmp_path)


def test_several_steps_in_one_call_give_the_same_bits(distributor: Any, tmp_path: Path) -> None:
    evaluations: list[int] = []

    def evaluate() -> dict[str, float]:
        evaluations.append(1)
        return {"metric": 1.0}

    periods = {"checkpoint_every_steps": 5, "evaluate_every_steps": 3, "log_every_steps": 4}
    one, three = (
        train(distributor, tmp_path / str(k), evaluate=evaluate, steps_per_call=k, **periods)
        for k in (1, 3)
    )
    assert len(evaluations) == 2 * 3  # after 3, 6 and 8 steps
    assert state(tmp_path / "1", 5) == state(tmp_path / "3", 5)
    for name, value in one.values.items():
        assert value.tobytes() == three.values[name].tobytes()
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / k / "metrics.jsonl").open()]
        for k in "13"
    ]
    assert losses[0] == losses[1]


def test_several_steps_in_one_call_end_at_one_that_is_not_finite(one: Any, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as error:
        train(one, tmp_path, "gradient", at=(5,), steps_per_call=8, log_every_steps=8,
              checkpoint_every_steps=4, evaluate_every_steps=8)  # fmt: skip
    said = str(error.value)
    assert said.startswith("pretrain: step 6 is not finite: loss ")
    assert "examples of the batch: 50, 51, 52, 53;" in said
    assert state(tmp_path, 4)


def test_term_stops_a_run_between_two_calls(one: Any, tmp_path: Path) -> None:
    request = SimpleNamespace(received=True)
    with pytest.raises(Preempted, match="stopped by TERM after step 4; state saved"):
        train(one, tmp_path, stop_request=request, steps_per_call=8, log_every_steps=4,
              checkpoint_every_steps=8, evaluate_every_steps=8)  # fmt: skip
    assert state(tmp_path, 4)


@pytest.mark.parametrize(
    ("distributor", "changes"),
    each_value(
        DISTRIBUTORS,
        (
            {"steps_per_call": 3},
            {"check_divergence": True},
            {"on_nonfinite": "skip"},
            {"accumulate_steps": 2},
        ),
        pytest.mark.slow("other pairs; quick: each distributor, each way to step"),
    ),
    indirect=["distributor"],
)
def test_what_rows_carry_is_kept_for_the_whole_global_batch(
    distributor: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    at = (2,) if "on_nonfinite" in changes else ()
    keras.utils.clear_session(free_memory=False)
    with distributor.scope():
        weight = keras.Variable(np.ones(2, np.float32))
        carried = keras.Variable(np.zeros((ROWS, 2), np.float32))

    def loss_sum(rows: dict, step: tf.Tensor, shard: Any) -> tuple[tf.Tensor, ...]:
        new = rows["carried"] / 2 + tf.cast(rows["tokens"][:, :2], tf.float32)
        loss = tf.reduce_sum(new * weight.value)
        return spoilt_loss(loss, step, "loss", at), tf.reduce_sum(rows["weights"]), new

    stage = loop_settings.stage(**USUAL)
    task = Task("pretrain", tmp_path, stage, {"weight": weight}, loss_sum, dict, carried=carried)
    loop.train(loop_settings.run(distributor, **USUAL | changes), task, BATCHES)
    expected = np.zeros((ROWS, 2), np.float32)
    for step, batch in enumerate(BATCHES(0, STEPS)):
        if step not in at:  # a step that is left out changes nothing
            expected = expected / 2 + batch["tokens"].numpy()[:, :2].astype(np.float32)
    np.testing.assert_array_equal(carried.numpy(), expected)
    assert state(tmp_path, STEPS)["carried"] == expected.tobytes()
