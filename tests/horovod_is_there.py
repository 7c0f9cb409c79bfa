"""Marks the tests that need Horovod."""

import importlib.util
import os

import pytest

_WHY_NOT = (
    "left out by HOROVOD=0"
    if os.environ.get("HOROVOD") == "0"
    else "Horovod is not installed: make horovod"
    if importlib.util.find_spec("horovod") is None
    else ""
)
needs_horovod = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)
