"""The one training loop, of both stages."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer.distribution.distributor import Distributor, reduce_inside_step_only
from trainer.distribution.preemption import Preempted, StopRequest
from trainer.reporting.metrics_file import Metrics
from trainer.reporting.profile import Profiler
from trainer.reporting.status_server import Vitals
from trainer.training.checkpoint import Checkpointer, Restored
from trainer.training.ema import Averages
from trainer.training.health import StallWatchdog
from trainer.training.lazy_rows import Tables
from trainer.training.loss_scale import LossScale
from trainer.training.optimizer import make_optimizer, optimizer_variables, set_rates
from trainer.training.progress import Progress, is_evaluated, steps_until_due
from trainer.training.replay import Replayed, replay
from trainer.training.task import Result, Settings, Task
from trainer.training.train_step import (
    Outcome,
    SeveralSteps,
    TrainStep,
    make_several_steps,
    make_train_step,
)


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
    vitals = vitals or Vitals()
    run = _make_run(task, settings, distributor, batches, log, vitals)
    if settings.replay_step:
        raise Replayed(_step_again(run, batches, log))
    start = _resume(run)
    try:
        with StallWatchdog(settings.stall_seconds) as watchdog:
            _evaluate_if_cut_off(run, start)
            vitals.begin(task.name, start, settings.steps)
            step, iterator = start, iter(batches(start, settings.steps))
            while step < settings.steps:
                run.profiler.before(step + 1)
                stop = tf.constant(float(stop_request.received))
                outcomes, seconds, wait_seconds = _take_steps(run, iterator, step, stop)
                if step == start:
                    seconds = None  # the first call traces the graph: not like the others
                for outcome in outcomes:
                    step += 1
                    run.progress.count(step, outcome, seconds, wait_seconds)
                run.profiler.after(step)
                watchdog.beat()
                if step % settings.log_every_steps == 0 or step == settings.steps:
                    run.progress.report(step)
                if _evaluate_and_save(run, step, float(outcomes[-1].stops) > 0, watchdog):
                    saved = "state saved" if run.checkpoints.wait() else "state NOT saved"
                    raise Preempted(f"{task.name}: stopped by TERM after step {step}; {saved}")
        run.checkpoints.wait()
    finally:
        run.profiler.close()
        run.checkpoints.close()
        vitals.stage = ""
    return run.progress.finish()


class _Run(NamedTuple):
    """What the loop works with."""

    task: Task
    settings: Settings
    distributor: Distributor
    optimizer: keras.optimizers.Optimizer
    train_step: TrainStep
    several_steps: SeveralSteps
    tables: Tables
    averages: Averages | None
    checkpoints: Checkpointer
    progress: Progress
    profiler: Profiler
    vitals: Vitals


def _make_run(
    task: Task,
    settings: Settings,
    distributor: Distributor,
    batches: Callable[[int, int], tf.data.Dataset],
    log: Callable[[str], None],
    vitals: Vitals,
) -> _Run:
    """Makes the optimizer, the step and the bookkeeping; writes nothing yet."""
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
    averages = Averages(task.variables, settings.ema, distributor) if settings.ema else None
    state = {**task.state, **optimizer_variables(optimizer)}
    state |= averages.variables if averages else {}
    state |= loss_scale.variables if loss_scale else {}
    checkpoints = Checkpointer(
        settings.folder / "checkpoints", distributor, state, log, settings.keep_checkpoints,
        settings.checkpoint_errors, settings.keep_best, task.encoders,
    )  # fmt: skip
    metrics = Metrics(settings.folder / "metrics.jsonl", task.name, settings.trackers)
    examples: Callable[[int], list[int]] = getattr(batches, "examples", lambda step: [])
    progress = Progress(
        task, settings, distributor, checkpoints, metrics, log, examples, averages, vitals
    )
    profiled = settings.profile_steps if distributor.is_chief else (0, 0)
    profiler = Profiler(*profiled, settings.folder / "profile", log)
    several_steps = make_several_steps(train_step)
    return _Run(
        task, settings, distributor, optimizer, train_step, several_steps, tables, averages,
        checkpoints, progress, profiler, vitals,
    )  # fmt: skip


def _resume(run: _Run) -> int:
    """Restores the newest checkpoint, if that is asked for; returns the step to go on from."""
    if not run.settings.resume:
        run.checkpoints.forget()
    start = run.progress.resume()
    run.tables.after_restore()
    run.progress.open_metrics(start)
    return start


def _evaluate_if_cut_off(run: _Run, start: int) -> None:
    """Evaluates the state after step `start` where TERM came before that was done."""
    if not run.progress.evaluation_is_due(start):
        return
    run.tables.settle()
    if not run.progress.evaluate(start):
        name = run.task.name
        raise Preempted(f"{name}: stopped by TERM after step {start}; state saved")
    run.tables.before_save()
    run.progress.save(start)


def _take_steps(
    run: _Run, iterator: Iterator[dict[str, tf.Tensor]], step: int, stop: tf.Tensor
) -> tuple[list[Outcome], float | None, float | None]:
    """Takes one step after `step`, or in one call those until there is something else to do.

    Returns:
      Their outcomes, the seconds that each took, and those that a batch was waited for, which is
      not known of several steps in one call.
    """
    wait_seconds = None
    began = time.perf_counter()
    if run.settings.steps_per_call == 1:
        with tf.profiler.experimental.Trace("input_wait"):
            batch = next(iterator)
        wait_seconds = time.perf_counter() - began
        began = time.perf_counter()
        outcomes = [run.train_step(batch, stop)]
        outcomes[0].loss.numpy()  # waits for a step that is still being computed
    else:
        count = min(run.settings.steps_per_call, steps_until_due(run.settings, step))
        outcomes = run.several_steps(iterator, count, stop)
    if run.averages and outcomes[-1].is_finite():
        run.tables.settle()  # an average is of all rows
        run.averages.update(run.optimizer.iterations.value)
    return outcomes, (time.perf_counter() - began) / len(outcomes), wait_seconds


def _evaluate_and_save(run: _Run, step: int, preempted: bool, watchdog: StallWatchdog) -> bool:
    """Does what is due after `step`.

    Args:
      preempted: TERM has come to a worker: nothing is evaluated, and the state is saved.

    Returns:
      Whether TERM has come, before this or during the evaluation.
    """
    settings = run.settings
    evaluates = run.progress.evaluation_is_due(step) and not preempted
    if evaluates:
        run.tables.settle()
        preempted = not run.progress.evaluate(step)
        watchdog.beat()
        run.vitals.beat = time.monotonic()
    if (
        step % settings.checkpoint_every_steps == 0
        or (evaluates and settings.keep_best)
        or step == settings.steps
        or preempted
    ):
        run.tables.before_save()
        run.progress.save(step)
    return preempted


def _step_again(
    run: _Run, batches: Callable[[int, int], tf.data.Dataset], log: Callable[[str], None]
) -> dict[str, Any]:
    """Returns what `replay` says of `settings.replay_step`; rows are settled where the run did."""
    settings, tables = run.settings, run.tables

    def step_again(batch: dict[str, tf.Tensor], step: int) -> Outcome:
        outcome = run.train_step(batch, tf.constant(0.0))
        if settings.ema or is_evaluated(step, settings):
            tables.settle()
        return outcome

    def restore() -> Restored | None:
        restored = run.checkpoints.restore(before=settings.replay_step)
        tables.after_restore()
        if restored and is_evaluated(restored[0], settings):
            tables.settle()
        return restored

    say = log if run.distributor.is_chief else lambda line: None
    names = list(run.task.variables)
    return replay(settings.replay_step, names, restore, batches, step_again, say)
