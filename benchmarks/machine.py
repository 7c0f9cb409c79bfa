"""What the figures of a benchmark depend on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """Returns the processor, the cores this process may use, and the versions in use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "tensorflow": metadata.version("tensorflow"),
        "keras": metadata.version("keras"),
        "python": platform.python_version(),
    }


def facts_with_gpu() -> dict[str, Any]:
    """Returns `facts`, and what GPU TensorFlow uses, if any."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    found = facts() | {"gpus": len(gpus)}
    if gpus:
        found["gpu_name"] = tf.config.experimental.get_device_details(gpus[0]).get("device_name")
    return found
