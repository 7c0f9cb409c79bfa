"""The compiled loops of an LSTM layer, where they have been built for this machine.

They are optional: without them the layer runs TensorFlow's own operations, which give the same
numbers up to rounding. A build belongs to one TensorFlow, one kind of processor and one source, and
is not seen by another: it may use instructions that others do not have.
"""

import functools
import hashlib
import os
import platform
from pathlib import Path
from types import ModuleType

import tensorflow as tf

SOURCE = Path(__file__).with_name("lstm.cc")
UNITS_MULTIPLE = 16
DISABLED = "WARMSTATE_NATIVE"  # set to 0, the build is not used


def library_path() -> Path:
    """Returns where the build for this machine is, or would be."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    made_of = "\n".join([tf.__version__, platform.machine(), *kind]).encode() + SOURCE.read_bytes()
    return SOURCE.parent / "build" / f"lstm-{hashlib.sha256(made_of).hexdigest()[:16]}.so"


def hint() -> str:
    """Returns what to do where layers could run the compiled loops and do not, "" elsewhere."""
    path = library_path()
    if os.environ.get(DISABLED) == "0" or path.exists() or tf.config.list_physical_devices("GPU"):
        return ""
    others = any(path.parent.glob("lstm-*.so"))
    why = "a build for another source, processor or TensorFlow is there; " if others else ""
    return f"lstm: TensorFlow's loops; {why}python -m trainer.native.build compiles faster ones"


_in_inference = False


def use_in_inference() -> None:
    """Lets layers run the compiled loops outside of training too, in this process, from now on.

    For programs that export nothing: what is traced then cannot be loaded elsewhere.
    """
    global _in_inference
    _in_inference = True


def operations(training: bool) -> ModuleType | None:
    """Returns the module of the compiled operations, None where they are not to be used."""
    return _load() if training or _in_inference else None


@functools.cache
def _load() -> ModuleType | None:
    path = library_path()
    if os.environ.get(DISABLED) == "0" or not path.exists():
        return None
    return tf.load_op_library(str(path))
