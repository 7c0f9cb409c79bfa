"""The one training loop, of both stages.

N workers compute what one would: the loss and the gradients are sums over all tokens or
examples of the global batch, divided by their number after the reduction, and clipped by the
global norm after that.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from trainer import bundle
from trainer.averages import Averages
from trainer.checkpoint import Checkpointer
from trainer.distribution.distributor import (
    Distributor,
    broadcast_arrays,
    is_chief,
    num_shards,
    reduce_inside_step_only,
)
from trainer.distribution.divergence import check_equal
from trainer.distribution.reduction import choose_rows, reduce_gradients
from trainer.distribution.steps import local_rows
from trainer.gradients import Gradient, divided, loss_and_gradients
from trainer.health import NonFiniteError, StallWatchdog, describe_nonfinite
from trainer.loss_scale import LossScale
from trainer.optimizer import Rate, make_optimizer, optimizer_variables, set_rates
from trainer.preemption import Preempted, StopRequest
from trainer.replay import Replayed, replay
from trainer.reporting.live import LiveStatus
from trainer.reporting.profile import Profiler
from trainer.reporting.status import Metrics, describe, format_seconds
from trainer.reporting.status_server import Vitals
from trainer.reporting.trackers import Tracker
from trainer.schedules import Schedule
from trainer.tables import Tables, find_tables, rule_of

HEARTBEAT_SECONDS = 60.0  # metrics.jsonl and the log have a line at least so often, between steps
# rows (tokens, lengths, labels, weights), step, slice -> the summed loss and its weight; the slice
# of the global batch is a number that random draws depend on. A task that carries state is given
# that of each row too, as `carried`, and returns it, as it is at the rows' ends, as a third tensor.
LossSum = Callable[[dict, tf.Tensor, int | tf.Tensor], tuple[tf.Tensor, ...]]


@dataclass(frozen=True)
class Task:
    """What a stage trains.

    Attributes:
      name: of the stage, for the status line.
      variables: those that are trained, by name.
      loss_sum: see LossSum; the weight is a number of tokens or of examples.
      evaluate: returns metrics by name; a collective.
      rates: learning rates of their own, by name of the variable.
      select_by: the metric, lower is better, whose best weights the stage ends with; "" keeps
        the last ones.
      ranked_by: the metric, lower is better, by which `keep_best` ranks where there is no
        `select_by`.
      carried: [global batch, numbers], the state in which each row of the step before ended, for
        batches whose rows continue those of the step before. None: nothing is carried.
    """

    name: str
    variables: Mapping[str, keras.Variable]
    loss_sum: LossSum
    evaluate: Callable[[], dict[str, float]]
    rates: Mapping[str, Rate] = field(default_factory=dict)
    select_by: str = ""
    ranked_by: str = ""
    carried: keras.Variable | None = None

    @property
    def state(self) -> dict[str, keras.Variable]:
        """Returns what a step changes, but for the optimizer's variables."""
        carried = {} if self.carried is None else {"carried": self.carried}
        return {**self.variables, **carried}


@dataclass(frozen=True)
class Settings:
    """How a stage trains; the flags of the same names describe the fields."""

    folder: Path
    steps: int
    steps_per_epoch: int
    schedule: Schedule
    optimizer: str
    clip_norm: float
    accumulate_steps: int
    sparse_reduce: str
    compress: str
    check_divergence: bool
    log_every_steps: int
    checkpoint_every_steps: int
    evaluate_every_steps: int
    resume: bool
    keep_checkpoints: int = 2
    keep_best: int = 0
    checkpoint_errors: str = "stop"
    on_nonfinite: str = "stop"
    max_skipped_steps: int = 10
    stall_seconds: float = 0.0
    trackers: Sequence[Tracker] = ()
    ema: float = 0.0
    steps_per_call: int = 1
    profile_steps: tuple[int, int] = (0, 0)
    replay_step: int = 0
    scale_loss: bool = False


@dataclass(frozen=True)
class Result:
    """What a stage ended with.

    Attributes:
      metrics: of the last evaluation, or of the best one where the task selects by one.
      step: the step that they are of.
      seconds: spent, over all sittings of the run, evaluation and checkpoints included.
      tokens_per_second: of all workers together, in training steps only.
    """

    metrics: dict[str, float]
    step: int
    seconds: float
    tokens_per_second: float


def train(
    task: Task,
    settings: Settings,
    distributor: Distributor,
    batches: Callable[[int, int], tf.data.Dataset],
    stop_request: StopRequest,
    log: Callable[[str], None],
    vitals: Vitals | None = None,
) -> Result:
    """Trains until `settings.steps`, from the newest checkpoint where there is one.

    Args:
      batches: (start_step, stop_step) -> this process's slices of those global batches. Where it
        has a method `examples(step)`, that says for an error which examples a batch is made of.
      vitals: where it is noted how the run is, for others to see.

    Raises:
      Preempted: TERM came to any worker; the state is saved.
      Replayed: `settings.replay_step` is set: that step was run again, and nothing written.
      NonFiniteError: the loss or a gradient is not finite, and may not be skipped.
      InputError: a checkpoint cannot be read, or written and `settings.checkpoint_errors` is stop.
      DivergenceError: `settings.check_divergence`, and workers hold different weights.
    """
    with distributor.scope():
        optimizer = make_optimizer(settings.optimizer, settings.schedule)
        optimizer.build(list(task.variables.values()))
    reduce_inside_step_only(optimizer)
    set_rates(optimizer, task.variables, task.rates)
    with distributor.scope():
        loss_scale = LossScale() if settings.scale_loss else None
    train_step, tables = make_train_step(
        task, optimizer, distributor, settings, batches, loss_scale
    )
    several_steps = make_several_steps(train_step)
    averages = Averages(task.variables, settings.ema, distributor) if settings.ema else None
    checkpoints = Checkpointer(
        settings.folder / "checkpoints",
        distributor,
        {
            **task.state,
            **optimizer_variables(optimizer),
            **(averages.variables if averages else {}),
            **(loss_scale.variables if loss_scale else {}),
        },
        log,
        settings.keep_checkpoints,
        settings.checkpoint_errors,
        settings.keep_best,
    )
    metrics = Metrics(settings.folder / "metrics.jsonl", task.name, settings.trackers)
    examples = getattr(batches, "examples", lambda step: [])
    vitals = vitals or Vitals()
    progress = Progress(
        task, settings, distributor, checkpoints, metrics, log, examples, averages, vitals
    )
    profile_first, profile_last = settings.profile_steps if is_chief(distributor) else (0, 0)
    profiler = Profiler(profile_first, profile_last, settings.folder / "profile", log)
    if settings.replay_step:

        def step_again(batch: dict, step: int) -> Outcome:
            outcome = train_step(batch, tf.constant(0.0))
            if averages or is_evaluated(step, settings):
                tables.settle(distributor)
            return outcome

        def restore() -> tuple | None:
            restored = checkpoints.restore(before=settings.replay_step)
            tables.after_restore(distributor)
            if restored and is_evaluated(restored[0], settings):
                tables.settle(distributor)
            return restored

        log = log if is_chief(distributor) else lambda line: None
        names = list(task.variables)
        raise Replayed(replay(settings.replay_step, names, restore, batches, step_again, log))
    if not settings.resume:
        checkpoints.forget()
    start = progress.resume()
    tables.after_restore(distributor)
    if is_chief(distributor):
        settings.folder.mkdir(parents=True, exist_ok=True)
        metrics.forget_after(start, evaluated=not progress.evaluation_is_due(start))

    try:
        with StallWatchdog(settings.stall_seconds) as watchdog:
            if progress.evaluation_is_due(start):  # TERM cut it off
                tables.settle(distributor)
                if not progress.evaluate(start):
                    raise Preempted(f"{task.name}: stopped by TERM after step {start}; state saved")
                tables.before_save()
                progress.save(start)
            vitals.begin(task.name, start, settings.steps)
            step, iterator = start, iter(batches(start, settings.steps))
            while step < settings.steps:
                count = min(settings.steps_per_call, steps_until_due(settings, step))
                profiler.before(step + 1)
                wait_seconds = None
                stop = tf.constant(float(stop_request.received))
                if settings.steps_per_call == 1:
                    began = time.perf_counter()
                    with tf.profiler.experimental.Trace("input_wait"):
                        batch = next(iterator)
                    wait_seconds = time.perf_counter() - began
                    began = time.perf_counter()
                    outcome = train_step(batch, stop)
                    outcome.loss.numpy()  # waits for a step that is still being computed
                    outcomes = [outcome]
                else:
                    began = time.perf_counter()
                    outcomes = several_steps(iterator, count, stop)
                if averages and outcomes[-1].is_finite():
                    tables.settle(distributor)  # an average is of all rows
                    averages.update(optimizer.iterations.value)
                # The first call traces the graph: its time says nothing of the others.
                seconds = (time.perf_counter() - began) / len(outcomes) if step > start else None
                for outcome in outcomes:
                    step += 1
                    progress.count(step, outcome, seconds, wait_seconds)
                profiler.after(step)
                watchdog.beat()
                if step % settings.log_every_steps == 0 or step == settings.steps:
                    progress.report(step)
                preempted = float(outcome.stops) > 0
                evaluates = progress.evaluation_is_due(step) and not preempted
                if evaluates:
                    tables.settle(distributor)
                    preempted = not progress.evaluate(step)
                    watchdog.beat()
                    vitals.beat = time.monotonic()
                if (
                    step % settings.checkpoint_every_steps == 0
                    or (evaluates and settings.keep_best)
                    or step == settings.steps
                    or preempted
                ):
                    tables.before_save()
                    progress.save(step)
                if preempted:
                    saved = "state saved" if checkpoints.wait() else "state NOT saved"
                    raise Preempted(f"{task.name}: stopped by TERM after step {step}; {saved}")
        checkpoints.wait()
    finally:
        profiler.close()
        checkpoints.close()
        vitals.stage = ""
    return progress.finish()


def steps_until_due(settings: Settings, step: int) -> int:
    """Returns how many steps come before there is something else to do than to step."""
    periods = (
        settings.log_every_steps,
        settings.checkpoint_every_steps,
        settings.evaluate_every_steps,
    )
    first, last = settings.profile_steps
    stops = [settings.steps, first - 1, last, *(step - step % p + p for p in periods)]
    return min(stop for stop in stops if stop > step) - step


def is_evaluated(step: int, settings: Settings) -> bool:
    """Returns whether the state after `step` is one that is evaluated."""
    return step > 0 and (step % settings.evaluate_every_steps == 0 or step == settings.steps)


class Outcome(NamedTuple):
    """What a step gives, of the global batch; the same in every worker.

    Attributes:
      loss: the mean, a scalar.
      tokens: read, a scalar.
      stops: how many shards were asked to stop, a scalar.
      norms: of each variable's gradient before clipping, [variables].
    """

    loss: tf.Tensor
    tokens: tf.Tensor
    stops: tf.Tensor
    norms: tf.Tensor

    def is_finite(self) -> bool:
        """Returns whether the loss and the gradients are finite."""
        return bool(np.isfinite(self.loss.numpy()) and np.isfinite(self.norms.numpy()).all())


def new_totals() -> dict[str, Any]:
    """Returns what `Progress` adds up between two status lines."""
    return {"loss": [], "tokens": 0.0, "seconds": 0.0, "wait_seconds": 0.0}


def make_train_step(
    task: Task,
    optimizer: keras.optimizers.Optimizer,
    distributor: Distributor,
    settings: Settings,
    batches: Callable[[int, int], tf.data.Dataset],
    loss_scale: LossScale | None = None,
) -> tuple[Callable[[dict, tf.Tensor], Outcome], Tables]:
    """Returns (batch, stop asked for here) -> the step's outcome; and the tables that it trains.

    Where `settings.on_nonfinite` is "skip", a step that is not finite changes no variable. Its
    gradients then pass from one function to a second: Keras cannot apply them inside a tf.cond
    under a strategy. Where it is "stop" they are applied, and the variables no longer of use.
    With a loss scale, a step of which only the gradients are not finite is tried again.

    Args:
      optimizer: built for the task's variables; it has the tables' variables after this.
      batches: as in `train`.
    """
    first = batches(0, 1)  # what is measured on it must not depend on where the run resumes
    variables = list(task.variables.values())
    tensors = [variable.value for variable in variables]

    def loss_sum(rows: dict, step: tf.Tensor, part: int | tf.Tensor) -> tuple[tf.Tensor, ...]:
        loss, *others = task.loss_sum(rows, step, part)
        return (loss if loss_scale is None else loss * loss_scale.factor(), *others)

    def shard_gradients(
        batch: dict,
    ) -> tuple[tf.Tensor, tf.Tensor, list[Gradient], list[tf.Tensor]]:
        rows = local_rows(distributor, batch)
        if task.carried is not None:
            rows["carried"] = carried_rows(distributor, task.carried.value)
        return loss_and_gradients(
            lambda rows, part: loss_sum(rows, batch["step"], part),
            tensors,
            rows,
            distributor.local_shard() + distributor.rank * distributor.num_local_shards,
            settings.accumulate_steps,
        )

    as_rows = choose_rows(
        distributor,
        settings.sparse_reduce,
        lambda batch: shard_gradients(batch)[2],
        first,
        sizes=[
            (t.dtype.size * math.prod(t.shape), t.dtype.size * math.prod(t.shape[1:]))
            for t in tensors
        ],
    )

    found = find_tables(
        distributor, variables, lambda batch: shard_gradients(batch)[2], first.element_spec
    )
    one_shard = num_shards(distributor) == 1
    by_rows = [is_table and (one_shard or r) for is_table, r in zip(found, as_rows, strict=True)]
    no_rate = Rate(1.0, 0)
    rules = {
        rate: rule_of(optimizer, settings.steps, *rate) for rate in {no_rate, *task.rates.values()}
    }
    rules = [rules[task.rates.get(name, no_rate)] for name in task.variables]
    with distributor.scope():
        tables = Tables(optimizer, variables, found, by_rows, rules)

    def reduced(batch: dict, stop: tf.Tensor) -> tuple[Outcome, list[tf.Tensor], list[tf.Tensor]]:
        rows = local_rows(distributor, batch)
        with tables.read_up_to_date():
            loss, weight, gradients, carried = shard_gradients(batch)
        carried = [in_global_batch(distributor, part, task.carried.shape) for part in carried]
        tokens = tf.reduce_sum(
            tf.cast(rows["lengths"] * tf.cast(rows["weights"] > 0, tf.int32), weight.dtype)
        )
        # Of their own, before the gradients: they are known before the backward pass begins.
        loss, weight, tokens, stop, *carried = distributor.all_reduce_sum(
            [loss, weight, tokens, tf.cast(stop, weight.dtype), *carried]
        )
        if loss_scale is not None:
            loss /= loss_scale.factor()
        divisor = weight if loss_scale is None else weight * loss_scale.factor()
        gradients = [divided(gradient, divisor) for gradient in gradients]
        with tf.name_scope("collective"):
            gradients = reduce_gradients(
                distributor, gradients, as_rows, settings.compress, by_rows
            )
        # As tf.linalg.global_norm does, which keeps those of the variables to itself.
        halves = tf.stack(
            [tf.nn.l2_loss(g.values if isinstance(g, tf.IndexedSlices) else g) for g in gradients]
        )
        norm = tf.sqrt(2 * tf.reduce_sum(halves))
        gradients, _ = tf.clip_by_global_norm(gradients, settings.clip_norm, use_norm=norm)
        outcome = Outcome(loss / weight, tokens, stop, tf.sqrt(2 * halves))
        return outcome, gradients, carried

    def reduce_and_apply(batch: dict, stop: tf.Tensor) -> tuple[Outcome, list[tf.Tensor]]:
        outcome, gradients, carried = reduced(batch, stop)
        with tf.name_scope("optimizer"):
            optimizer.apply(gradients, variables)
        return outcome, carried

    def carry(carried: list[tf.Tensor]) -> None:
        for value in carried:
            task.carried.assign(value)

    def step_and_carry(batch: dict, stop: tf.Tensor) -> Outcome:
        outcome, carried = distributor.run(reduce_and_apply, batch, stop)
        carry(carried)
        return outcome

    signature = [first.element_spec, tf.TensorSpec([], tf.float32)]
    if settings.on_nonfinite == "stop" and loss_scale is None:
        whole = tf.function(step_and_carry, input_signature=signature, autograph=False)
        return whole, tables

    reduce = tf.function(
        lambda batch, stop: distributor.run(reduced, batch, stop),
        input_signature=signature,
        autograph=False,
    )
    apply = tf.function(
        lambda gradients: distributor.run(lambda g: optimizer.apply(g, variables), gradients),
        autograph=False,
    )

    def train_step(batch: dict, stop: tf.Tensor) -> Outcome:
        outcome, gradients, carried = reduce(batch, stop)
        while loss_scale and np.isfinite(outcome.loss) and not outcome.is_finite():
            if not loss_scale.shrink():
                break
            outcome, gradients, carried = reduce(batch, stop)
        if outcome.is_finite():
            apply(gradients)
            carry(carried)
            if loss_scale:
                loss_scale.grow()
        return outcome

    return train_step, tables


def make_several_steps(
    train_step: Callable[[dict, tf.Tensor], Outcome],
) -> Callable[[Iterator, int, tf.Tensor], list[Outcome]]:
    """Returns (iterator of batches, number of steps, stop asked for here) -> the steps' outcomes.

    All steps are one call, of which the host waits for the end. It ends at a step that is not
    finite, and there are fewer outcomes then; only the last one has its own norms.

    Args:
      train_step: a tf.function.
    """

    @tf.function(autograph=False)
    def run(iterator: Iterator, count: tf.Tensor, stop: tf.Tensor) -> tuple:
        kinds = train_step.get_concrete_function().structured_outputs

        def step(done: tf.Tensor, _: tf.Tensor, losses: Any, tokens: Any, *last: Any) -> tuple:
            outcome = train_step(next(iterator), stop)
            finite = tf.math.is_finite(outcome.loss)
            finite &= tf.reduce_all(tf.math.is_finite(outcome.norms))
            losses, tokens = losses.write(done, outcome.loss), tokens.write(done, outcome.tokens)
            return done + 1, finite, losses, tokens, outcome.stops, outcome.norms

        _, _, losses, tokens, stops, norms = tf.while_loop(
            lambda done, finite, *_: (done < count) & finite,
            step,
            (
                0,
                True,
                tf.TensorArray(kinds.loss.dtype, 0, dynamic_size=True),
                tf.TensorArray(kinds.tokens.dtype, 0, dynamic_size=True),
                tf.zeros([], kinds.stops.dtype),
                tf.zeros(kinds.norms.shape, kinds.norms.dtype),
            ),
            parallel_iterations=1,
        )
        return losses.stack(), tokens.stack(), stops, norms

    def several_steps(iterator: Iterator, count: int, stop: tf.Tensor) -> list[Outcome]:
        losses, tokens, stops, norms = run(iterator, tf.constant(count), stop)
        done = len(losses)
        finite = tf.zeros_like(norms)
        return [
            Outcome(losses[i], tokens[i], stops, norms if i == done - 1 else finite)
            for i in range(done)
        ]

    return several_steps


def carried_rows(distributor: Distributor, carried: tf.Tensor) -> tf.Tensor:
    """Returns, inside a step, this shard's rows of what the global batch carries."""
    start, stop = shard_range(distributor, carried.shape[0])
    return carried[start:stop]


def in_global_batch(distributor: Distributor, rows: tf.Tensor, shape: tuple[int, int]) -> tf.Tensor:
    """Returns this shard's rows in their places, all else 0: the sum over shards has them all."""
    start, stop = shard_range(distributor, shape[0])
    return tf.ensure_shape(tf.pad(rows, [[start, shape[0] - stop], [0, 0]]), shape)


def shard_range(distributor: Distributor, num_rows: int) -> tuple[int | tf.Tensor, int | tf.Tensor]:
    """Returns, inside a step, this shard's slice [start, stop) of `num_rows` rows."""
    shard = distributor.local_shard() + distributor.rank * distributor.num_local_shards
    shards = num_shards(distributor)
    # As `data_pipelines.batch_plan.shard_rows`; the shard may be a tensor.
    return num_rows * shard // shards, num_rows * (shard + 1) // shards


class Progress:
    """The loop's bookkeeping: what it says, writes, saves and remembers."""

    def __init__(
        self,
        task: Task,
        settings: Settings,
        distributor: Distributor,
        checkpoints: Checkpointer,
        metrics: Metrics,
        log: Callable[[str], None],
        examples: Callable[[int], list[int]],
        averages: Averages | None,
        vitals: Vitals,
    ):
        self._task = task
        self._settings = settings
        self._distributor = distributor
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._log = log
        self._examples = examples
        self._averages = averages
        self._vitals = vitals
        self._notes = {
            "seconds": 0.0,
            "tokens": 0.0,
            "step_seconds": 0.0,
            "metrics": {},
            "step": 0,
            "skipped_steps": 0,
            "evaluated_step": 0,
            "shards": 0,
        }
        self._best: dict[str, np.ndarray] = {}
        self._value = math.inf  # of the last evaluation
        self._since_report = new_totals()
        self._live = LiveStatus(log, task.name, settings.steps, settings.steps_per_epoch)
        self._began = time.perf_counter()
        self._steps_here = 0
        self._line_time = time.monotonic()  # of the last line of metrics.jsonl

    def resume(self) -> int:
        """Restores the newest checkpoint; returns the step that it was taken after, or 0."""
        restored = self._checkpoints.restore()
        if restored is None:
            return 0
        step, notes, self._best = restored
        kinds = {name: type(value) for name, value in self._notes.items()}
        known = {name: type(value) for name, value in notes.items()} == kinds
        if not known or any(type(v) not in (int, float) for v in notes["metrics"].values()):
            raise InputError(
                f"the checkpoint of step {step} in {self._settings.folder} is of another version "
                "of this program: start again with --resume=never"
            )
        self._notes = notes
        if is_chief(self._distributor):
            self._log(f"{self._task.name}: resumed after step {step}")
        return step

    def count(
        self, step: int, outcome: Outcome, seconds: float | None, wait_seconds: float | None
    ) -> None:
        """Takes in one step.

        Args:
          seconds: that it took; None where it is not to be counted.
          wait_seconds: that its batch was waited for; None where that is not known.

        Raises:
          NonFiniteError: it is not finite, and may not be skipped.
        """
        loss, tokens = float(outcome.loss), float(outcome.tokens)
        if outcome.is_finite():
            self._since_report["loss"].append(loss)
        else:
            self._skip(step, outcome)
        vitals, now = self._vitals, time.monotonic()
        vitals.step, vitals.loss, vitals.beat = step, loss, now
        vitals.saved = self._checkpoints.saved
        if is_chief(self._distributor) and now - self._line_time > HEARTBEAT_SECONDS:
            self._write_metrics(step, heartbeat=True)
            self._log(f"{self._task.name} step {step}/{self._settings.steps} · goes on")
        recent = self._since_report
        self._steps_here += 1
        if seconds is None:
            return
        for totals, key in ((recent, "seconds"), (self._notes, "step_seconds")):
            totals[key] += seconds
        recent["wait_seconds"] += wait_seconds or 0.0
        for totals in (recent, self._notes):
            totals["tokens"] += tokens
        self._live.count(step, loss, tokens, seconds, wait_seconds, self._remaining_seconds(step))

    def _remaining_seconds(self, step: int) -> float:
        return self._elapsed_here() / self._steps_here * (self._settings.steps - step)

    def _skip(self, step: int, outcome: Outcome) -> None:
        """Counts a step that is not finite and says so, or raises NonFiniteError."""
        name, settings = self._task.name, self._settings
        norms = dict(zip(self._task.variables, outcome.norms.numpy().tolist(), strict=True))
        said = describe_nonfinite(step, float(outcome.loss), norms, self._examples(step - 1))
        advice = f"{self._replay_command(step)} shows the step; try a lower "
        advice += f"--{name}_learning_rate or --clip_norm"
        if settings.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{name}: {said}; {advice}, or leave such steps out with --on_nonfinite=skip"
            )
        self._notes["skipped_steps"] += 1
        skipped = self._notes["skipped_steps"]
        if skipped > settings.max_skipped_steps:
            raise NonFiniteError(
                f"{name}: {said}; {skipped - 1} were left out before it, and "
                f"--max_skipped_steps={settings.max_skipped_steps}; {advice}"
            )
        if is_chief(self._distributor):
            self._write_metrics(step, skipped_steps=skipped)
            self._log(f"{name}: {said}; left out, {skipped} of {settings.max_skipped_steps}")

    def _replay_command(self, step: int) -> str:
        size = self._distributor.size
        program = f"launch.main --workers={size} --" if size > 1 else "trainer.main"
        folder = self._settings.folder
        return f"`python -m {program} --stage=replay --run_dir={folder} --step={step}`"

    def _write_metrics(self, step: int, **values: float) -> None:
        self._line_time = time.monotonic()
        try:
            self._metrics.write(step, **values)
        except OSError as error:
            path = self._settings.folder / "metrics.jsonl"
            self._checkpoints.report(
                f"{path} cannot be written after step {step}: {error.strerror}: make room or make "
                "it writable, or train on without with --checkpoint_errors=warn"
            )

    def report(self, step: int) -> None:
        """Says how far the run is."""
        recent, settings = self._since_report, self._settings
        self._since_report = new_totals()
        if not is_chief(self._distributor):
            return
        # There is none where all these steps were left out.
        loss = {"loss": float(np.mean(recent["loss"]))} if recent["loss"] else {}
        rate = recent["tokens"] / recent["seconds"] if recent["seconds"] else 0.0
        wait: dict[str, float] = {}
        if settings.steps_per_call == 1 and recent["seconds"]:  # else it is inside of the call
            whole = recent["seconds"] + recent["wait_seconds"]
            wait = {"input_wait_percent": round(100 * recent["wait_seconds"] / whole, 1)}
        self._write_metrics(step, **loss, tokens_per_second=round(rate, 1), **wait)
        self._vitals.tokens_per_second = rate
        if self._live.is_on:
            return
        remaining = self._remaining_seconds(step)
        self._log(
            f"{self._task.name} step {step}/{settings.steps}"
            f" · epoch {step / settings.steps_per_epoch:.2f}"
            f" · loss {loss.get('loss', math.nan):.4f}"
            f" · {rate:,.0f} tokens/s · ETA {format_seconds(remaining)}"
        )

    def evaluation_is_due(self, step: int) -> bool:
        """Returns whether the state after `step` is to be evaluated, and is not yet."""
        return is_evaluated(step, self._settings) and self._notes["evaluated_step"] < step

    def evaluate(self, step: int) -> bool:
        """Evaluates the weights, or their averages, and remembers them if they are the best yet.

        Returns:
          Whether it came to its end: TERM cuts it off, and a resumed run begins with it.
        """
        with self._averages.in_place() if self._averages else contextlib.nullcontext():
            return self._evaluate(step)

    def _evaluate(self, step: int) -> bool:
        self._live.note("evaluating")
        try:
            values = self._task.evaluate()
        except Preempted:
            return False
        self._notes["evaluated_step"] = step
        if self._settings.keep_best:
            self._value = values[self._task.select_by or self._task.ranked_by]
        select_by = self._task.select_by
        best = self._notes["metrics"].get(select_by, math.inf)
        better = not select_by or values[select_by] < best
        if better:
            self._notes.update(metrics=values, step=step)
        if not is_chief(self._distributor):
            return True
        if better and select_by:
            self._best = bundle.values(self._task.variables)
        self._write_metrics(step, **values)
        marker = " · best so far" if better and select_by else ""
        self._log(f"{self._task.name} step {step} · validation: {describe(values)}{marker}")
        return True

    def save(self, step: int) -> None:
        """Writes a checkpoint, of weights that all workers agree on if that is asked for."""
        if self._settings.check_divergence:
            held = bundle.values(self._task.state)
            check_equal(self._distributor, held, f"after step {step}")
        notes = {
            **self._notes,
            "seconds": self._notes["seconds"] + self._elapsed_here(),
            "shards": num_shards(self._distributor),
        }
        evaluated = self._settings.keep_best and self._notes["evaluated_step"] == step
        self._checkpoints.save(step, notes, self._best, self._value if evaluated else None)

    def finish(self) -> Result:
        """Sets the variables to the best ones, if the task selects; returns the result."""
        if self._task.select_by:
            chief = is_chief(self._distributor)
            best = broadcast_arrays(self._distributor, self._best if chief else None)
            bundle.assign(self._task.variables, best)
        elif self._averages:
            self._averages.put_in_place()
        notes = self._notes
        return Result(
            metrics=notes["metrics"],
            step=notes["step"],
            seconds=notes["seconds"] + self._elapsed_here(),
            tokens_per_second=notes["tokens"] / max(notes["step_seconds"], 1e-9),
        )

    def _elapsed_here(self) -> float:
        return time.perf_counter() - self._began
