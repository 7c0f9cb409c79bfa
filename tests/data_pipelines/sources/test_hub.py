"""`hf:` sources, of data sets that `datasets` makes here; the network is cut off (conftest)."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import InputError
from data_pipelines.prepare.fingerprint import fingerprint
from data_pipelines.sources import BadExample, Example, open_source

pytestmark = pytest.mark.seconds
datasets: Any = None


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    """Imports `datasets`, which takes seconds, for these tests alone."""
    global datasets
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()


NAMES = ["pos", "neg"]  # not in the alphabet's order


def rows(count: int, of: str) -> "datasets.Dataset":
    """Returns a split of `count` documents, whose labels are classes."""
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=NAMES),
        n=datasets.Value("int64"),
    )
    columns = {"text": [f"{of} {i} caf\u00e9" for i in range(count)], "n": list(range(count))}
    columns["label"] = [i % 2 for i in range(count)]
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a data set of three splits, one of which is not read."""
    folder = tmp_path_factory.mktemp("saved")
    splits = {"train": rows(1100, "train"), "test": rows(50, "test"), "extra": rows(3, "extra")}
    splits["unsupervised"] = rows(40, "more").map(lambda row: {"label": -1})
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def test_splits_and_class_labels_of_a_saved_data_set(
    saved: Path, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.sources.hub.PART_ROWS", 300)
    source = open_source(f"hf:{saved}", id_key="n")
    assert source.class_names == ("neg", "pos")
    assert source.splits == ("train", "validation", "test", "unsupervised")
    assert "not read: extra" in source.note and "validation 10 %" in source.note
    assert len(source.parts("train")) == 4  # of 300 rows
    found = [e for split in ("train", "validation") for e in read(source, split)]
    assert sorted((int(e.id), e.label, e.text) for e in found) == [
        (i, 1 - i % 2, f"train {i} caf\u00e9") for i in range(1100)
    ]
    assert len(read(source, "validation")) > 50
    assert [e.label for e in read(source, "test")] == [1, 0] * 25
    assert {e.label for e in read(source, "unsupervised")} == {None}
    again = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    assert read(again, "test") == read(source, "test")


def test_a_data_set_without_splits_and_lists_of_labels(tmp_path: Path, read: Callable) -> None:
    labels = [["a", "b"], [], ["b"]] * 40
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.List(datasets.ClassLabel(names=["b", "a"]))
    )
    columns = {"text": [f"text {i}" for i in range(120)], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "a")
    source = open_source(f"hf:{tmp_path}/a", labels="multi")
    assert source.class_names == ("a", "b") and source.label_sets == ((), (0, 1), (1,))
    found = [e for split in source.splits for e in read(source, split)]
    wanted = {f"text {i}": source.label_sets.index(((0, 1), (), (1,))[i % 3]) for i in range(120)}
    assert {e.text: e.label for e in found} == wanted
    assert all(e.id.startswith("a#@") for e in found)


def test_files_that_load_dataset_reads(
    tmp_path: Path, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    for split in ("train", "test"):
        rows(60, split).to_parquet(tmp_path / "files" / f"{split}.parquet")
    source = open_source(f"hf:{tmp_path}/files")
    assert [e.text for e in read(source, "test")] == [f"test {i} caf\u00e9" for i in range(60)]


def test_bad_rows_and_what_is_missing(tmp_path: Path, read: Callable, saved: Path) -> None:
    found = {"text": ["a", None, "c", "  "], "label": ["x", "x", None, "x"]}
    split = datasets.Dataset.from_dict(found)
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(tmp_path / "a")
    first, *bad = read(open_source(f"hf:{tmp_path}/a"), "validation")
    assert first == Example("a#validation@0", "a", 0)
    assert [(each.where[-5:], each.why) for each in bad] == [
        ("row 2", "'text' is missing, not text"),
        ("row 3", "'label' is missing, not a word or a whole number"),
        ("row 4", "the text is empty"),
    ]
    assert all(isinstance(each, BadExample) for each in bad)
    for spec, says in (
        ("hf:", "names no data set"),
        ("hf:nobody/nothing", "cannot be loaded: .*Nothing is downloaded here: save it with"),
        (f"hf:{saved} --text_key", "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=says):
            open_source(spec)
    with pytest.raises(InputError, match="has no 'words' .*it has text, n, label"):
        open_source(f"hf:{saved}", text_key="words")
    datasets.DatasetDict({"dev": rows(3, "dev")}).save_to_disk(tmp_path / "b")
    with pytest.raises(InputError, match="no split train or unsupervised; it has dev"):
        open_source(f"hf:{tmp_path}/b")


def test_other_rows_are_another_source(tmp_path: Path) -> None:
    prints = []
    for count in (20, 21):
        from data_pipelines.sources import hub

        hub._loaded.cache_clear()
        rows(count, "a").save_to_disk(tmp_path / "a")
        prints.append(fingerprint(open_source(f"hf:{tmp_path}/a")))
    assert prints[0] != prints[1]
