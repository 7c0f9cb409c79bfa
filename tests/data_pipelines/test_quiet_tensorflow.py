"""`import_quietly` in new processes, because pytest has imported TensorFlow already."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PROGRAM = """
import json, sys
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly(is_program={is_program})
found = [name in sys.modules for name in ("tensorflow", "keras", "sklearn", "pandas")]
import pandas, sklearn
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "is_program",
    [True, pytest.param(False, marks=pytest.mark.slow("starts TensorFlow anew; quick: True"))],
)
def test_programs_do_without_what_keras_imports_for_others(is_program: bool) -> None:
    command = [sys.executable, "-c", PROGRAM.format(is_program=is_program)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [True, True, not is_program, not is_program]
