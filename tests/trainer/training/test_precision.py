from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from trainer.config import Config
from trainer.distribution.tf_distribute import one_device
from trainer.training import precision


@pytest.mark.parametrize(("seconds", "chosen"), [(0.5, "mixed_bfloat16"), (0.95, "float32")])
def test_it_must_be_clearly_faster_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, chosen: str
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    lines: list[str] = []

    def choose(bfloat16_seconds: float, resume: bool) -> str:
        times = {"float32": 1.0, "mixed_bfloat16": bfloat16_seconds}
        monkeypatch.setattr(precision, "measure", lambda *sizes: times)
        config = Config(precision="auto", resume="auto" if resume else "never")
        return precision.resolved(config, one_device(), tmp_path, lines.append).precision

    assert choose(seconds, resume=True) == chosen
    assert f"precision: {chosen}; with bfloat16 the LSTM is {1 / seconds:.2f} times" in lines[0]
    other = 1.45 - seconds  # the machine has changed its mind
    assert choose(other, resume=True) == chosen
    assert choose(other, resume=False) != chosen
    assert len(lines) == 2


def test_what_cannot_be_remembered_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure", lambda *sizes: dict.fromkeys(precision.CHOICES, 1.0))
    folder = tmp_path / "none"
    with pytest.raises(InputError, match="precision.txt: No such file .* or set --precision"):
        precision.resolved(Config(precision="auto"), one_device(), folder, print)


@pytest.mark.parametrize("content", [b"", b"float3", b"float32\nfloat32", b"\xff"])
def test_a_damaged_choice_is_not_made_again(tmp_path: Path, content: bytes) -> None:
    """A resumed run would continue in another precision."""
    (tmp_path / "precision.txt").write_bytes(content)
    with pytest.raises(InputError, match="precision.txt holds .*, not one of float32, mixed"):
        precision.resolved(Config(precision="auto"), one_device(), tmp_path, print)


@pytest.mark.parametrize("limit", ["AVX2", "avx2_vnni", "SSE41"])
def test_bfloat16_is_not_tried_where_onednn_must_not_multiply_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    lines: list[str] = []
    monkeypatch.setattr(precision, "measure", lambda *sizes: pytest.fail("measured"))
    config = precision.resolved(Config(precision="auto"), one_device(), tmp_path, lines.append)
    assert config.precision == "float32" and (tmp_path / "precision.txt").exists()
    assert lines == [f"precision: float32; ONEDNN_MAX_CPU_ISA={limit} forbids products in bfloat16"]


@pytest.mark.bfloat16
def test_both_are_measured() -> None:
    times = precision.measure(2, 3, 4)
    assert set(times) == set(precision.CHOICES) and min(times.values()) > 0
