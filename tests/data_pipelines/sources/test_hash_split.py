import collections

import pytest

from data_pipelines.sources.hash_split import hash_split


def test_hash_split_is_pinned_and_follows_the_percents() -> None:
    percents = {"a": 70, "b": 10, "c": 20}
    counts = collections.Counter(hash_split(f"text {i}", percents) for i in range(5000))
    assert [hash_split(t, percents) for t in ("", "x", "good film")] == ["a", "b", "a"]
    assert abs(counts["a"] - 3500) < 120 and abs(counts["b"] - 500) < 80


def test_hash_split_takes_lone_surrogates_and_refuses_bad_percents() -> None:
    assert hash_split("\ud800", {"a": 100}) == "a"
    with pytest.raises(ValueError, match="90"):
        hash_split("x", {"a": 90})
