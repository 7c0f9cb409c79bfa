"""--stage=replay: runs one step of a run again, to look at it.

It starts from the newest checkpoint before the step, with the same data and seeds. On the same
number of shards the numbers are the same to the last bit. Nothing is written.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from data_pipelines.errors import InputError
from data_pipelines.files import is_remote
from data_pipelines.flag_fields import kind_of
from trainer.config import FREE_ON_RESUME, Config
from trainer.stages import finetune, pretrain
from trainer.training.health import largest_first
from trainer.training.loop import Training
from trainer.training.run import Run

SHOWN_GRADIENTS = 10
SHOWN_CHARACTERS = 100  # of an example's text: a batch has many, and all of a review fills screens
OF_THIS_PROCESS = ("step", "run_dir", "track", "status_port", "status_host")


def replay(run: Run) -> dict[str, Any]:
    """Runs --step again; a collective.

    Args:
        run: Its configuration is that of `config_of_run`.

    Returns:
        step, start_step, shards_of_the_run, loss, global_norm, the norms of the gradients by
        variable, largest first, and the examples of the batch by number.
    """
    step, stage = run.config.step, run.config.stage
    _, task, batches, _ = (pretrain if stage == "pretrain" else finetune).set_up(run, run.folder)
    outcome, start, notes = Training(run, task, batches).replay(batches, step)
    norms = dict(zip(task.variables, outcome.norms.numpy().tolist(), strict=True))
    return {
        "step": step,
        "start_step": start,
        "shards_of_the_run": notes.get("shards"),
        "loss": float(outcome.loss),
        "global_norm": math.hypot(*norms.values()),
        "gradient_norms": largest_first(norms),
        "examples": batches.texts(step - 1),
    }


def describe(replayed: dict[str, Any], shards: int) -> list[str]:
    """Returns the lines that a replay prints last.

    Args:
        shards: Number of shards of this process group.
    """
    lines = ["examples of the batch:"]
    for number, text in replayed["examples"].items():
        more = len(text) - SHOWN_CHARACTERS
        cut = f"{text[:SHOWN_CHARACTERS]} ... {more:,} more characters" if more > 0 else text
        lines.append(f"  {number}: {cut}")
    lines += [
        f"step {replayed['step']} · loss {replayed['loss']:.9g} · global norm of the gradients "
        f"{replayed['global_norm']:.9g}"
    ]
    of_the_run = replayed["shards_of_the_run"]
    if of_the_run not in (None, shards):
        lines.append(
            f"warning: the run had {of_the_run} shards, this has {shards}: random draws, such as "
            "dropout, differ; start as many"
        )
    lines.append("largest gradients by their norm, before clipping:")
    shown = list(replayed["gradient_norms"].items())[:SHOWN_GRADIENTS]
    lines += [f"  {norm:.6g}  {name}" for name, norm in shown]
    return lines


def config_of_run(config: Config) -> Config:
    """Returns the flags of the run in --run_dir, with the stage and the step to run again.

    Flags that may change when a run is resumed are taken from `config` unless they have their
    default. Trackers and the status server are left to the run, which may still be running.

    Raises:
        InputError: There is no run or no such step, its flags cannot be read, or its store is gone.
    """
    folder, path = Path(config.run_dir), folder_of_run(config) / "config.json"
    saved = _read(path, f"--run_dir={folder}")
    given = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(Config)
        if item.name in FREE_ON_RESUME and getattr(config, item.name) != item.default
    }
    found = dataclasses.replace(saved, **given | {"stage": saved.stage})
    if saved.stage == "all":
        parts = dataclasses.replace(found, run_dir=str(path.parent)).parts()
        if folder.parent != path.parent or folder.name not in parts:
            names = ", ".join(str(path.parent / part) for part in parts)
            raise InputError(f"--run_dir={folder} is of --stage=all: name one of {names}")
        stage = "pretrain" if folder.name == "pretrain" else "finetune"
        found = dataclasses.replace(parts[folder.name], stage=stage)
    elif saved.stage not in ("pretrain", "finetune") or path.parent != folder:
        raise InputError(f"--run_dir={folder}: {path} is of --stage={saved.stage}, not of training")
    steps = found.of_stage(found.stage).steps
    if config.step > steps:
        raise InputError(
            f"--step={config.step} is after the last step of the run in --run_dir={folder}, "
            f"--{found.stage}_steps={steps}"
        )
    store = found.store or str(path.parent / "store")
    if not is_remote(store) and not (Path(store) / "manifest.json").exists():
        raise InputError(f"--store={store}, which the run read, is gone: name its --store")
    ours = {name: getattr(config, name) for name in OF_THIS_PROCESS}
    return dataclasses.replace(found, store=store, resume="auto", **ours)


def folder_of_run(config: Config) -> Path:
    """Returns the folder of the run that --run_dir is, or is a part of.

    Raises:
        InputError: There is no run.
    """
    folder = Path(config.run_dir)
    for found in (folder, folder.parent):
        if (found / "config.json").is_file():
            return found
    raise InputError(
        f"--run_dir={folder} holds no run: neither it nor the folder above has a config.json"
    )


def _read(path: Path, where: str) -> Config:
    fields = {item.name: kind_of(item) for item in dataclasses.fields(Config)}
    try:
        saved = json.loads(path.read_text())
        wrong = [name for name, value in saved.items() if not _is_of(value, fields.get(name))]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: {path} cannot be read: {error}") from None
    if wrong:
        raise InputError(
            f"{where}: {path} is of another version of this program: --{wrong[0]} is unknown, or "
            "has another type"
        )
    return Config(**saved)


def _is_of(value: Any, kind: type | None) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)
