import json
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.report_page.test_run_folder import write_predictions
from trainer.report_page import run_folder, verdict


def compared(folder: Path, scratch: float, warm: float, seed: int = 0, **config: object) -> Path:
    """Writes a run whose classifiers get those shares of 4,000 documents wrong."""
    (folder / "warm").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": seed, **config}))
    for name, share in (("scratch", scratch), ("warm", warm)):
        logits = np.ones((4000, 1), np.float32)
        logits[: round(4000 * share)] = -1
        write_predictions(
            folder / name / "predictions",
            document=np.arange(4000),
            label=np.ones(4000, np.int32),
            logits=logits,
        )
    return folder


def said(*folders: Path) -> verdict.Verdict:
    runs = [run_folder.read(folder) for folder in folders]
    return verdict.verdict(runs, [verdict.outcome(run) for run in runs])


@pytest.mark.parametrize(
    ("scratch", "warm", "title", "says"),
    [
        (0.3, 0.2, "The warm start makes fewer errors", "10.0 points less"),
        (0.2, 0.3, "The warm start makes more errors", "10.0 points more (95 % interval 9.1 to"),
        (0.2, 0.2, "No clear difference", "0.0 points less (95 % interval 0.0 to 0.0)"),
    ],
)
def test_one_run(tmp_path: Path, scratch: float, warm: float, title: str, says: str) -> None:
    found = said(compared(tmp_path / "a", scratch, warm))
    assert found.title.startswith(title) and says in found.text
    assert "4,000 test documents" in found.text


def test_the_order_of_documents_does_not_matter_for_pairs(tmp_path: Path) -> None:
    folder = compared(tmp_path / "a", 0.3, 0.3)
    logits = np.ones((4000, 1), np.float32)
    logits[-1200:] = -1  # the same documents, read the other way round
    write_predictions(
        folder / "warm" / "predictions",
        document=np.arange(4000)[::-1].copy(),
        label=np.ones(4000, np.int32),
        logits=logits,
    )
    found = verdict.outcome(run_folder.read(folder))
    assert found.is_paired and found.difference == (0, 0, 0)


def test_seeds_are_averaged_and_other_settings_are_not(tmp_path: Path) -> None:
    runs = [compared(tmp_path / str(i), 0.30 + i / 100, 0.25, seed=i) for i in range(3)]
    found = said(*runs)
    assert found.title == "The warm start makes fewer errors"
    assert "Over 3 seeds" in found.text and "6.0 points less (95 % interval 3.5 to 8.5)" in (
        found.text
    )
    other = compared(tmp_path / "other", 0.3, 0.2, units=64)
    assert said(runs[0], other).title == "2 runs of different settings"
    assert "--units" in said(runs[0], other).text


def test_without_predictions_the_report_has_the_errors(tmp_path: Path) -> None:
    test = {n: {"error_percent": e, "documents": 1000} for n, e in (("scratch", 30), ("warm", 20))}
    (tmp_path / "report.json").write_text(json.dumps({"test": test}))
    found = verdict.outcome(run_folder.read(tmp_path))
    assert not found.is_paired
    assert found.difference == pytest.approx((10, 6.2, 13.8), abs=0.1)


def test_nothing_is_said_before_there_is_anything(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 0}')
    assert said(tmp_path).title == "No classifier has been evaluated yet"
    write_predictions(tmp_path / "predictions")
    assert said(tmp_path).title == "50.0 % error"
