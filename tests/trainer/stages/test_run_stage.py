"""How a run ends where its report cannot be written: the whole program is tests/integration's."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import InputError
from data_pipelines.store.token_store import TokenStore
from tests.trainer.reporting.test_trackers import Notes
from trainer import preflight
from trainer.config import Config
from trainer.distribution import run_lock
from trainer.distribution.cluster import Cluster
from trainer.distribution.tf_distribute import one_device
from trainer.stages import run_stage
from trainer.training.run import Run

RESULT = {"pretrain": {"steps": 3}}


@pytest.fixture
def make_run(small_store: Path, tmp_path: Path) -> Any:
    """Returns make(): a run that has come to its end, its lines, and what its tracker is told."""

    def make() -> tuple[Run, list[str], Notes]:
        config = Config(stage="pretrain", run_dir=str(tmp_path), store=str(small_store))
        run_stage.remember_config(config)
        lines: list[str] = []
        notes = Notes()
        store = TokenStore(small_store)
        run = Run(config, one_device(), store, None, lines.append, trackers=[notes])
        return run, lines, notes

    return make


def test_a_page_that_cannot_be_written_is_a_warning(make_run: Any, tmp_path: Path) -> None:
    run, lines, notes = make_run()
    (tmp_path / "report.html").mkdir()
    run_stage.write_report(run, RESULT, 1.0)
    assert json.loads((tmp_path / "report.json").read_text())["pretrain"] == {"steps": 3}
    warning, result = lines
    assert f"warning: {tmp_path}/report.html cannot be written: Is a directory" in warning
    assert f"python -m trainer.report_page.html {tmp_path}" in warning
    assert '"steps": 3' in result and "report.html" not in result
    assert [told[0] for told in notes.told] == ["finished"]


def test_a_page_that_cannot_be_drawn_is_a_warning(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise MemoryError("30,000 classes")

    run, lines, notes = make_run()
    monkeypatch.setattr(run_stage.html, "page", fail)
    run_stage.write_report(run, RESULT, 1.0)
    assert "report.html cannot be written: MemoryError: 30,000 classes; once" in lines[0]
    assert [told[0] for told in notes.told] == ["finished"]


def test_a_report_that_cannot_be_written_is_an_error_once_all_is_said(
    make_run: Any, tmp_path: Path
) -> None:
    run, lines, notes = make_run()
    (tmp_path / "report.json").mkdir()
    with pytest.raises(InputError, match="report.json cannot be written: Is a directory: make"):
        run_stage.write_report(run, RESULT, 1.0)
    assert '"steps": 3' in lines[-1] and (tmp_path / "report.html").is_file()
    assert [told[0] for told in notes.told] == ["finished"]


def test_wrong_loops_are_refused_before_data_are_prepared(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise InputError("WARMSTATE_NATIVE=avx3: this machine can have 0, portable")

    monkeypatch.setattr(run_stage.native, "has_gpu", lambda: False)
    monkeypatch.setattr(run_stage.native, "hint", refuse)
    monkeypatch.setattr(run_stage, "open_store", lambda *_: pytest.fail("data were prepared"))
    config = Config(stage="pretrain", run_dir=str(tmp_path), store=str(small_store))
    with pytest.raises(InputError, match="WARMSTATE_NATIVE=avx3"):
        run_stage.run_stage(config, Cluster(rank=0, size=1))


def test_a_small_vocabulary_has_an_exact_softmax_by_default(small_store: Path) -> None:
    store = TokenStore(small_store)
    lines: list[str] = []
    config = Config(stage="pretrain", store=str(small_store))
    assert preflight.store_faults(config, store) == []
    assert run_stage.exact_if_small(config, 1024, lines.append).sampled_softmax == 0
    assert lines == [
        "softmax: exact, because the vocabulary has 1024 words, not more than the default of "
        "--sampled_softmax=1024"
    ]
    assert run_stage.exact_if_small(config, 1025, lines.append) is config
    asked = Config(stage="pretrain", store=str(small_store), sampled_softmax=store.vocab_size)
    (fault,) = preflight.store_faults(asked, store)
    assert f"--sampled_softmax={store.vocab_size} must be below the store's vocabulary" in fault


def test_a_folder_in_use_ends_a_run_before_any_work(
    tmp_path: Path, small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.0)
    config = Config(stage="pretrain", run_dir=str(tmp_path), store=str(small_store))
    with (
        run_lock.held(tmp_path, print, {}),
        pytest.raises(InputError, match="is in use by process"),
    ):
        run_stage.run_stage(config, Cluster(rank=0, size=1), lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.FILE]
