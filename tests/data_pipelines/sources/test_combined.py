from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import open_source
from data_pipelines.sources.combined import open_combined


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("u.csv").write_text("body,stars\n" + "".join(f"u {i},{i}\n" for i in range(30)))
    Path("more.csv").write_text("body,stars\n" + "".join(f"m {i},?\n" for i in range(4)))
    Path("l.csv").write_text("text,stars\n" + "".join(f"l {i},{i % 2}\n" for i in range(60)))
    Path("plain.txt").write_text("a\nb\n")


def test_labelled_splits_and_all_unlabelled_training_text(files: None, read: Callable) -> None:
    unlabelled = "csv:train=u.csv,unsupervised=more.csv,test=plain.txt"
    Path("plain.txt").write_text("body\nnever read\n")
    source = open_combined(unlabelled, "csv:l.csv", unlabelled_text_key="body", label_key="stars")
    labelled = open_source("csv:l.csv", label_key="stars")
    assert source.splits == ("train", "validation", "test", "unsupervised")
    assert source.class_names == ("0", "1")
    assert len(source.class_names) == 2 and source.name == f"{unlabelled} + csv:l.csv"
    for split in labelled.splits:
        assert read(source, split) == read(labelled, split)
    own = open_source(unlabelled, with_labels=False, text_key="body")
    texts = [e.text for s in ("train", "unsupervised") for e in read(own, s)]
    found = read(source, "unsupervised")
    assert [e.text for e in found] == texts and "m 3" in texts and "u 0" in texts
    assert {e.label for e in found} == {None}
    assert all(e.id.startswith("unlabelled/") for e in found)
    parts = source.parts("unsupervised")
    assert len(set(parts)) == len(parts) == 2
    assert "also the validation of pretraining, are those of csv:l.csv" in source.note


def test_a_bare_pattern_is_unsupervised_as_a_whole(files: None, read: Callable) -> None:
    Path("lines.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    source = open_combined("text:lines.txt", "csv:l.csv", label_key="stars")
    assert len(read(source, "unsupervised")) == 100
    source = open_combined("textfiles:*.*", "csv:l.csv", label_key="stars")
    assert len(read(source, "unsupervised")) == 5


def test_faults_of_both_are_told_with_their_flags(files: None) -> None:
    with pytest.raises(InputError) as caught:
        open_combined("text:nothing", "csv:l.csv", label_key="points")
    first, second = str(caught.value).splitlines()
    assert first.startswith("--unlabelled=text:nothing: no file")
    assert second.startswith("--labelled=csv:l.csv: l.csv has no 'points'")


def test_labelled_source_without_labels(files: None) -> None:
    with pytest.raises(InputError, match="--labelled=text:plain.txt has no labelled training"):
        open_combined("text:l.csv", "text:plain.txt")
