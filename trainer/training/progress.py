"""The training loop's bookkeeping: what it says, writes, saves and remembers."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import TypedDict, cast

import numpy as np

from data_pipelines.errors import InputError
from trainer.distribution.distributor import Distributor
from trainer.distribution.divergence import check_equal
from trainer.distribution.preemption import Preempted
from trainer.reporting.live import LiveStatus
from trainer.reporting.metrics_file import Metrics, describe, format_seconds
from trainer.reporting.status_server import Vitals
from trainer.training.checkpoint import Checkpointer
from trainer.training.ema import Averages
from trainer.training.health import NonFiniteError, describe_nonfinite
from trainer.training.task import Result, Settings, Task
from trainer.training.train_step import Outcome
from trainer.variables import assign, values_of

HEARTBEAT_SECONDS = 60.0  # metrics.jsonl and the log have a line at least so often, between steps


def is_evaluated(step: int, settings: Settings) -> bool:
    """Returns whether the state after `step` is one that is evaluated."""
    return step > 0 and (step % settings.evaluate_every_steps == 0 or step == settings.steps)


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


class Totals(TypedDict):
    """What `Progress` adds up between two status lines."""

    loss: list[float]
    tokens: float
    seconds: float
    wait_seconds: float


class Notes(TypedDict):
    """What a checkpoint holds of a run beside its variables.

    Attributes:
      seconds: over all sittings; step_seconds and tokens: of the steps whose time counts.
      metrics: of the evaluation after `step`: the best or, where none is selected, the last.
      evaluated_step: the last step after which there was an evaluation.
      shards: on how many the run was when it was saved.
    """

    seconds: float
    tokens: float
    step_seconds: float
    metrics: dict[str, float]
    step: int
    skipped_steps: int
    evaluated_step: int
    shards: int


def new_totals() -> Totals:
    """Returns the totals of no steps."""
    return {"loss": [], "tokens": 0.0, "seconds": 0.0, "wait_seconds": 0.0}


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
        self._notes: Notes = {
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
        self._notes = cast(Notes, notes)
        if self._distributor.is_chief:
            self._log(f"{self._task.name}: resumed after step {step}")
        return step

    def open_metrics(self, start: int) -> None:
        """Makes metrics.jsonl ready for the lines of what comes after step `start`; a collective.

        Raises:
          InputError: in every worker: it cannot be read or written, unless that is a warning.
        """
        if self._distributor.is_chief:
            folder = self._settings.folder
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._metrics.forget_after(start, evaluated=not self.evaluation_is_due(start))
            except OSError as error:
                self._report_metrics("be read and written", start, error)
        self._checkpoints.wait()

    def _report_metrics(self, what: str, step: int, error: OSError) -> None:
        path = self._settings.folder / "metrics.jsonl"
        self._checkpoints.report(
            f"{path} cannot {what} after step {step}: {error.strerror}: make room or make it "
            "writable, or train on without with --checkpoint_errors=warn"
        )

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
        if self._distributor.is_chief and now - self._line_time > HEARTBEAT_SECONDS:
            self._write_metrics(step, heartbeat=True)
            self._log(f"{self._task.name} step {step}/{self._settings.steps} · goes on")
        recent = self._since_report
        self._steps_here += 1
        if seconds is None:
            return
        recent["seconds"] += seconds
        recent["wait_seconds"] += wait_seconds or 0.0
        recent["tokens"] += tokens
        self._notes["step_seconds"] += seconds
        self._notes["tokens"] += tokens
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
        if self._distributor.is_chief:
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
            self._report_metrics("be written", step, error)

    def report(self, step: int) -> None:
        """Says how far the run is."""
        recent, settings = self._since_report, self._settings
        self._since_report = new_totals()
        if not self._distributor.is_chief:
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
            self._notes["metrics"], self._notes["step"] = values, step
        if not self._distributor.is_chief:
            return True
        if better and select_by:
            self._best = values_of(self._task.variables)
        self._write_metrics(step, **values)
        marker = " · best so far" if better and select_by else ""
        self._log(f"{self._task.name} step {step} · validation: {describe(values)}{marker}")
        return True

    def save(self, step: int) -> None:
        """Writes a checkpoint, of weights that all workers agree on if that is asked for."""
        if self._settings.check_divergence:
            held = values_of(self._task.state)
            check_equal(self._distributor, held, f"after step {step}")
        notes = self._notes | {
            "seconds": self._notes["seconds"] + self._elapsed_here(),
            "shards": self._distributor.num_shards,
        }
        evaluated = self._settings.keep_best and self._notes["evaluated_step"] == step
        self._checkpoints.save(step, notes, self._best, self._value if evaluated else None)

    def finish(self) -> Result:
        """Sets the variables to the best ones, if the task selects; returns the result."""
        if self._task.select_by:
            chief = self._distributor.is_chief
            best = self._distributor.broadcast_arrays(self._best if chief else None)
            assign(self._task.variables, best)
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
