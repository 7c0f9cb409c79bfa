"""The mirror at the object store that WARMSTATE_TEST_STORE names, with kills.

    WARMSTATE_TEST_STORE=gs://bucket/trial python -m pytest -n0 tests/integration/test_any_store.py

For stores that no other test has: docs/reliability.md says which were tried. What it writes there
is left.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.object_store import ObjectStore
from tests.integration.programs import REPOSITORY
from tests.trainer.test_mirror import BIG, Lines, content, fetched, write_step
from trainer.mirror import mirrored

PLACE = os.environ.get("WARMSTATE_TEST_STORE", "")
pytestmark = pytest.mark.skipif(not PLACE, reason="WARMSTATE_TEST_STORE names no object store")
KILLS = 8
SITTING = """
import sys, time
from pathlib import Path
from tests.trainer.test_mirror import Lines, write_step
from trainer.mirror import mirrored
url, folder, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
with mirrored(url, folder, False, Lines()) as saved:
    for step in range(first, first + 1000):
        write_step(folder, step)
        saved()
        time.sleep(0.3)
"""


@pytest.fixture
def url() -> str:
    return f"{PLACE.rstrip('/')}/{uuid.uuid4().hex}"


def started(*words: object) -> subprocess.Popen[str]:
    path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=os.environ | path,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kills the process at the end of the block."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_kill_at_any_time_leaves_a_whole_state(tmp_path: Path, url: str) -> None:
    newest, store = 0, ObjectStore(url)
    for kill in range(KILLS):
        folder = tmp_path / str(kill)  # each continues from the store alone
        before = store.sizes("objects").keys()
        with killed(started("-c", SITTING, url, folder, newest + 1)) as process:
            while process.poll() is None and not store.sizes("objects").keys() - before:
                time.sleep(0.02)
            time.sleep(kill * 0.1)  # anywhere in what follows
        found = fetched(url, tmp_path / f"after{kill}")
        newest = max((int(n[17:25]) for n in found if "step-" in n), default=0)
        for step in range(max(newest - 1, 1), newest + 1):
            name = f"checkpoints/step-{step:08d}"
            assert found[f"{name}/state.safetensors"] == bytes([step % 251]) * BIG
            assert found[f"{name}/state.json"] == b"%d" % step
    assert newest
    with mirrored(url, tmp_path / "last", False, Lines()):
        write_step(tmp_path / "last", newest + 1)
    assert fetched(url, tmp_path / "again") == content(tmp_path / "last")


def test_a_large_file_goes_there_and_back(tmp_path: Path, url: str) -> None:
    folder = tmp_path / "run"
    with mirrored(url, folder, False, Lines()):
        write_step(folder, 1)
        (folder / "large").write_bytes(os.urandom(1000) * 150_000)
    assert fetched(url, tmp_path / "second") == content(folder)
