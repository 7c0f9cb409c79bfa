"""Folders for a model hub, and bundles at addresses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

import warmstate
from data_pipelines.errors import InputError
from data_pipelines.store import fetch
from tests.integration.programs import train
from trainer.inference import hub

TEXTS = ["A fine film.", "dull, and far too long"]


@pytest.fixture(scope="module")
def run(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a small run of all stages."""
    folder = tmp_path_factory.mktemp("run")
    flags = (f"--store={small_store}", f"--run_dir={folder}", "--stage=all", "--starts=scratch")
    train(1, *flags, "--finetune_steps=2")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fetch.cache_folder("bundles")


def test_the_folder_is_a_bundle_with_a_card_of_what_was_recorded(run: Path, tmp_path: Path) -> None:
    bundle, folder = run / "scratch" / "classifier", tmp_path / "hub"
    hub.write_hub_folder(bundle, folder, "cc-by-4.0")
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "cc-by-4.0"
    error = hub.recorded_test_error(bundle)
    assert error is not None and f"| test, error_percent | {error:.4g} |" in text
    for words in ("## Data", "trained on: 200", "| validation, error_percent |", "## Limits"):
        assert words in text
    found, expected = (warmstate.load_classifier(f).probabilities(TEXTS) for f in (folder, bundle))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="--hub_dir=.* is there already"):
        hub.write_hub_folder(bundle, folder, "")


def test_a_classifier_is_fetched_once(run: Path, tmp_path: Path, cache: Path) -> None:
    there = shutil.copytree(run / "scratch" / "classifier", tmp_path / "there")
    address = f"file://{there}"
    found = warmstate.load_classifier(address).probabilities(TEXTS)
    expected = warmstate.load_classifier(there).probabilities(TEXTS)
    np.testing.assert_array_equal(found, expected)
    (there / "vocab.txt").unlink()  # no longer asked for
    np.testing.assert_array_equal(warmstate.load_classifier(address).probabilities(TEXTS), expected)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_an_encoder_is_read_from_an_address(encoder_bundle: Path, cache: Path) -> None:
    states = warmstate.load_encoder(f"file://{encoder_bundle}")(TEXTS)
    for found, expected in zip(states, warmstate.load_encoder(encoder_bundle)(TEXTS), strict=True):
        np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_a_damaged_or_missing_bundle_is_not_kept(
    encoder_bundle: Path, tmp_path: Path, cache: Path
) -> None:
    there = shutil.copytree(encoder_bundle, tmp_path / "there")
    data = bytearray((there / "vocab.txt").read_bytes())
    data[0] ^= 1
    (there / "vocab.txt").write_bytes(data)
    with pytest.raises(InputError, match=f"file://{there}.*vocab.txt is damaged"):
        warmstate.load_encoder(f"file://{there}")
    assert not [path for path in cache.iterdir() if path.suffix not in (".building", ".lock")]
    with pytest.raises(InputError, match="the encoder bundle cannot be fetched: "):
        warmstate.load_encoder("file:///none")
