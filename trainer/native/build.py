"""Builds the compiled loops; `trainer.native` then measures them against TensorFlow's.

python -m trainer.native.build      (make native)
"""

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf

from trainer import native

FLAGS = ("-O3", "-fPIC", "-w")
# What loops.cc is compiled with for each instruction set; lstm.cc chooses one of them.
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f")
BFLOAT16 = (*AVX512, "-mavx512bf16")
X86: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": BFLOAT16,
    "amx_bf16": (*BFLOAT16, "-mamx-tile", "-mamx-bf16"),
}
NEON: dict[str, tuple[str, ...]] = {"neon": ()}
PORTABLE: dict[str, tuple[str, ...]] = {"portable": ()}
MACHINES = {"x86_64": X86, "AMD64": X86, "aarch64": NEON, "arm64": NEON}
INSTRUCTION_SETS = MACHINES.get(platform.machine(), PORTABLE)


def build(library: Path, extra: Sequence[str] = ()) -> None:
    """Compiles and links the file `library`, which appears whole or not at all.

    Args:
      extra: more flags for the compiler.

    Raises:
      RuntimeError: there is no C++ compiler on this machine, or it says why it cannot.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler on this machine")
    library.parent.mkdir(parents=True, exist_ok=True)
    # A folder that no other build has: two may run at once.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        command = [compiler, *FLAGS, *extra]
        parts = {
            name: [
                *flags,
                "-std=c++17",
                f"-DWARMSTATE_LOOPS={name}",
                str(native.FOLDER / "loops.cc"),
            ]
            for name, flags in INSTRUCTION_SETS.items()
        }
        parts["lstm"] = [*tf.sysconfig.get_compile_flags(), str(native.FOLDER / "lstm.cc")]
        objects = {name: str(Path(folder) / f"{name}.o") for name in parts}
        _run([[*command, "-c", *parts[name], "-o", objects[name]] for name in parts])
        linked = Path(folder) / library.name
        flags = ["-shared", *objects.values(), *tf.sysconfig.get_link_flags()]
        _run([[*command, *flags, "-o", str(linked)]])
        linked.replace(library)


def _run(commands: list[list[str]]) -> None:
    """Runs commands at the same time; RuntimeError with what they say if one fails."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    said = [process.communicate()[0] for process in running]
    failed = [text for process, text in zip(running, said, strict=True) if process.returncode]
    if failed:
        raise RuntimeError("\n".join(failed))


def main() -> None:
    """Builds and measures, unless that is done; exits with 1, and says why, if it cannot."""
    library = native.library_path()
    try:
        if not library.exists():
            build(library)
    except (RuntimeError, OSError) as error:
        sys.exit(f"the faster LSTM for CPUs cannot be built: {error}")
    print(native.hint() or "lstm: built; a GPU does not need it")


if __name__ == "__main__":
    main()
