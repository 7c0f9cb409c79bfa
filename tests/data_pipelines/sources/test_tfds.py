import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample, Example, open_source, tfds

IMDB = Path("imdb_reviews", "plain_text", "1.0.0")


def text_bytes(i: int) -> bytes:
    return {3: b"caf\xe9", 4: b" "}.get(i, f"text {i}".encode())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets made by TFDS's own builders."""
    import numpy as np
    import tensorflow_datasets as real

    root = tmp_path_factory.mktemp("tfds")

    def prepare(
        data_set: str, features: dict, splits: dict[str, int], row: Callable, **options: object
    ) -> None:
        class Made(real.core.GeneratorBasedBuilder, skip_registration=True):
            name = data_set
            VERSION = real.core.Version(options.pop("version", "1.0.0"))

            def _info(self) -> real.core.DatasetInfo:
                return real.core.DatasetInfo(
                    builder=self, features=real.features.FeaturesDict(features)
                )

            def _split_generators(self, manager: object) -> dict:
                return {split: self._generate_examples(n) for split, n in splits.items()}

            def _generate_examples(self, count: int) -> Iterator:
                for i in range(count):
                    yield i, row(i)

        Made(data_dir=root, **options).download_and_prepare(
            download_config=real.download.DownloadConfig(num_shards=2)
        )

    text, label = real.features.Text(), real.features.ClassLabel(names=["neg", "pos", "mixed"])
    plain = {"text": text, "label": label}
    splits = {"train": 300, "test": 20, "unsupervised": 9, "extra": 2}

    def plain_row(i: int) -> dict:
        return {"text": text_bytes(i), "label": i % 3 if i != 5 else -1}

    prepare("plain", plain, splits, plain_row)
    prepare("records", plain, splits, plain_row, file_format="array_record")
    prepare(
        "many",
        {
            "title": text,
            "body": real.features.Tensor(shape=(), dtype=np.str_),
            "words": real.features.Sequence(real.features.Text()),
            "stars": label,
            "topic": label,
            "year": real.features.Scalar(np.int32),
        },
        {"train": 12, "validation": 3},
        lambda i: {
            "title": f"title {i}",
            "body": f"body {i}",
            "words": ["w"] * i,
            "stars": 2,
            "topic": 1,
            "year": 1999,
        },
    )
    for version in ("1.9.0", "1.10.0"):
        prepare(
            "unlabelled",
            {"text": real.features.Text()},
            {"train": 12},
            lambda i, version=version: {"text": f"{version} text {i}"},
            version=version,
        )
    configs = root / "configured"
    for config in ("one", "two"):
        shutil.copytree(root / "unlabelled" / "1.9.0", configs / config / "1.9.0")
    return root


@pytest.mark.parametrize("name", ["plain", "records"])
def test_splits_labels_and_dirty_text(prepared: Path, read: Callable, name: str) -> None:
    source = open_source(f"tfds:{name}", str(prepared))
    assert source.splits == ("train", "validation", "test", "unsupervised")
    assert len(source.class_names) == 3 and source.class_names == ("neg", "pos", "mixed")
    assert "validation is 15 %" in source.note and "not read: extra" in source.note
    found = {split: read(source, split) for split in source.splits}
    train = found["train"] + found["validation"]
    assert len(train) == 300 and 20 < len(found["validation"]) < 70
    assert len(found["test"]) == 20 and len(found["unsupervised"]) == 9
    folder = prepared / name / "1.0.0"
    for split, examples in [("train", train), ("test", found["test"])]:
        bad = sorted(e.why for e in examples if isinstance(e, BadExample))
        assert [why.split(" at ")[0] for why in bad] == [
            "label -1 is not in 0 .. 2",
            "not UTF-8: byte 0xe9",
            "the text is empty",
        ]
        wheres = [e.where for e in examples if isinstance(e, BadExample)]
        assert all(where.startswith(f"{folder}, split {split}, record ") for where in wheres)
    for example in [e for e in train + found["test"] if isinstance(e, Example)]:
        assert example.label == int(example.text.split()[1]) % 3
    assert {e.label for e in found["unsupervised"] if isinstance(e, Example)} == {None}
    ids = [e.id for e in train if isinstance(e, Example)]
    assert len(set(ids)) == len(ids) == 297 and ids[0].startswith("train-00")


def test_parts_do_not_change_what_is_read(
    prepared: Path, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("tfds:plain", str(prepared))
    whole = read(source, "train")
    monkeypatch.setattr(tfds, "PART_BYTES", 5_000)
    parts = source.parts("train")
    assert len(parts) > 2 and parts[0] == f"train[0:{300 // len(parts)}]"
    copy = pickle.loads(pickle.dumps(source))
    assert copy.parts("train") == parts and read(copy, "train") == whole


def test_features_are_chosen_by_flags(prepared: Path, read: Callable) -> None:
    options = {"text_key": "body", "label_key": "stars"}
    source = open_source("tfds:many", str(prepared), **options)
    assert source.splits == ("train", "validation") and len(read(source, "validation")) == 3
    assert {(e.text[:4], e.label) for e in read(source, "train")} == {("body", 2)}
    unlabelled = open_source("tfds:many", str(prepared), text_key="title", with_labels=False)
    assert {(e.text[:5], e.label) for e in read(unlabelled, "train")} == {("title", None)}
    assert unlabelled.class_names == ()


def test_features_that_are_ambiguous_or_missing(prepared: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_source("tfds:many", str(prepared))
    assert "2 features for --text_key: body, title;" in str(caught.value)
    assert "2 features for --label_key: stars, topic;" in str(caught.value)
    with pytest.raises(InputError, match="--text_key=year is not one of its features body, title"):
        open_source("tfds:many", str(prepared), text_key="year", label_key="stars")


def test_newest_version_and_no_labels(prepared: Path, read: Callable) -> None:
    source = open_source("tfds:unlabelled", str(prepared))
    assert len(source.class_names) == 0 and source.splits == ("train", "validation")
    found = read(source, "train") + read(source, "validation")
    assert sorted(e.text for e in found) == sorted(f"1.10.0 text {i}" for i in range(12))
    assert {e.label for e in found} == {None} and "version 1.10.0" in source.note


def test_configs(prepared: Path, read: Callable) -> None:
    with pytest.raises(InputError, match="several configs: .*tfds:configured/CONFIG.* one, two"):
        open_source("tfds:configured", str(prepared))
    assert len(read(open_source("tfds:configured/two", str(prepared)), "train")) > 5


def test_missing_record_files_are_all_named(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain" / "1.0.0"
    shutil.copytree(prepared / "plain" / "1.0.0", folder)
    for file in folder.glob("*train*"):
        file.unlink()
    with pytest.raises(InputError) as caught:
        open_source("tfds:plain", str(tmp_path))
    assert all("plain-train.tfrecord-0" in line for line in str(caught.value).splitlines())


def test_damaged_record_file_says_how_far_it_was_read(
    prepared: Path, tmp_path: Path, read: Callable
) -> None:
    folder = tmp_path / "plain" / "1.0.0"
    shutil.copytree(prepared / "plain" / "1.0.0", folder)
    for file in folder.glob("*test*"):
        file.write_bytes(file.read_bytes()[:-5])
    source = open_source("tfds:plain", str(tmp_path))
    with pytest.raises(InputError, match=r"1\.0\.0, split test cannot be read after record \d+"):
        read(source, "test")


def test_without_a_folder_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(InputError, match="--data_dir"):
        open_source("tfds:imdb_reviews")


def test_folder_without_the_data_set_says_what_it_holds(prepared: Path) -> None:
    with pytest.raises(
        InputError,
        match=f"--data_dir={prepared}.*no prepared other.*dataset_info.json is missing; it holds "
        ".*many, plain, records, unlabelled",
    ):
        open_source("tfds:other", str(prepared))


def test_environment_names_the_folder(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(open_source("tfds:plain").class_names) == 3


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"name": "imdb_reviews"}', "cannot be read"),
        ('{"name": "a", "splits": [], "fileFormat": "riegeli"}', "format riegeli are not read"),
        (
            '{"name": "imdb_reviews", "splits": [{"name": "train", "shardLengths": ["25000"]}]}',
            "train.tfrecord-00000-of-00001 is missing",
        ),
    ],
)
def test_damaged_description(tmp_path: Path, description: str, message: str) -> None:
    path = tmp_path / IMDB / "dataset_info.json"
    path.parent.mkdir(parents=True)
    path.write_text(description)
    with pytest.raises(InputError, match=message):
        open_source("tfds:imdb_reviews", str(tmp_path))


def test_imdb_must_be_complete(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / IMDB
    shutil.copytree(prepared / "plain" / "1.0.0", folder)
    description = json.loads((folder / "dataset_info.json").read_text())
    assert description["name"] == "plain"
    with pytest.raises(InputError) as caught:
        open_source("tfds:imdb_reviews", str(tmp_path))
    assert [line.partition(": split ")[2] for line in str(caught.value).splitlines()] == [
        "train has 300 reviews, not 25000",
        "test has 20 reviews, not 25000",
        "unsupervised has 9 reviews, not 50000",
    ]


def test_imdb_validation_is_15_percent_of_the_official_train_split(
    tfds_dir: str, read: Callable
) -> None:
    source = open_source("tfds:imdb_reviews", tfds_dir)
    train, validation = read(source, "train"), read(source, "validation")
    ids = {e.id for e in train} | {e.id for e in validation}
    assert len(ids) == len(train) + len(validation) == 25_000
    assert abs(len(validation) - 3750) < 150
    assert not {e.text for e in train} & {e.text for e in validation}
    assert sum(e.label for e in train + validation) == 12_500


def test_imdb_unsupervised_reviews_have_no_label(tfds_dir: str) -> None:
    source = open_source("tfds:imdb_reviews", tfds_dir)
    first, *_, last = source.parts("unsupervised")
    example = next(source.examples("unsupervised", first))
    assert example.id == "unsupervised-00000" and example.label is None
    *_, example = source.examples("unsupervised", last)
    assert example.id == "unsupervised-49999"
