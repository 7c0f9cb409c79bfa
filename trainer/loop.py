"""The one training loop, of both stages."""

import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainer.averages import Averages
from trainer.checkpoint import Checkpointer
from trainer.distribution.distributor import Distributor, is_chief, reduce_inside_step_only
from trainer.health import StallWatchdog
from trainer.loss_scale import LossScale
from trainer.optimizer import make_optimizer, optimizer_variables, set_rates
from trainer.preemption import Preempted, StopRequest
from trainer.progress import Progress, is_evaluated, steps_until_due
from trainer.replay import Replayed, replay
from trainer.reporting.profile import Profiler
from trainer.reporting.status import Metrics
from trainer.reporting.status_server import Vitals
from trainer.tables import Tables
from trainer.task import Result, Settings, Task
from trainer.train_step import Outcome, make_several_steps, make_train_step


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
        task.encoders,
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
        say = log if is_chief(distributor) else lambda line: None
        raise Replayed(_step_again(task, settings, checkpoints, train_step, tables, batches, say))
    if not settings.resume:
        checkpoints.forget()
    start = progress.resume()
    tables.after_restore()
    progress.open_metrics(start)

    try:
        with StallWatchdog(settings.stall_seconds) as watchdog:
            if progress.evaluation_is_due(start):  # TERM cut it off
                tables.settle()
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
                    tables.settle()  # an average is of all rows
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
                    tables.settle()
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


def _step_again(
    task: Task,
    settings: Settings,
    checkpoints: Checkpointer,
    train_step: Callable[[dict, tf.Tensor], Outcome],
    tables: Tables,
    batches: Callable[[int, int], tf.data.Dataset],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Returns what `replay` says of `settings.replay_step`; rows are settled where the run did."""

    def step_again(batch: dict, step: int) -> Outcome:
        outcome = train_step(batch, tf.constant(0.0))
        if settings.ema or is_evaluated(step, settings):
            tables.settle()
        return outcome

    def restore() -> tuple | None:
        restored = checkpoints.restore(before=settings.replay_step)
        tables.after_restore()
        if restored and is_evaluated(restored[0], settings):
            tables.settle()
        return restored

    names = list(task.variables)
    return replay(settings.replay_step, names, restore, batches, step_again, log)
