"""Builds the loops of lstm.cc for this machine.

python -m trainer.native.build      (make native)
"""

import shutil
import subprocess
import sys
from pathlib import Path

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()

import tensorflow as tf  # noqa: E402

from trainer.native import SOURCE, library_path  # noqa: E402


def build(library: Path) -> None:
    """Compiles them into the file `library`.

    Raises:
      RuntimeError: there is no g++ on this machine, or it says why it cannot.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("there is no g++ on this machine")
    beside = library.with_suffix(".new")
    command = [compiler, "-O3", "-march=native", "-fPIC", "-shared", "-w", str(SOURCE)]
    command += ["-o", str(beside), *tf.sysconfig.get_compile_flags()]
    done = subprocess.run(
        [*command, *tf.sysconfig.get_link_flags()], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    beside.replace(library)


def main() -> None:
    """Builds them, if that is not done; exits with 1, and says why, where it cannot be done."""
    library = library_path()
    if library.exists():
        return
    library.parent.mkdir(exist_ok=True)
    try:
        build(library)
    except RuntimeError as error:
        sys.exit(f"the faster LSTM for CPUs cannot be built: {error}")
    print(f"built {library}")


if __name__ == "__main__":
    main()
