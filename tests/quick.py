"""`pytest --quick`: only what needs neither TensorFlow nor a process, so that it takes seconds.

Whichever test imports TensorFlow or starts a process is skipped at that point; so is a module that
cannot be imported without. Nothing has to be marked, and what runs cannot have done either.
"""

import importlib.abc
import multiprocessing.util
import sys
from collections.abc import Sequence
from typing import Any

import pytest

LIBRARIES = ("tensorflow", "keras", "horovod")  # each takes seconds to import
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --quick."""
    parser.addoption(
        "--quick", action="store_true", help="skip what imports TensorFlow or starts a process"
    )


def forbid() -> None:
    """Makes such an import and such a start skip the test from here on."""
    loaded = [name for name in LIBRARIES if name in sys.modules]
    assert not loaded, f"{loaded} imported before the tests"
    sys.meta_path.insert(0, _SkippingFinder())
    sys.addaudithook(_skip_a_start)
    multiprocessing.util.spawnv_passfds = _skip_a_spawn


class _SkippingFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name in LIBRARIES:
            pytest.skip(f"imports {name}", allow_module_level=True)


def _skip_a_start(event: str, arguments: tuple[Any, ...]) -> None:
    if event in STARTS:
        pytest.skip("starts a process", allow_module_level=True)


def _skip_a_spawn(*arguments: Any) -> None:
    pytest.skip("starts a process", allow_module_level=True)
