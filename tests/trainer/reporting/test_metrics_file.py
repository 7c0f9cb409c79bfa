import json
from pathlib import Path

import pytest

from trainer.reporting.metrics_file import Metrics, describe, format_seconds


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (0, 47.4, 59.6, 185, 7625)] == [
        "0s",
        "47s",
        "1m00s",
        "3m05s",
        "2h07m",
    ]


def test_describe() -> None:
    assert describe({"error_percent": 12.3456, "loss": 0.25}) == "error percent 12.35 · loss 0.25"


def test_a_resumed_run_writes_its_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, "pretrain")
    metrics.forget_after(0)  # there is no file yet
    for step in (10, 20, 30):
        metrics.write(step, loss=1.0 / step)
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # the process was killed while it wrote
    metrics.forget_after(20)
    metrics.write(30, loss=5.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 0.1), (20, 0.05), (30, 5.0)]
    assert all(line["stage"] == "pretrain" and line["unix_time"] > 0 for line in lines)


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text('{"stage": "finetune", "step": 1}\n')
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        Metrics(tmp_path / "metrics.jsonl", "finetune").write(1, loss=0.5)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl.new").symlink_to(victim)
    metrics = Metrics(tmp_path / "metrics.jsonl", "finetune")
    metrics.write(3, loss=0.5)
    metrics.forget_after(2)
    assert victim.read_text() == '{"stage": "finetune", "step": 1}\n'


def test_an_evaluation_that_is_to_be_done_again_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, "pretrain")
    lines = [(10, {"tokens_per_second": 2.0}), (10, {"perplexity": 3.0})]
    lines += [(20, {"skipped_steps": 1}), (20, {"tokens_per_second": 2.0}), (20, {"loss": 3.0})]
    for step, values in lines:
        metrics.write(step, **values)
    metrics.forget_after(20, evaluated=True)
    assert len(path.read_text().splitlines()) == 5
    metrics.forget_after(20, evaluated=False)
    assert len(path.read_text().splitlines()) == 4 and "loss" not in path.read_text()


DAMAGE = [
    b'{"step": 1\xff}\n',
    b'{"step": null}\n',
    b'{"step": true, "loss": 1}\n',
    b"[" * 100_000 + b"\n",
    b"[1]\n",
    b"\n",
    b"\x00\x00\n",
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda line: repr(line[:20]))
def test_damaged_lines_are_dropped_and_counted(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, "pretrain")
    metrics.write(10, loss=1.0)
    whole = path.read_bytes()
    path.write_bytes(damage + whole + damage.rstrip(b"\n"))
    assert metrics.forget_after(10) == 1
    assert path.read_bytes() == whole
