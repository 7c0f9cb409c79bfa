"""Each flagfile of the paper's rows runs, cut down by --scale=smoke, on a few real reviews."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.programs import ENVIRONMENT, REPOSITORY

FILES = sorted((REPOSITORY / "trainer" / "configs" / "paper").glob("*.cfg"))


@pytest.mark.slow("trains once with each flagfile; quick: test_preflight.py checks them")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_row_of_the_paper_runs(file: Path, small_store: Path, tmp_path: Path) -> None:
    # The store is there, so that its source is not read; it is one of words, all of them labelled.
    flags = ("--scale=smoke", f"--store={small_store}", "--tokenizer=word")
    flags += ("--unlabelled_batch_size=0",)
    done = subprocess.run(
        [sys.executable, "-m", "trainer.main", f"--flagfile={file}", *flags,
         f"--run_dir={tmp_path}"],
        cwd=REPOSITORY, env=ENVIRONMENT, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["config"]["finetune_steps"] == 4
    if report["stage"] == "all":
        assert report["pretrain"]["steps"] == 4 and len(report["test_error_percent"]) == 2
    else:
        assert 0 <= report["finetune"]["validation"]["error_percent"] <= 100
