"""Imports TensorFlow without its libraries' notes about the machine."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

# What Keras imports where it is there, for wrappers and inputs that none of our programs uses.
UNUSED = ("sklearn", "pandas")


def import_quietly(is_program: bool = False) -> None:
    """Imports tensorflow, and shows what it prints to stderr meanwhile only if that fails.

    Set TF_CPP_MIN_LOG_LEVEL to see TensorFlow's later log lines.

    Args:
        is_program: This process runs a program of ours, and nobody else's code: Keras then does
            not import UNUSED, which takes a third of the time, and `fit` takes no DataFrames.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            with _hidden(UNUSED if is_program else ()):
                import tensorflow as tf
        except BaseException:
            notes.seek(0)
            os.write(terminal, notes.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
    tf.get_logger().setLevel("ERROR")


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Lets nobody import packages that are not imported yet."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
