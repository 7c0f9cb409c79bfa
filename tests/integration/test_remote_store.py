"""Training on a store whose tokens stay at an address: the same bits, and how it can end."""

import shutil
from pathlib import Path

import pytest

from tests.integration.programs import ENVIRONMENT, metrics, run, train

FLAGS = ("--stage=pretrain", "--pretrain_steps=24")
pytestmark = pytest.mark.slow("eight trainings; quick: the batches of test_remote_tokens.py")


@pytest.fixture
def bound(small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the flag that fetches everything but the tokens."""
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = [path for path in small_store.iterdir() if path.suffix not in (".tokens", ".json")]
    return f"--store_cache_bytes={sum(path.stat().st_size for path in index)}"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bits_are_those_of_a_store_on_this_disk(
    small_store: Path, tmp_path: Path, bound: str, workers: int
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    train(workers, *FLAGS, f"--store={small_store}", f"--run_dir={here}")
    flags = (*FLAGS, f"--store=file://{small_store}", bound)
    assert "the tokens of 3 shards stay at" in train(workers, *flags, f"--run_dir={there}")
    assert metrics(there) == metrics(here)
    weights = [folder / "encoder/encoder.safetensors" for folder in (here, there)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("fault", ["zeros", "gone"])
def test_what_is_wrong_there_ends_the_run_with_one_line(
    small_store: Path, tmp_path: Path, bound: str, fault: str
) -> None:
    """The tokens have another content, or are gone, after the rest was fetched."""
    there = shutil.copytree(small_store, tmp_path / "there")
    flags = (*FLAGS, f"--store=file://{there}", bound, f"--run_dir={tmp_path}/run")
    train(1, *flags, "--pretrain_steps=1")
    for path in there.glob("*.tokens"):
        path.write_bytes(bytes(path.stat().st_size)) if fault == "zeros" else path.unlink()
    done = run(1, *flags, "--resume=never")
    assert done.returncode == 2, done.stderr
    what = "is not the one that its manifest names" if fault == "zeros" else "cannot be read"
    assert done.stderr.splitlines()[-1].startswith(f"error: --store=file://{there}")
    assert what in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
