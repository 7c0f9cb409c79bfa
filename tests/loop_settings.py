"""The training loop's settings where a test or a benchmark does not care."""

from pathlib import Path
from typing import Any

from trainer.training.schedules import Schedule
from trainer.training.task import Settings


def settings(**changes: Any) -> Settings:
    """Returns settings that are plain, but for the `changes`."""
    plain = {
        "folder": Path(),
        "steps": 1,
        "steps_per_epoch": 1,
        "schedule": Schedule("constant", rate=0.1),
        "optimizer": "adam",
        "clip_norm": 1.0,
        "accumulate_steps": 1,
        "sparse_reduce": "dense",
        "compress": "none",
        "check_divergence": False,
        "log_every_steps": 1,
        "checkpoint_every_steps": 1,
        "evaluate_every_steps": 1,
        "resume": False,
    }
    return Settings(**plain | changes)
