"""Imports of the server process from which the workers of `prepare` are forked.

TensorFlow takes seconds to import, and its first operation starts threads: it is imported before
the fork, and no operation runs before it.
"""

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly(is_program=True)
import pyarrow.compute  # noqa: E402, F401

import data_pipelines.prepare.drafts  # noqa: E402
import data_pipelines.tokenizers.word  # noqa: E402, F401
