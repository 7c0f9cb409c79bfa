"""The bookkeeping of the training loop: status lines, metrics, evaluations, checkpoints."""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, field

import numpy as np

from data_pipelines.durable import make_folder
from data_pipelines.errors import InputError
from trainer.config import Config, step_range
from trainer.distribution.divergence import check_equal
from trainer.distribution.preemption import Preempted
from trainer.distribution.variables import assign, values_of
from trainer.reporting.live import LiveStatus
from trainer.reporting.metrics_file import Metrics, describe, format_seconds
from trainer.training.checkpoint import Checkpointer
from trainer.training.ema import MovingAverage
from trainer.training.health import NonFiniteError, describe_nonfinite
from trainer.training.run import Run
from trainer.training.task import Batches, Result, Task
from trainer.training.train_step import Outcome

HEARTBEAT_SECONDS = 60.0  # longest time without a line in metrics.jsonl and the log, during steps


def steps_until_due(config: Config, task: Task, step: int) -> int:
    """Returns how many steps follow `step` before something else than a step is due."""
    periods = [config.log_every_steps, config.checkpoint_every_steps]
    periods.append(task.stage.evaluate_every_steps)
    first, last = step_range(config.profile_steps) or (0, 0)
    stops = [task.stage.steps, first - 1, last, *(step - step % p + p for p in periods)]
    return min(stop for stop in stops if stop > step) - step


@dataclass
class Totals:
    """Sums since the last status line."""

    loss: list[float] = field(default_factory=list)
    tokens: float = 0.0
    seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass
class Notes:
    """What a checkpoint holds of a run besides its variables."""

    seconds: float = 0.0  # duration over all sittings
    tokens: float = 0.0  # read in the steps whose time counts
    step_seconds: float = 0.0  # duration of these steps
    # The best evaluation's or, if the task does not select, the last one's.
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0  # of these metrics
    skipped_steps: int = 0  # so far
    evaluated_step: int = 0  # the last step after which there was an evaluation
    shards: int = 0  # when it was saved


class Progress:
    """Counts steps, reports them, and decides what is evaluated, saved and kept.

    Args:
        batches: The stage's batches; they name the examples of a step that is not finite.
        averages: Evaluated and kept in place of the weights, if there are any.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        batches: Batches,
        checkpoints: Checkpointer,
        averages: MovingAverage | None,
    ):
        self._run = run
        self._task = task
        self._batches = batches
        self._checkpoints = checkpoints
        self._averages = averages
        self._metrics = Metrics(task.folder / "metrics.jsonl", task.name, run.trackers)
        self._notes = Notes()
        self._best: dict[str, np.ndarray] = {}
        self._value = math.inf  # of the last evaluation
        self._since_report = Totals()
        self._live = LiveStatus(run.log, task.name, task.stage.steps, batches.steps_per_epoch)
        self._began = time.perf_counter()
        self._steps_here = 0
        self._line_time = time.monotonic()  # of the last line of metrics.jsonl

    def resume(self) -> int:
        """Restores the newest checkpoint; returns the step that it was taken after, or 0."""
        restored = self._checkpoints.restore()
        if restored is None:
            return 0
        step, notes, self._best = restored
        kinds = [{k: type(v) for k, v in held.items()} for held in (notes, vars(Notes()))]
        if kinds[0] != kinds[1] or not {float, int} >= set(map(type, notes["metrics"].values())):
            raise InputError(
                f"the checkpoint of step {step} in {self._task.folder} is of another version "
                "of this program: start again with --resume=never"
            )
        self._notes = Notes(**notes)
        if self._run.is_chief:
            self._run.log(f"{self._task.name}: resumed after step {step}")
        return step

    def open_metrics(self, start: int) -> None:
        """Prepares metrics.jsonl for lines after step `start`; a collective.

        Raises:
            InputError: In every worker: it cannot be read or written, and that is no warning.
        """
        if self._run.is_chief:
            folder = self._task.folder
            try:
                make_folder(folder)
                evaluated = not self.evaluation_is_due(start)
                if damaged := self._metrics.forget_after(start, evaluated):
                    self._run.log(f"warning: {damaged} damaged lines of metrics.jsonl were dropped")
            except OSError as error:
                self._report_metrics("be read and written", start, error)
        self._checkpoints.wait()

    def _report_metrics(self, what: str, step: int, error: OSError) -> None:
        path = self._task.folder / "metrics.jsonl"
        self._checkpoints.report(
            f"{path} cannot {what} after step {step}: {error.strerror}: make room or make it "
            "writable, or train on without with --checkpoint_errors=warn",
            error,
        )

    def count(
        self, step: int, outcome: Outcome, seconds: float | None, wait_seconds: float | None
    ) -> None:
        """Counts one step.

        Args:
            seconds: Its duration; None to leave it out of the rates.
            wait_seconds: Time spent waiting for its batch; None if unknown.

        Raises:
            NonFiniteError: It is not finite, and may not be skipped.
        """
        loss, tokens = float(outcome.loss), float(outcome.tokens)
        if outcome.is_finite():
            self._since_report.loss.append(loss)
        else:
            self._skip(step, outcome)
        vitals, now = self._run.vitals, time.monotonic()
        vitals.step, vitals.loss, vitals.beat = step, loss, now
        vitals.saved = self._checkpoints.saved
        if self._run.is_chief and now - self._line_time > HEARTBEAT_SECONDS:
            self._write_metrics(step, heartbeat=True)
            self._run.log(f"{self._task.name} step {step}/{self._task.stage.steps} · still running")
        recent = self._since_report
        self._steps_here += 1
        if seconds is None:
            return
        recent.seconds += seconds
        recent.wait_seconds += wait_seconds or 0.0
        recent.tokens += tokens
        self._notes.step_seconds += seconds
        self._notes.tokens += tokens
        self._live.count(step, loss, tokens, seconds, wait_seconds, self._remaining_seconds(step))

    def _remaining_seconds(self, step: int) -> float:
        return self._elapsed_here() / self._steps_here * (self._task.stage.steps - step)

    def _skip(self, step: int, outcome: Outcome) -> None:
        """Counts and reports a step that is not finite, or raises NonFiniteError."""
        name, config = self._task.name, self._run.config
        norms = dict(zip(self._task.variables, outcome.norms.numpy().tolist(), strict=True))
        examples = self._batches.examples(step - 1)
        said = describe_nonfinite(step, float(outcome.loss), norms, examples)
        advice = f"{self._replay_command(step)} shows the step; try a lower --{name}_learning_rate"
        if name == "finetune" and not config.finetune_recurrent_clip_norm:
            advice += ", or --finetune_recurrent_clip_norm=1 if only gradients are not finite"
        if config.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{name}: {said}; {advice}, or skip such steps with --on_nonfinite=skip"
            )
        self._notes.skipped_steps += 1
        skipped = self._notes.skipped_steps
        if skipped > config.max_skipped_steps:
            raise NonFiniteError(
                f"{name}: {said}; {skipped - 1} were skipped before it, and "
                f"--max_skipped_steps={config.max_skipped_steps}; {advice}"
            )
        if self._run.is_chief:
            self._write_metrics(step, skipped_steps=skipped)
            self._run.log(f"{name}: {said}; skipped, {skipped} of {config.max_skipped_steps}")

    def _replay_command(self, step: int) -> str:
        size = self._run.distributor.size
        program = f"launch.main --workers={size} --" if size > 1 else "trainer.main"
        folder = self._task.folder
        return f"`python -m {program} --stage=replay --run_dir={folder} --step={step}`"

    def _write_metrics(self, step: int, **values: float) -> None:
        self._line_time = time.monotonic()
        try:
            self._metrics.write(step, **values)
        except OSError as error:
            self._report_metrics("be written", step, error)

    def report(self, step: int) -> None:
        """Prints a status line, and writes the same to metrics.jsonl."""
        recent, stage = self._since_report, self._task.stage
        self._since_report = Totals()
        if not self._run.is_chief:
            return
        # All these steps may have been skipped.
        loss = {"loss": float(np.mean(recent.loss))} if recent.loss else {}
        rate = recent.tokens / recent.seconds if recent.seconds else 0.0
        wait: dict[str, float] = {}
        # With several steps in a call, the call includes the wait.
        if self._run.config.steps_per_call == 1 and recent.seconds:
            whole = recent.seconds + recent.wait_seconds
            wait = {"input_wait_percent": round(100 * recent.wait_seconds / whole, 1)}
        self._write_metrics(step, **loss, tokens_per_second=round(rate, 1), **wait)
        self._run.vitals.tokens_per_second = rate
        if self._live.is_on:
            return
        remaining = self._remaining_seconds(step)
        self._run.log(
            f"{self._task.name} step {step}/{stage.steps}"
            f" · epoch {step / self._batches.steps_per_epoch:.2f}"
            f" · loss {loss.get('loss', math.nan):.4f}"
            f" · {rate:,.0f} tokens/s · ETA {format_seconds(remaining)}"
        )

    def evaluation_is_due(self, step: int) -> bool:
        """Returns whether the state after `step` must still be evaluated."""
        return self._task.is_evaluated(step) and self._notes.evaluated_step < step

    def stops_early(self) -> bool:
        """Returns whether the last --finetune_early_stopping evaluations were no better."""
        stage, notes = self._task.stage, self._notes
        since = notes.evaluated_step - notes.step
        return 0 < stage.early_stopping * stage.evaluate_every_steps <= since

    def evaluate(self, step: int) -> bool:
        """Evaluates the weights, or their averages, and keeps them if they are the best yet.

        Returns:
            False if TERM interrupted it; a resumed run then begins with it.
        """
        with self._averages.in_place() if self._averages else contextlib.nullcontext():
            return self._evaluate(step)

    def _evaluate(self, step: int) -> bool:
        self._live.note("evaluating")
        try:
            values = self._task.evaluate()
        except Preempted:
            return False
        self._notes.evaluated_step = step
        if self._run.config.keep_best:
            self._value = values[self._task.select_by or self._task.ranked_by]
        select_by = self._task.select_by
        best = self._notes.metrics.get(select_by, math.inf)
        better = not select_by or values[select_by] < best
        if better:
            self._notes.metrics, self._notes.step = values, step
        if not self._run.is_chief:
            return True
        if better and select_by:
            self._best = values_of(self._task.variables)
        self._write_metrics(step, **values)
        marker = " · best so far" if better and select_by else ""
        self._run.log(f"{self._task.name} step {step} · validation: {describe(values)}{marker}")
        return True

    def save(self, step: int) -> None:
        """Writes a checkpoint, after --check_divergence of the weights if set."""
        if self._run.config.check_divergence:
            held = values_of(self._task.state)
            check_equal(self._run.distributor, held, f"after step {step}")
        notes = asdict(self._notes) | {
            "seconds": self._notes.seconds + self._elapsed_here(),
            "shards": self._run.distributor.num_shards,
        }
        evaluated = self._run.config.keep_best and self._notes.evaluated_step == step
        self._checkpoints.save(step, notes, self._best, self._value if evaluated else None)

    def finish(self) -> Result:
        """Sets the variables to the best ones if the task selects, and returns the result."""
        if self._task.select_by:
            chief = self._run.is_chief
            best = self._run.distributor.broadcast_arrays(self._best if chief else None)
            assign(self._task.variables, best)
        elif self._averages:
            self._averages.put_in_place()
        notes, steps = self._notes, self._task.stage.steps
        if self.stops_early() and notes.evaluated_step < steps:
            steps = notes.evaluated_step
            if self._run.is_chief:
                self._run.log(
                    f"{self._task.name}: ended after step {steps} of {self._task.stage.steps}: no "
                    f"better since step {notes.step} (--{self._task.name}_early_stopping)"
                )
        return Result(
            metrics=notes.metrics,
            steps=steps,
            step=notes.step,
            seconds=notes.seconds + self._elapsed_here(),
            tokens_per_second=notes.tokens / max(notes.step_seconds, 1e-9),
        )

    def _elapsed_here(self) -> float:
        return time.perf_counter() - self._began
