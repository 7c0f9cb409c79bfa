"""Reads the folder of a run for its report, also of a run in progress or interrupted.

No file is trusted: missing and damaged ones are left out, damaged ones are named in `faults`.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.reporting import predictions
from trainer.reporting.predictions import Predictions, start_of
from trainer.safe_files import DamagedError, opened, read_json, read_sealed, read_tensors

# The folders of the parts of --stage=all; a run of one stage is its own only part.
PARTS = ("pretrain", "scratch", "warm")
MAX_METRICS_BYTES = 1 << 30
YEAR_10000 = 253402300800.0


@dataclass(frozen=True)
class Part:
    """A training or an evaluation."""

    name: str  # "pretrain", "scratch", "warm", or "classifier" if its start is unknown
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl
    predictions: Predictions | None = None
    # Its encoder bundle's, by name ("learned/h"), float32 [units].
    states: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """The content of a run's folder."""

    name: str  # of the folder
    report: dict[str, Any]  # report.json; empty before the run has ended
    config: dict[str, Any]  # the run's flags
    environment: dict[str, Any]  # its machine and programs
    parts: dict[str, Part]  # by name
    faults: list[str]  # a line for each file that could not be read
    last_written: float  # unix time of the last line of metrics; 0 without metrics


def read(folder: Path) -> RunFolder:
    """Returns the content of the run's folder.

    Raises:
        FileNotFoundError: The folder is missing, or holds no file of a run.
    """
    faults: list[str] = []
    report = _read_json(folder / "report.json", faults)
    config = _read_json(folder / "config.json", faults) or report.get("config")
    config = config if isinstance(config, dict) else {}
    environment = _read_json(folder / "environment.json", faults)
    parts = {}
    for place in (folder, *(folder / name for name in PARTS)):
        if part := _read_part(place, place == folder, config, faults):
            parts[part.name] = part
    if not (parts or report or config):
        raise FileNotFoundError(
            f"{folder} holds no run: no config.json, metrics.jsonl, report.json"
        )
    times = [line.get("unix_time", 0.0) for part in parts.values() for line in part.metrics]
    return RunFolder(
        name=folder.resolve().name,
        report=report,
        config=config,
        environment=environment,
        parts=parts,
        faults=faults,
        last_written=max((time for time in times if 0 <= time < YEAR_10000), default=0.0),
    )


def _read_part(
    folder: Path, is_whole_run: bool, config: Mapping[str, Any], faults: list[str]
) -> Part | None:
    metrics = _read_metrics(folder / "metrics.jsonl", faults)
    predicted = _read_predictions(folder / "predictions", faults)
    states = _read_states(folder / "encoder", faults)
    if not (metrics or predicted or states):
        return None
    name = folder.name
    if is_whole_run:
        is_pretraining = states or (metrics and metrics[0].get("stage") == "pretrain")
        starts = predicted.info if predicted else config
        name = "pretrain" if is_pretraining else start_of(starts)
    return Part(name, metrics, predicted, states)


def _read_json(path: Path, faults: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return {name: _finite(value) for name, value in read_json(path).items()}
    except DamagedError as error:
        faults.append(str(error))
        return {}


def _finite(value: Any) -> Any:
    """Returns a JSON value with None instead of the numbers that charts cannot show."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if is_number and _number(value) is None else value


def _read_metrics(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    """Returns the complete lines; the last one may be half written."""
    if not path.exists():
        return []
    lines, damaged = [], 0
    try:
        with opened(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_METRICS_BYTES:
                raise DamagedError(f"{path} has more than {MAX_METRICS_BYTES} bytes")
            for line in file:
                try:
                    values = json.loads(line.decode("utf-8", "replace"))
                    lines.append({"stage": str(values["stage"]), **_numbers(values)})
                except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
                    damaged += line.endswith(b"\n")
    except DamagedError as error:
        faults.append(str(error))
    if damaged:
        faults.append(f"{path}: {damaged} damaged lines are left out")
    return [line for line in lines if "step" in line]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = {name: _number(value) for name, value in values.items()}
    return {name: number for name, number in found.items() if number is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float(value) if abs(value) < 1e300 else math.inf
    return number if math.isfinite(number) else None


def _read_predictions(folder: Path, faults: list[str]) -> Predictions | None:
    if not folder.exists():
        return None
    try:
        return predictions.read(folder)
    except DamagedError as error:
        faults.append(str(error))
        return None


def _read_states(folder: Path, faults: list[str]) -> dict[str, np.ndarray]:
    """Returns the learned states of an encoder bundle, by their names after "states/"."""
    if not (folder / "encoder.json").exists():
        return {}
    try:
        info = read_sealed(folder / "encoder.json")
        tensors = read_tensors(folder / "encoder.safetensors", info.get("tensors"))
    except DamagedError as error:
        faults.append(str(error))
        return {}
    return {
        name.removeprefix("states/"): array
        for name, array in tensors.items()
        if name.startswith("states/")
        and array.ndim == 1
        and array.size
        and np.isfinite(array).all()
    }
