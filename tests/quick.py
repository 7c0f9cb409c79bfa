"""`pytest --quick`: only what needs neither TensorFlow nor a process, so that it takes seconds.

Whichever test imports TensorFlow or starts a process is skipped at that point; so is a module that
cannot be imported without. Nothing has to be marked, and what runs cannot have done either.
"""

import importlib.abc
import multiprocessing.util
import sys
import traceback
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
        if name not in LIBRARIES:
            return
        frames = [frame for frame, _ in traceback.walk_stack(None)]
        for module in (f.f_globals for f in frames if f.f_code.co_name == "<module>"):
            if str(module.get("__file__")).endswith(
                "conftest.py"
            ):  # all its folder would be left out
                pytest.exit(f"{module['__file__']} imports {name}: do so in its fixtures")
            if module["__name__"] != "__main__":
                sys.modules.pop(module["__name__"], None)  # nobody may find half a module
        pytest.skip(f"imports {name}", allow_module_level=True)


def _skip_a_start(event: str, arguments: tuple[Any, ...]) -> None:
    if event in STARTS:
        pytest.skip("starts a process", allow_module_level=True)


def _skip_a_spawn(*arguments: Any) -> None:
    pytest.skip("starts a process", allow_module_level=True)
