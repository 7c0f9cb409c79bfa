"""--stage=replay: the flags of the run that is looked at."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from data_pipelines.errors import InputError
from data_pipelines.flag_fields import kind_of
from trainer.config import FREE_ON_RESUME, Config

PARTS = ("pretrain", "warm", "scratch")  # folders that --stage=all trains in
OF_THIS_PROCESS = ("step", "run_dir", "track", "status_port", "status_host")


def config_of_run(config: Config) -> Config:
    """Returns the flags of the run in --run_dir, with `step` set, and `stage` the one to rerun.

    What may differ between two sittings is taken from `config` where it is not the default. Where
    the run tells others of itself is not: the replay is no part of it, and it may be under way.

    Raises:
      InputError: there is no run or no such step of it, its flags cannot be read, or its store is
        gone.
    """
    folder, path = Path(config.run_dir), folder_of_run(config) / "config.json"
    given = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(Config)
        if item.name in FREE_ON_RESUME and getattr(config, item.name) != item.default
    }
    saved = _read(path, f"--run_dir={folder}")
    values: dict[str, Any] = dataclasses.asdict(saved) | given | {"stage": saved.stage}
    if saved.stage == "all":
        values |= _of_part(folder, path.parent)
    elif saved.stage not in ("pretrain", "finetune") or path.parent != folder:
        raise InputError(f"--run_dir={folder}: {path} is of --stage={saved.stage}, not of training")
    last = f"{values['stage']}_steps"
    if config.step > values[last]:
        raise InputError(
            f"--step={config.step} is after the last step of the run in --run_dir={folder}, "
            f"--{last}={values[last]}"
        )
    if not values["store"]:
        values["store"] = str(path.parent / "store")
    if not (Path(values["store"]) / "manifest.json").exists():
        raise InputError(
            f"--store={values['store']}, which the run read, is gone: name its --store"
        )
    values |= {name: getattr(config, name) for name in OF_THIS_PROCESS}
    return Config(**values | {"resume": "auto"})


def folder_of_run(config: Config) -> Path:
    """Returns the folder of the run of which --run_dir is a part, or all.

    Raises:
      InputError: there is no run.
    """
    folder = Path(config.run_dir)
    for found in (folder, folder.parent):
        if (found / "config.json").is_file():
            return found
    raise InputError(
        f"--run_dir={folder} holds no run: neither it nor the folder above has a config.json"
    )


def _of_part(folder: Path, run: Path) -> dict[str, Any]:
    """Returns the flags that make one stage of what --stage=all did in a folder of its own."""
    if folder.parent != run or folder.name not in PARTS:
        parts = ", ".join(str(run / part) for part in PARTS)
        raise InputError(f"--run_dir={folder} is of --stage=all: name one of {parts}")
    if folder.name == "pretrain":
        return {"stage": "pretrain"}
    if folder.name == "warm":
        return {"stage": "finetune", "encoder": str(run / "pretrain" / "encoder")}
    return {"stage": "finetune", "init_weights": "random", "initial_state": "zero"}


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
            "not of its type"
        )
    return Config(**saved)


def _is_of(value: Any, kind: type | None) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)
