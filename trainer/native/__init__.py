"""The compiled loops of an LSTM layer, and whether this machine is to use them.

They are optional: without them the layer runs TensorFlow's own operations, which give the same
numbers up to rounding. One build holds the loops of every instruction set of an architecture, and
belongs to one TensorFlow and one source. The best set that the processor has is used if it is
faster here than TensorFlow's loops; for bfloat16 that may be so where it is not for float32. It is
measured once for each kind of processor, at build time or at first use, and kept beside the build.

Two variables change that: WARMSTATE_NATIVE=0 leaves the compiled loops out, WARMSTATE_NATIVE=avx2
uses those of that set, measured or not. ONEDNN_MAX_CPU_ISA holds for them as for TensorFlow.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()

import tensorflow as tf  # noqa: E402

from data_pipelines.durable import write_file  # noqa: E402
from data_pipelines.errors import InputError  # noqa: E402

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("lstm.cc", "loops.cc", "loops.h", "build.py")]
UNITS_MULTIPLE = 16
CHOICE = "WARMSTATE_NATIVE"
BUILD = "python -m trainer.native.build"
MEASURE = "trainer.models.native_speed"
MEASURE_SECONDS = 240  # at most, on a busy machine; about 10 on an idle one
HALF_SETS = ("avx512_bf16", "amx_bf16")  # with instructions that multiply bfloat16
# What ONEDNN_MAX_CPU_ISA may be, by how it begins, and the best set that each allows.
MAX_ISA = {"AVX512_CORE_AMX": "amx_bf16", "AVX10_1_512_AMX": "amx_bf16", "AVX10_2": "amx_bf16",
           "AVX512_CORE_BF16": "avx512_bf16", "AVX512_CORE_FP16": "avx512_bf16",
           "AVX10": "avx512_bf16", "AVX512": "avx512", "AVX2": "avx2", "AVX": "portable",
           "SSE": "portable"}  # fmt: skip


class Choice(NamedTuple):
    """Which loops this process uses.

    Attributes:
      instruction_set: of the compiled loops; None: TensorFlow's loops.
      why: for the eye.
    """

    instruction_set: str | None
    why: str


def library_path() -> Path:
    """Returns where the build is, or would be."""
    digest = hashlib.sha256(f"{tf.__version__} {platform.machine()}".encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return FOLDER / "build" / f"lstm-{digest.hexdigest()[:16]}.so"


def measured_path() -> Path:
    """Returns the file that holds how much faster the build is, by processor, set and dtype."""
    return library_path().with_suffix(".json")


def processor() -> str:
    """Returns what tells kinds of processors apart: the name, and a digest of what it can do."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    kinds = ("flags", "Features", "model name", "CPU implementer", "CPU part")
    kept = sorted({line for line in lines if line.startswith(kinds)})
    names = [line.split(":", 1)[1].strip() for line in kept if line.startswith("model name")]
    digest = hashlib.sha256("\n".join(kept or lines).encode()).hexdigest()[:16]
    return f"{(names or [platform.machine()])[0]} {digest}"


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Returns the sets of the build that this processor has, the best one last."""
    names = ctypes.create_string_buffer(256)
    _library().warmstate_instruction_sets(names, ctypes.c_int64(len(names)))
    return tuple(names.value.decode().split(","))


def allowed_by_onednn() -> str:
    """Returns the best set that ONEDNN_MAX_CPU_ISA allows, or "" if it allows all."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return next((best for start, best in MAX_ISA.items() if most.startswith(start)), "")


def best_instruction_set() -> str:
    """Returns the best of `instruction_sets` that ONEDNN_MAX_CPU_ISA allows."""
    found, allowed = instruction_sets(), allowed_by_onednn()
    return allowed if allowed in found else found[-1]


@functools.cache
def choice(dtype: tf.DType) -> Choice:
    """Returns which loops this process uses, and why.

    Args:
      dtype: of the layer's products, float32 or bfloat16.

    Raises:
      InputError: WARMSTATE_NATIVE names an instruction set that is not there.
    """
    wanted = os.environ.get(CHOICE, "")
    if wanted == "0":
        return Choice(None, f"{CHOICE}=0")
    if has_gpu():
        return Choice(None, "the compiled ones are for CPUs")
    if not library_path().exists():
        others = any(library_path().parent.glob("lstm-*.so"))
        stale = "the build is for another source or TensorFlow; " if others else ""
        return Choice(None, f"{stale}{BUILD} compiles faster ones")
    if wanted:
        if wanted not in instruction_sets():
            can = ", ".join(("0", *instruction_sets()))
            raise InputError(f"{CHOICE}={wanted}: this machine can have {can}; unset it, or set it")
        return Choice(wanted, f"{CHOICE}={wanted}")
    best = best_instruction_set()
    if dtype != tf.float32 and best not in HALF_SETS:
        return choice(tf.float32)
    try:
        ratio = measured().get(_key(best, dtype)) or _measure(best, dtype)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Choice(None, f"the compiled ones could not be measured: {error}")
    than = " as TensorFlow's on this processor" if dtype == tf.float32 else ""  # is said once
    compared = f"measured {ratio:.2f} times as fast{than}"
    if ratio < 1:
        return Choice(None, f"the compiled ones ({best}) were {compared}")
    return Choice(best, compared)


def _key(instruction_set: str, dtype: tf.DType) -> str:
    return f"{processor()} {instruction_set} {dtype.name}"


def _measure(instruction_set: str, dtype: tf.DType) -> float:
    """Returns how many times faster than TensorFlow's the loops are, and keeps it."""
    done = subprocess.run(
        [sys.executable, "-m", MEASURE, instruction_set, dtype.name],
        cwd=FOLDER.parents[1],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=MEASURE_SECONDS,
        check=True,
    )
    ratio = float(done.stdout.splitlines()[-1])
    _keep(_key(instruction_set, dtype), ratio)
    return ratio


def _keep(key: str, ratio: float) -> None:
    """Writes a ratio beside the build; does nothing where that is read-only, as in a container."""
    path = measured_path()
    with contextlib.suppress(OSError):
        write_file(path, [json.dumps(measured() | {key: ratio}, indent=1).encode()])


def measured() -> dict[str, float]:
    """Returns how many times faster the loops are, by processor, set and dtype."""
    try:
        held = json.loads(measured_path().read_text())
    except (OSError, ValueError):
        return {}
    return {key: ratio for key, ratio in held.items() if isinstance(ratio, float)}


def has_gpu() -> bool:
    """Returns whether this process may use a GPU; starts no device, which no strategy allows."""
    return bool(tf.config.get_visible_devices("GPU"))


def hint() -> str:
    """Returns which loops an LSTM layer runs here, and why; "" on a GPU, which has cuDNN's."""
    if has_gpu():
        return ""
    whole, half = choice(tf.float32), choice(tf.bfloat16)
    return f"lstm: {_said(whole)}" + (f"; in bfloat16 {_said(half)}" if half != whole else "")


def _said(found: Choice) -> str:
    if found.instruction_set is None:
        return f"TensorFlow's loops; {found.why}"
    return f"compiled loops ({found.instruction_set}), {found.why}"


_in_inference = False
_overrides: list[str | None] = []  # of `using`, the innermost last
_used: str | None = None  # by the library


def use_in_inference(wanted: bool = True) -> bool:
    """Lets layers run the compiled loops outside of training too, in this process, from now on.

    For programs that export nothing: what is traced then cannot be loaded elsewhere.

    Returns:
      Whether it was so before.
    """
    global _in_inference
    before, _in_inference = _in_inference, wanted
    return before


@contextlib.contextmanager
def using(instruction_set: str | None) -> Iterator[None]:
    """Has layers use one set's loops, or TensorFlow's for None, while they are traced and run.

    For tests and measurements: it holds for the whole process.
    """
    before = _used
    _overrides.append(instruction_set)
    try:
        if instruction_set:
            _use(instruction_set)
        yield
    finally:
        _overrides.pop()
        if before:
            _use(before)


def operations(training: bool, dtype: tf.DType = tf.float32) -> ModuleType | None:
    """Returns the module of the compiled operations, None where they are not to be used.

    Args:
      dtype: of the layer's products.
    """
    if not (training or _in_inference) or (has_gpu() and not _overrides):
        return None
    chosen = _overrides[-1] if _overrides else choice(dtype).instruction_set
    if chosen is None:
        return None
    _use(chosen)
    return _module()


def _use(instruction_set: str) -> None:
    global _used
    if not _library().warmstate_use(instruction_set.encode()):
        raise InputError(f"this processor has no {instruction_set}: the compiled loops need it")
    _used = instruction_set


@functools.cache
def _module() -> ModuleType:
    return tf.load_op_library(str(library_path()))


@functools.cache
def _library() -> ctypes.CDLL:
    _module()  # loads what the library links to
    return ctypes.CDLL(str(library_path()))
