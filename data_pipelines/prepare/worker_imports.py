"""Imported once by the process from which `prepare`'s workers are forked: TensorFlow.

Importing TensorFlow costs seconds and its first operation starts threads; so it is imported before
the fork, and no operation runs before it.
"""

from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()
import data_pipelines.prepare.drafts  # noqa: E402, F401
import data_pipelines.tokenizers.word  # noqa: E402, F401
