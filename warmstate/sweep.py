r"""`warmstate sweep`: searches flags with Optuna; each trial is a run, judged on validation.

  warmstate sweep --out=runs/sweep --trials=20 \
      --search='finetune_learning_rate=1e-4:1e-2:log,hidden_units=0|30' -- \
      --stage=finetune --store=runs/store --encoder=runs/a/encoder

OUT/sweep.db (SQLite) holds the trials, and OUT/trial-0003 is the run of one. The same command
continues a sweep that was stopped, and the trial that it was at from its newest checkpoint. What a
trial tries depends on the seed, its number and the results before it.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from absl import app

from data_pipelines import flag_fields
from data_pipelines.errors import PREEMPTED_EXIT_CODE, USAGE_EXIT_CODE
from data_pipelines.flag_fields import did_you_mean, fields_of, flag, kind_of
from trainer.config import Config

# Stages that can be judged, and where their reports say the metric; lower is better.
METRICS = {
    "pretrain": ("pretrain", "nats_per_token"),
    "finetune": ("finetune", "validation", "error_percent"),
    "all": ("warm", "validation", "error_percent"),
}


@dataclass(frozen=True)
class Options:
    """The flags of the command; those of the trials follow behind `--`."""

    out: str = flag("Sweep", "", "Folder of the trials.")
    trials: int = flag("Sweep", 20, "Number of trials, with those of earlier sittings.", at_least=1)
    search: str = flag(
        "Sweep",
        "",
        "Flags to search, separated by commas: NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A|B|C.",
    )
    seed: int = flag("Sweep", 0, "Seed of the search.", at_least=0, below=2**31)
    workers: int = flag("Sweep", 1, "Number of workers of each trial, on this machine.", at_least=1)


class Range(NamedTuple):
    """The numbers that a flag may have in a sweep."""

    low: float
    high: float
    is_log: bool


Space = dict[str, Range | list[str]]


def parse_space(text: str) -> Space:
    """Returns what --search says.

    Raises:
        ValueError: A line for each fault.
    """
    space: Space = {}
    faults, fields = [], fields_of([Config])
    for item in filter(None, text.split(",")):
        name, _, values = item.partition("=")
        name = name.strip().removeprefix("--")
        if name not in fields:
            faults.append(f"--search: {name!r} is no flag of a run{did_you_mean(name, fields)}")
            continue
        kind, bounds = kind_of(fields[name]), values.split(":")
        if "|" in values:
            space[name] = values.split("|")
        elif kind in (int, float) and len(bounds) in (2, 3) and bounds[2:] in ([], ["log"]):
            try:
                limits = Range(float(bounds[0]), float(bounds[1]), len(bounds) == 3)
            except ValueError:
                faults.append(f"--search: {item!r}: {values!r} is not LOW:HIGH, two numbers")
                continue
            space[name] = limits
            if not limits.low < limits.high or (limits.is_log and limits.low <= 0):
                faults.append(f"--search: {item!r}: LOW must be below HIGH, and for log above 0")
        else:
            faults.append(f"--search: {item!r} is not NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A|B")
    if not space and not faults:
        faults.append("--search names no flag: write --search=finetune_learning_rate=1e-4:1e-2:log")
    if faults:
        raise ValueError("\n".join(faults))
    return space


def suggested(trial: Any, space: Space) -> dict[str, str]:
    """Returns the values of a trial, as flags take them."""
    found = {}
    for name, values in space.items():
        if isinstance(values, list):
            found[name] = trial.suggest_categorical(name, values)
        elif kind_of(fields_of([Config])[name]) is int:
            low, high = round(values.low), round(values.high)
            found[name] = str(trial.suggest_int(name, low, high, log=values.is_log))
        else:
            found[name] = repr(
                trial.suggest_float(name, values.low, values.high, log=values.is_log)
            )
    return found


def run_until_term(command: Sequence[str], log: Path) -> int:
    """Runs a program, and passes TERM and INT on to it; returns its exit code, then 143."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        process.terminate()

    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return PREEMPTED_EXIT_CODE if stopped else code


class Sweep:
    """A search that is going on in a folder."""

    def __init__(self, options: Options, space: Space, flags: Sequence[str]):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._options, self._space = optuna, options, space
        self._flags = list(flags)
        self._stage = next(
            (w[8:] for w in reversed(self._flags) if w.startswith("--stage=")), "all"
        )
        self._folder = Path(options.out)
        self._folder.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{(self._folder / 'sweep.db').resolve()}"
        self.study = optuna.create_study(study_name="sweep", storage=storage, load_if_exists=True)

    def run(self) -> int:
        """Runs the trials that are left, and prints their table; returns the exit code."""
        states = self._optuna.trial.TrialState
        for begun in self.study.get_trials(states=(states.RUNNING,)):  # of an earlier sitting
            values = {n: v if isinstance(v, str) else repr(v) for n, v in begun.params.items()}
            if values.keys() != self._space.keys():
                self.study.tell(begun.number, state=states.FAIL)
            elif code := self._judge(begun.number, values):
                return code
        while len(self.study.trials) < self._options.trials:
            number = len(self.study.trials)
            # Of the number too: a sweep that was stopped then tries what it would have tried.
            seed = (self._options.seed * 1_000_003 + number) % 2**32
            self.study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            trial = self.study.ask()
            if code := self._judge(trial.number, suggested(trial, self._space)):
                return code
        print(self.table())
        return 0 if self._finished() else 1

    def _judge(self, number: int, values: dict[str, str]) -> int:
        """Runs a trial and records its metric, or that it failed; returns an exit code to stop."""
        folder = self._folder / f"trial-{number:04d}"
        chosen = [f"--{name}={value}" for name, value in values.items()]
        print(
            f"sweep: trial {number + 1} of {self._options.trials}: {' '.join(chosen)}", flush=True
        )
        program = ["trainer.main"]
        if self._options.workers > 1:
            program = ["launch.main", f"--workers={self._options.workers}", "--"]
        command = [sys.executable, "-m", *program, *self._flags, *chosen, f"--run_dir={folder}"]
        folder.mkdir(exist_ok=True)
        code = run_until_term(command, folder / "log.txt")
        if code == PREEMPTED_EXIT_CODE:
            print(f"sweep: stopped; the same command continues with trial {number + 1}")
            return PREEMPTED_EXIT_CODE
        value = None if code else self._metric(folder)
        if value is None:
            state = self._optuna.trial.TrialState.FAIL
            self.study.tell(number, state=state)
            print(f"sweep: trial {number + 1} failed with exit code {code}: see {folder}/log.txt")
        else:
            self.study.tell(number, value)
            print(f"sweep: trial {number + 1}: {METRICS[self._stage][-1]} {value:.4g}", flush=True)
        return 0

    def _metric(self, folder: Path) -> float | None:
        """Returns what report.json says of validation; None if it says nothing."""
        found: Any = json.loads((folder / "report.json").read_text())
        *places, name = METRICS[self._stage]
        for place in places:
            found = found.get(place, {})
        value = found.get("f1_error_percent" if "f1_error_percent" in found else name)
        return None if value is None else float(value)

    def _finished(self) -> list[Any]:
        """Returns the trials that have a metric, the best one first."""
        done = self.study.get_trials(states=(self._optuna.trial.TrialState.COMPLETE,))
        return sorted(done, key=lambda trial: (trial.value, trial.number))

    def table(self) -> str:
        """Returns the trials, the best one first, and where its flags are."""
        done, metric = self._finished(), METRICS[self._stage][-1]
        failed = len(self.study.trials) - len(done)
        if not done:
            return f"sweep: none of {failed} trials has a result"
        names = list(self._space)
        cells = [["trial", metric, *names]]
        for trial in done:
            values = [str(trial.params.get(name, "")) for name in names]
            shown = [v if not _is_float(v) else f"{float(v):.4g}" for v in values]
            cells.append([str(trial.number + 1), f"{trial.value:.4g}", *shown])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        best = self._folder / f"trial-{done[0].number:04d}"
        lines.insert(1, "-" * len(lines[0]))
        lines += ["", f"{failed} failed" if failed else "", f"best: --flagfile={best}/config.cfg"]
        return "\n".join(line for line in lines if line or not failed)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "." in text or "e" in text


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; prints the help, or all faults, and exits, if there is cause to."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if flag_fields.HELP_WORDS & set(arguments[1:end]):
        print(flag_fields.program_help(__doc__, [Options]))
        sys.exit(0)
    faults, words = flag_fields.parse(arguments[:end], advice="; a run's flags stand behind --")
    faults += [f"{word!r} is not a flag" for word in words]
    options, flags = flag_fields.from_flags(Options), arguments[end + 1 :]
    faults += flag_fields.value_faults(options)
    if not options.out:
        faults.append("--out is not set: name the folder of the trials")
    try:
        space = parse_space(options.search)
    except ValueError as error:
        faults += str(error).splitlines()
        space = {}
    names = [word.removeprefix("--").split("=")[0] for word in flags]
    faults += [
        f"--{n} is given behind -- and by the sweep" for n in ("run_dir", *space) if n in names
    ]
    stages = [word[8:] for word in flags if word.startswith("--stage=")]
    if stages and stages[-1] not in METRICS:
        faults.append(f"--stage={stages[-1]} cannot be swept: use {', '.join(METRICS)}")
    if "finetune_refit" in names:
        faults.append("--finetune_refit has no validation error to compare: leave it out")
    try:
        import optuna  # noqa: F401
    except ImportError:
        faults.append("sweep needs the package optuna: pip install 'warmstate[sweep]'")
    if faults:
        print("\n".join(f"error: {fault}" for fault in faults), file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
    return [arguments[0], *flags]


def main(argv: Sequence[str]) -> int:
    """Runs the sweep; returns the exit code: 0, 1 without a result, 143 if a trial was stopped."""
    options = flag_fields.from_flags(Options)
    return Sweep(options, parse_space(options.search), argv[1:]).run()


if __name__ == "__main__":
    flag_fields.define([Options])
    app.run(main, flags_parser=parse_flags)
