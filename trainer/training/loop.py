"""The one training loop, for both stages."""

import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from trainer.config import step_range
from trainer.distribution.preemption import Preempted
from trainer.reporting.profile import Profiler
from trainer.training.checkpoint import Checkpointer
from trainer.training.ema import MovingAverage
from trainer.training.health import StallWatchdog
from trainer.training.loss_scale import LossScale
from trainer.training.optimizer import Optimizer
from trainer.training.progress import Progress, steps_until_due
from trainer.training.run import Run
from trainer.training.task import Batches, Result, Task
from trainer.training.train_step import Outcome, TrainStep


def train(run: Run, task: Task, batches: Batches) -> Result:
    """Trains for the stage's number of steps, from the newest checkpoint if there is one.

    Raises:
        Preempted: A worker received TERM; the state is saved.
        NonFiniteError: The loss or a gradient is not finite, and may not be skipped.
        InputError: A checkpoint cannot be read, or cannot be written with --checkpoint_errors=stop.
        DivergenceError: --check_divergence found workers with different weights.
    """
    config, vitals, last_step = run.config, run.vitals, task.stage.steps
    training = Training(run, task, batches)
    start = training.resume()
    try:
        with StallWatchdog(config.stall_seconds) as watchdog:
            training.finish_evaluation(start)
            vitals.begin(task.name, start, last_step)
            step, iterator = start, iter(batches(start, last_step))
            while step < last_step and not training.progress.stops_early():
                training.profiler.before(step + 1)
                stop = tf.constant(float(run.stop_request.received))
                outcomes, seconds, wait_seconds = training.take_steps(iterator, step, stop)
                if step == start:
                    seconds = None  # excluded: the first call includes tracing
                for outcome in outcomes:
                    step += 1
                    training.progress.count(step, outcome, seconds, wait_seconds)
                training.profiler.after(step)
                watchdog.beat()
                if step % config.log_every_steps == 0 or step == last_step:
                    training.progress.report(step)
                preempted = float(outcomes[-1].stops) > 0
                if training.progress.evaluation_is_due(step) and not preempted:
                    preempted = not training.evaluate(step)
                    watchdog.beat()
                    vitals.beat = time.monotonic()
                if training.is_saved(step) or preempted:
                    training.save(step)
                if preempted:
                    saved = "state saved" if training.checkpoints.wait() else "state NOT saved"
                    raise Preempted(f"{task.name}: stopped by TERM after step {step}; {saved}")
        training.checkpoints.wait()
    finally:
        training.close()
    return training.progress.finish()


class Training:
    """A stage in training: its optimizer, step, checkpoints and bookkeeping. Writes nothing yet."""

    def __init__(self, run: Run, task: Task, batches: Batches):
        config, distributor = run.config, run.distributor
        self._run = run
        self._task = task
        self._optimizer = Optimizer(
            config.optimizer, task.stage, task.variables, distributor, task.rates
        )
        with distributor.scope():
            loss_scale = LossScale() if config.precision == "mixed_float16" else None
        # The first batch even in a resumed run: what is measured on it must not change.
        self.step = TrainStep(task, config, distributor, self._optimizer, batches(0, 1), loss_scale)
        self._averages = None
        if task.stage.ema:
            self._averages = MovingAverage(task.variables, task.stage.ema, distributor)
        state = {**task.state, **self._optimizer.variables}
        state |= self._averages.variables if self._averages else {}
        state |= loss_scale.variables if loss_scale else {}
        self.checkpoints = Checkpointer(
            task.folder / "checkpoints", distributor, state, run.log, config.keep_checkpoints,
            config.checkpoint_errors, config.keep_best, task.inputs,
        )  # fmt: skip
        self.checkpoints.flushed_first = [task.folder / "metrics.jsonl"]
        self.checkpoints.written = run.saved
        self.progress = Progress(run, task, batches, self.checkpoints, self._averages)
        profiled = step_range(config.profile_steps) if run.is_chief else None
        self.profiler = Profiler(*(profiled or (0, 0)), task.folder / "profile", run.log)

    def resume(self) -> int:
        """Restores the newest checkpoint, unless --resume=never; returns its step, or 0."""
        if self._run.config.resume == "never":
            self.checkpoints.forget()
        start = self.progress.resume()
        self._optimizer.after_restore()
        self.progress.open_metrics(start)
        return start

    def finish_evaluation(self, start: int) -> None:
        """Evaluates the state after step `start` if TERM interrupted its evaluation."""
        if not self.progress.evaluation_is_due(start):
            return
        if not self.evaluate(start):
            raise Preempted(f"{self._task.name}: stopped by TERM after step {start}; state saved")
        self.save(start)

    def take_steps(
        self, iterator: Iterator[dict[str, tf.Tensor]], step: int, stop: tf.Tensor
    ) -> tuple[list[Outcome], float | None, float | None]:
        """Takes the step after `step`, or --steps_per_call of them until something else is due.

        Returns:
            The outcomes; the seconds per step; the seconds spent waiting for the batch, None for
            several steps in one call.
        """
        wait_seconds = None
        steps_per_call = self._run.config.steps_per_call
        began = time.perf_counter()
        if steps_per_call == 1:
            with tf.profiler.experimental.Trace("input_wait"):
                batch = next(iterator)
            wait_seconds = time.perf_counter() - began
            began = time.perf_counter()
            outcomes = [self.step(batch, stop)]
            outcomes[0].loss.numpy()  # waits until the step has been computed
        else:
            count = min(steps_per_call, steps_until_due(self._run.config, self._task, step))
            outcomes = self.step.several(iterator, count, stop)
        if self._averages and outcomes[-1].is_finite():
            self._optimizer.settle()  # an average includes all rows
            self._averages.update(self._optimizer.steps_taken)
        return outcomes, (time.perf_counter() - began) / len(outcomes), wait_seconds

    def evaluate(self, step: int) -> bool:
        """Evaluates the state after `step`; returns False if TERM interrupted it."""
        self._optimizer.settle()
        return self.progress.evaluate(step)

    def is_saved(self, step: int) -> bool:
        """Returns whether the state after `step` is checkpointed."""
        config, task = self._run.config, self._task
        return (
            step % config.checkpoint_every_steps == 0
            or (config.keep_best > 0 and task.is_evaluated(step))
            or step == task.stage.steps
            or self.progress.stops_early()
        )

    def save(self, step: int) -> None:
        """Writes a checkpoint of the state after `step`."""
        self._optimizer.before_save()
        self.progress.save(step)

    def replay(self, batches: Batches, step: int) -> tuple[Outcome, int, dict[str, Any]]:
        """Runs the steps from the newest checkpoint before `step` up to it; a collective.

        Returns:
            The outcome of `step`, the step of the checkpoint, and the checkpoint's notes.
        """
        restored = self.checkpoints.restore(before=step)
        start, notes = restored[:2] if restored else (0, {})
        self._optimizer.after_restore()
        self._settle_as_in_training(start)
        say = self._run.log if self._run.is_chief else lambda line: None
        say(f"replay: from {f'the checkpoint of step {start}' if start else 'the start'} to {step}")
        for number, batch in enumerate(batches(start, step), start + 1):
            outcome = self.step(batch, tf.constant(0.0))
            self._settle_as_in_training(number)
            say(f"replay: step {number} · loss {float(outcome.loss):.9g}")
        return outcome, start, notes

    def _settle_as_in_training(self, step: int) -> None:
        """Brings rows up to date where the training that is replayed did."""
        if step and (self._task.stage.ema or self._task.is_evaluated(step)):
            self._optimizer.settle()

    def close(self) -> None:
        """Waits for the checkpoint that is being written; no collective."""
        self.profiler.close()
        self.checkpoints.close()
        self._run.vitals.stage = ""
