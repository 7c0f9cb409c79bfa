"""Runs real pipelines where apache-beam is installed; see docs/data-preparing.md for how."""

import importlib.util
import json
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.prepare import PrepareConfig, ensure_store
from data_pipelines.prepare.beam import beam_faults

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="apache-beam is not installed: pip install -e '.[beam]' in an environment of its own",
)


def quiet(line: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def spec(tmp_path: Path) -> str:
    for number in range(5):
        lines = [{"text": f"spam {i % 7} eggs {number}", "label": i % 2} for i in range(60)]
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"jsonl:{tmp_path}/*.jsonl"


@needs_beam
@pytest.mark.parametrize(
    "options", ["", "--direct_running_mode=multi_processing --direct_num_workers=2"]
)
def test_beam_makes_the_same_bytes(spec: str, tmp_path: Path, options: str) -> None:
    here = ensure_store(PrepareConfig(spec, vocab_size=9), tmp_path / "here", quiet)
    config = PrepareConfig(spec, vocab_size=9, runner="DirectRunner", runner_options=options)
    beam = ensure_store(config, tmp_path / "beam", quiet)
    assert contents(beam.folder) == contents(here.folder)
    assert not (tmp_path / "beam.building").exists()


@needs_beam
def test_an_input_error_in_a_pipeline_is_the_users(spec: str, tmp_path: Path) -> None:
    (tmp_path / "6.jsonl").write_text('{"text": "a", "label": 1}\n')
    config = PrepareConfig(spec, vocab_size=9, runner="DirectRunner")
    source = config.open_source()
    (tmp_path / "6.jsonl").unlink()
    from data_pipelines.prepare import build_store

    with pytest.raises(InputError, match="6.jsonl cannot be opened"):
        build_store(config, source, tmp_path / "store", quiet)


def test_without_beam_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--runner=DirectRunner needs Apache Beam: pip install"):
        PrepareConfig("movie_reviews", runner="DirectRunner")


def test_faults_of_the_flags() -> None:
    assert beam_faults("", "") == []
    assert beam_faults("", "--x") == ["--runner_options=--x needs --runner"]
    assert "is not spark, and none of DirectRunner" in beam_faults("Local", "")[0]
