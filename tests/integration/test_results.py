"""Results are what their classifiers, which are kept beside them, give again."""

import json
from pathlib import Path

import pytest

from tests.integration.programs import REPOSITORY, train

RESULTS = REPOSITORY / "results"
KEPT = sorted(path.stem for path in RESULTS.glob("*.json") if path.with_suffix("").is_dir())


def test_there_is_one() -> None:
    assert KEPT


@pytest.mark.slow("evaluates kept classifiers on all of IMDB's test split")
@pytest.mark.parametrize("name", KEPT)
def test_a_kept_classifier_gives_its_error_again(name: str, tfds_dir: str, tmp_path: Path) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    config, kept = result["config"], result["kept_bundle"]["test"]
    train(
        1,
        "--stage=evaluate",
        f"--classifier={RESULTS / name}",
        "--source=tfds:imdb_reviews",
        f"--data_dir={tfds_dir}",
        f"--vocab_size={config['vocab_size']}",
        f"--run_dir={tmp_path}",
    )
    found = json.loads((tmp_path / "report.json").read_text())["test"]
    assert found["documents"] == kept["documents"]
    # Another processor adds up in another order: a few documents lie on the edge.
    assert found["error_percent"] == pytest.approx(kept["error_percent"], abs=0.02)
    assert kept["error_percent"] == pytest.approx(result["test_error_percent"]["warm"], abs=0.05)
