"""What the figures of a benchmark depend on."""

import os
import platform
from importlib import metadata
from typing import Any

from trainer.reporting.environment import processor


def facts() -> dict[str, Any]:
    """Returns the processor, the cores this process may use, and the versions in use."""
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "tensorflow": metadata.version("tensorflow"),
        "keras": metadata.version("keras"),
        "python": platform.python_version(),
    }


def in_words(machine: dict[str, Any]) -> str:
    """Returns what a page says of the machine whose `facts` these are."""
    cores = machine["cores"]
    return f"{machine['cpu']}, {cores} core{'s' * (cores > 1)}, TensorFlow {machine['tensorflow']}"


def facts_with_gpu() -> dict[str, Any]:
    """Returns `facts`, and what GPU TensorFlow uses, if any."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    found = facts() | {"gpus": len(gpus)}
    if gpus:
        found["gpu_name"] = tf.config.experimental.get_device_details(gpus[0]).get("device_name")
    return found
