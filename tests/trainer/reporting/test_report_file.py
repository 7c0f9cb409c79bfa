import json
from pathlib import Path

from trainer.reporting import report_file as reports

PART = {
    "init_weights": "encoder",
    "initial_state": "learned",
    "labelled_documents": 1200,
    "best_step": 30,
    "seconds": 65.0,
    "tokens_per_second": 12345.6,
    "validation": {"error_percent": 20.5},
}
REPORT = {
    "pretrain": {"perplexity": 301.4, "steps": 900, "seconds": 200, "tokens_per_second": 50000},
    "warm": PART,
    "scratch": PART | {"validation": {"error_percent": 25.25}},
    "test_error_percent": {"warm": 21.0, "scratch": 26.125},
    "test": {"warm": {"documents": 5056}},
    "broadcast": {"digests": ["aa", "ab"]},
    "data_note": "a note",
    "wall_seconds": 400,
}


def test_the_table_sets_both_starts_side_by_side() -> None:
    lines = reports.comparison_table(REPORT).splitlines()
    assert lines[2].split() == [
        "from",
        "scratch",
        "26.12",
        "%",
        "25.25",
        "%",
        "30",
        "1m05s",
        "12,346",
    ]
    assert lines[3].split()[:4] == ["warm", "start", "21.00", "%"]
    assert lines[4].split() == ["pretraining", "ppl", "301", "900", "3m20s", "50,000"]
    assert len({len(line) for line in lines[:5]}) == 1
    text = "\n".join(lines)
    assert "worker 0 holds aa\nworker 1 holds ab" in text
    assert "1,200 labelled documents to train on, 5,056 to test; all in all 6m40s" in text
    assert text.endswith("Data: a note.")


def test_the_table_of_one_start_has_its_row_alone() -> None:
    alone = {
        "scratch": PART,
        "test_error_percent": {"scratch": 26.125},
        "test": {"scratch": {"documents": 5056}},
        "data_note": "",
        "wall_seconds": 400,
    }
    text = reports.comparison_table(alone)
    assert "from scratch" in text and "warm" not in text and "pretraining" not in text
    assert text.endswith("1,200 labelled documents to train on, 5,056 to test; all in all 6m40s")


def test_write_replaces_the_report(tmp_path: Path) -> None:
    reports.write(tmp_path, {"a": 1})
    reports.write(tmp_path, {"a": 2})
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
