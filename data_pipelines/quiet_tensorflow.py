"""Imports TensorFlow without its libraries' notes about the machine."""

import os
import sys
import tempfile


def import_quietly() -> None:
    """Imports tensorflow, and shows what it prints to stderr meanwhile only if that fails.

    Set TF_CPP_MIN_LOG_LEVEL to see TensorFlow's later log lines.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            import tensorflow as tf
        except BaseException:
            notes.seek(0)
            os.write(terminal, notes.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
    tf.get_logger().setLevel("ERROR")
