import collections
import re
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources.splits import describe, find_origins, hash_split, lay_out, short_names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.txt", "b.txt", "sub/c.txt", "x,y.txt", "e=f.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("*.txt", {"": ["a.txt", "b.txt", "e=f.txt", "x,y.txt"]}),
        ("**/c.txt", {"": ["sub/c.txt"]}),
        ("x,y.txt", {"": ["x,y.txt"]}),
        ("e=f.txt", {"": ["e=f.txt"]}),
        ("train=a.txt,test=b.txt", {"train": ["a.txt"], "test": ["b.txt"]}),
        (
            "unsupervised=x,y.txt,validation=sub/*",
            {"unsupervised": ["x,y.txt"], "validation": ["sub/c.txt"]},
        ),
    ],
)
def test_patterns_and_their_files(folder: Path, text: str, origins: dict) -> None:
    assert find_origins(text) == origins


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", ["names no files"]),
        ("z*", [r"no file matches z\*$"]),
        ("sub", [r"sub is a folder: write sub/\*"]),
        ("trian=a.txt", ["splits are named train, validation, test, unsupervised"]),
        ("train=a.txt,train=b.txt", ["names train twice"]),
        ("test=a.txt", ["names neither train=PATTERN nor unsupervised=PATTERN"]),
        ("train=a.txt,test=?.txt", [r"a\.txt is in train and in test"]),
        ("train=y*,test=z*", [r"no file matches y\*", r"no file matches z\*"]),
    ],
)
def test_faults_are_told_all_at_once(folder: Path, text: str, messages: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        find_origins(text)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.search(message, line)


@pytest.mark.parametrize(
    ("origins", "labelled", "shares"),
    [
        ([""], True, {"train": 80, "validation": 10, "test": 10}),
        ([""], False, {"validation": 10, "unsupervised": 90}),
        (["train"], True, {"train": 90, "validation": 10}),
        (["test", "train"], True, {"train": 90, "validation": 10, "test": None}),
        (["unsupervised"], False, {"validation": 10, "unsupervised": 90}),
        (
            ["unsupervised", "train"],
            True,
            {"train": 90, "validation": 10, "unsupervised": None},
        ),
        (["validation", "train"], True, {"train": None, "validation": None}),
    ],
)
def test_layout(origins: list[str], labelled: bool, shares: dict) -> None:
    layout = lay_out({origin: ["f"] for origin in origins}, labelled)
    found = {s: (files.percents or {}).get(s) for s, files in layout.items()}
    assert found == shares and list(found) == list(shares)
    assert ("by a hash" in describe(layout)) == any(shares.values())


def test_layout_without_drawing() -> None:
    assert lay_out({"": ["f"]}, False, draw=False) == {"unsupervised": ("", {"unsupervised": 100})}
    assert lay_out({"train": ["f"]}, True, draw=False) == {"train": ("train", None)}


def test_short_names_leave_out_the_common_folder() -> None:
    assert short_names(["/d/x/a", "/d/y/a"]) == {"/d/x/a": "x/a", "/d/y/a": "y/a"}
    assert short_names(["gs://b/a.csv"]) == {"gs://b/a.csv": "a.csv"}
    assert short_names(["/d/a", "/d/e/a"]) == {"/d/a": "a", "/d/e/a": "e/a"}


def test_hash_split_is_pinned_and_follows_the_percents() -> None:
    percents = {"a": 70, "b": 10, "c": 20}
    counts = collections.Counter(hash_split(f"text {i}", percents) for i in range(5000))
    assert [hash_split(t, percents) for t in ("", "x", "good film")] == ["a", "b", "a"]
    assert abs(counts["a"] - 3500) < 120 and abs(counts["b"] - 500) < 80


def test_hash_split_takes_lone_surrogates_and_refuses_bad_percents() -> None:
    assert hash_split("\ud800", {"a": 100}) == "a"
    with pytest.raises(ValueError, match="90"):
        hash_split("x", {"a": 90})
