"""The console script `warmstate`: one name for all programs.

A command runs a module as `python -m MODULE` does, in this process and with the same flags. Help
and shell completion are made from these flags, without importing TensorFlow.
"""

import importlib.metadata
import os
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.errors import USAGE_EXIT_CODE
from data_pipelines.flag_fields import HELP_WORDS, Field, did_you_mean, help_text
from warmstate import flag_tables


class Command(NamedTuple):
    """A command of `warmstate`."""

    group: str  # heading in the help
    summary: str  # one line for the help
    module: str  # runs as `python -m` does; the trainer with the command's name as its --stage
    examples: tuple[str, ...]  # without the leading `warmstate`


TRAINER = "trainer.main"
COMMANDS = {
    "prepare": Command(
        "Training",
        "turn text into a token store on disk",
        "data_pipelines.prepare",
        (
            "prepare --source=movie_reviews --out=runs/store",
            "prepare --source='csv:reviews.csv' --label_key=stars --out=runs/store",
        ),
    ),
    "pretrain": Command(
        "Training",
        "train an encoder and its states on unlabelled text",
        TRAINER,
        ("pretrain --run_dir=runs/a --store=runs/store",),
    ),
    "finetune": Command(
        "Training",
        "train a classifier on labelled text, from an encoder or from scratch",
        TRAINER,
        (
            "finetune --run_dir=runs/b --store=runs/store --encoder=runs/a/encoder",
            "finetune --run_dir=runs/c --store=runs/store --init_weights=random "
            "--initial_state=zero",
        ),
    ),
    "evaluate": Command(
        "Training",
        "measure a classifier on a labelled split",
        TRAINER,
        ("evaluate --run_dir=runs/d --store=runs/store --classifier=runs/b/classifier",),
    ),
    "all": Command(
        "Training",
        "pretrain, fine-tune from the encoder and from scratch, and compare",
        TRAINER,
        ("all --flagfile=trainer/configs/demo.cfg --run_dir=runs/mine --seed=1",),
    ),
    "demo": Command(
        "Training",
        "train the demo's classifiers on real film reviews, in minutes",
        "warmstate.demo",
        ("demo", "demo --scale=smoke --run_dir=runs/smoke"),
    ),
    "predict": Command(
        "Using a classifier",
        "predict labels and probabilities of texts",
        TRAINER,
        (
            "predict --classifier=runs/b/classifier 'A fine film.' --explain",
            "predict --classifier=runs/b/classifier --input=in.csv --output=out.jsonl",
            "predict --classifier=runs/b/classifier --stream < chat.txt",
            "predict --reconstruct --encoder=runs/a/encoder 'A fine film.'",
        ),
    ),
    "export": Command(
        "Using a classifier",
        "export a classifier as a SavedModel that takes raw text",
        TRAINER,
        (
            "export --classifier=runs/b/classifier --output=exported/1",
            "export --classifier=runs/b/classifier --hub_dir=hub --hub_licence=apache-2.0",
        ),
    ),
    "serve": Command(
        "Using a classifier",
        "serve a classifier over HTTP, with a page to try sentences",
        TRAINER,
        ("serve --classifier=runs/b/classifier --port=8000",),
    ),
    "report": Command(
        "Looking at runs",
        "write report.html of one run, finished or not, or of several",
        "trainer.report_page.html",
        ("report runs/a runs/b --out=report.html",),
    ),
    "replay": Command(
        "Looking at runs",
        "repeat one step of a run: its loss, gradients and texts",
        TRAINER,
        ("replay --run_dir=runs/a --step=120",),
    ),
    "launch": Command(
        "Many workers",
        "start trainers on this machine, on SLURM or on Kubernetes",
        "launch.main",
        (
            "launch --workers=2 -- --stage=pretrain --run_dir=runs/a --store=runs/store",
            "launch --platform=k8s --workers=4 --gpus_per_worker=1 --dry_run -- "
            "--flagfile=trainer/configs/demo.cfg",
        ),
    ),
    "sweep": Command(
        "Many runs",
        "search flags with Optuna; each trial is a run, judged on validation",
        "warmstate.sweep",
        examples=(
            "sweep --out=runs/sweep --search='units=64:256,pooling=last|mean' -- "
            "--flagfile=mine.cfg",
        ),
    ),
    "doctor": Command(
        "This machine",
        "check this machine: what it has and what is wrong with it",
        "warmstate.doctor",
        ("doctor",),
    ),
    "completion": Command(
        "This machine",
        "print the completion of bash, zsh or fish",
        "warmstate.completion",
        ('completion bash  # eval "$(warmstate completion bash)" in ~/.bashrc',),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` names (default: the process's own); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    try:
        return _run(words)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    if not words or words[0] in HELP_WORDS:
        print(overview())
        return 0 if words else USAGE_EXIT_CODE
    if words[0] == "--version":
        print(f"warmstate {importlib.metadata.version('warmstate')}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"error: {name!r} is not a command of warmstate{hint}", file=sys.stderr)
        print("`warmstate --help` lists the commands", file=sys.stderr)
        return USAGE_EXIT_CODE
    command = COMMANDS[name]
    end = rest.index("--") if "--" in rest else len(rest)
    if set(rest[:end]) & HELP_WORDS:
        print(help_of(name))
        return 0
    # Behind the flags, because a flagfile may name another stage, but before `--`.
    stage = [f"--stage={name}"] if command.module == TRAINER else []
    sys.argv = [f"warmstate {name}", *rest[:end], *stage, *rest[end:]]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)
    return 0


def overview() -> str:
    """Returns the help of `warmstate` itself."""
    lines = [
        "warmstate: pretrain a recurrent encoder, hand over its weights and states, fine-tune an "
        "LSTM.",
        "",
        "Usage: warmstate COMMAND [--flag=value ...]",
    ]
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<11} {command.summary}")
    lines += ["", "Examples:"]
    lines += [f"  warmstate {command.examples[0]}" for command in COMMANDS.values()]
    lines += [
        "",
        "`warmstate COMMAND --help` lists a command's flags. --flagfile=FILE reads flags from "
        "FILE;",
        "flags after it override it.",
    ]
    return "\n".join(lines)


def help_of(name: str) -> str:
    """Returns the help of a command: examples, then its flags by group."""
    command = COMMANDS[name]
    lines = [f"warmstate {name}: {command.summary}", "", "Examples:"]
    lines += [f"  warmstate {example}" for example in command.examples]
    text = help_text(flags_of(name))
    return "\n".join(lines + (["", text] if text else []))


def flags_of(name: str) -> list[Field]:
    """Returns a command's flags, in the order of its help."""
    return flag_tables.flags_of(name, is_stage=COMMANDS[name].module == TRAINER)
