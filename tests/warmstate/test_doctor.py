import os
import re
import sys
from pathlib import Path

import pytest

from tests import forked
from warmstate import doctor

REPOSITORY = Path(__file__).resolve().parents[2]
# `warmstate doctor` in a process that may open few files.
DOCTOR = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
runpy.run_module("warmstate", run_name="__main__")
"""


def test_what_is_wrong_is_said_and_exits_with_1() -> None:
    environment = {**os.environ, "TFDS_DATA_DIR": "/no/such/folder"}
    done = forked.run(
        [sys.executable, "-c", DOCTOR, "doctor"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    found = {line[7:22].strip(): line for line in lines if line[:6].strip() in ("ok", "WRONG")}
    assert len(found) == 12
    wrong = {name for name, line in found.items() if line.startswith("WRONG")}
    assert {"Open files", "Data sets"} <= wrong
    assert f"\n{len(wrong)} wrong" in done.stdout
    assert "ulimit -n 1024" in done.stdout and "TFDS_DATA_DIR=/no/such/folder" in done.stdout
    assert re.search("(compiled|TensorFlow's) loops", found["LSTM"]), found["LSTM"]
    assert "2.21" in found["TensorFlow"] and found["TensorFlow"].startswith("ok")


def test_a_program_that_cannot_be_run_is_a_fault() -> None:
    assert doctor._ask("import no_such_module") == (
        [],
        "ModuleNotFoundError: No module named 'no_such_module'",
    )
    assert doctor._ask("import os; os._exit(3)") == ([], "exit code 3")
    assert doctor._ask("print('a b')") == (["a b"], "")


def test_memory_and_cores_are_those_of_the_machine() -> None:
    assert str(os.cpu_count()) in doctor.cores().value
    assert doctor.memory().value.split()[0].replace(".", "").isdigit()
    assert "free of" in doctor.shared_memory().value


def test_data_sets_that_are_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imdb_reviews").mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    found = doctor.data_sets()
    assert "tfds:imdb_reviews" in found.value and not found.fault
