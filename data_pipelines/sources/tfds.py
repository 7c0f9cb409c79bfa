"""Text data sets that TensorFlow Datasets has prepared in a folder. Never downloads."""

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.errors import InputError, raise_if
from data_pipelines.quiet_tensorflow import import_quietly
from data_pipelines.sources.source import SPLITS, BadExample, Example, SourceOptions
from data_pipelines.sources.splits import hash_split
from data_pipelines.sources.text import decode, text_fault

# Dai & Le 2015 hold 15 % of IMDB's labelled training set out for validation.
PERCENTS = {"train": 85, "validation": 15}
IMDB_SIZES = {"train": 25_000, "test": 25_000, "unsupervised": 50_000}
PART_BYTES = 8 << 20
READ_BATCH = 128


class TfdsText:
    """A text data set of TFDS; see `Source`.

    Reads the splits train, validation, test and unsupervised; a missing validation split is 15 %
    of train, by a hash of the text. Ids are `SPLIT-POSITION`. For `imdb_reviews` these are the
    official splits (Maas et al. 2011), and they must be complete.

    Args:
        name: NAME or NAME/CONFIG, as in `tfds:NAME/CONFIG`; the newest prepared version is read.
        options: `data_dir`, `text_key`, `label_key`, `with_labels`.

    Raises:
        InputError: no folder was given, it lacks the prepared data set, or the data set does not
            have exactly one feature for the text.
    """

    def __init__(self, name: str, options: SourceOptions) -> None:
        root = options.data_dir or os.environ.get("TFDS_DATA_DIR")
        if not root:
            raise InputError(
                f"needs --data_dir (or TFDS_DATA_DIR): the folder that holds {name or 'NAME'}"
            )
        if "://" in root:
            raise InputError(f"--data_dir={root} is an address: copy the data set to a folder")
        self.name = f"tfds:{name}"
        self._folder = _version_folder(Path(root), name)
        description = _read_json(self._folder / "dataset_info.json")
        self._file_format, self._shards, self._split_bytes = _described(self._folder, description)
        paths = [self._folder / name for shards in self._shards.values() for name, _ in shards]
        missing = [path for path in paths if not path.is_file()]
        raise_if([f"{path} is missing; prepare the data set again" for path in missing])
        features = _read_json(self._folder / "features.json")
        self._text_key, self._label_key, num_classes = _choose_features(features, options)
        self.class_names = _class_names(self._folder, self._label_key, num_classes)
        self._draws_validation = "validation" not in self._shards
        if not {"train", "unsupervised"} & set(self._shards):
            raise InputError(f"{self._folder} has no split train or unsupervised")
        if name.partition("/")[0] == "imdb_reviews":
            self._check_imdb()
        drawn = {"validation"} if self._draws_validation and "train" in self._shards else set()
        self.splits = tuple(s for s in SPLITS if s in self._shards or s in drawn)
        self.note = self._describe(drawn)

    def _describe(self, drawn: set[str]) -> str:
        parts = [f"version {self._folder.name}, official splits"]
        if drawn:
            parts.append("validation is 15 % of the official training texts by a hash of the text")
        if ignored := sorted(set(self._shards) - set(SPLITS)):
            parts.append(f"not read: {', '.join(ignored)}")
        return f"{self.name}: {'; '.join(parts)}"

    def _check_imdb(self) -> None:
        faults = [
            f"{self._folder}: split {split} has {self._num_examples(split)} reviews, not {size}"
            for split, size in IMDB_SIZES.items()
            if self._num_examples(split) != size
        ]
        raise_if(faults)

    def _num_examples(self, official: str) -> int:
        return sum(length for _, length in self._shards.get(official, []))

    def _official(self, split: str) -> str:
        return "train" if split == "validation" and self._draws_validation else split

    def parts(self, split: str) -> list[str]:
        """Returns slices of about 8 MiB, e.g. "train[0:5000]"."""
        official = self._official(split)
        total = self._num_examples(official)
        count = max(1, min(total, -(-self._split_bytes[official] // PART_BYTES)))
        bounds = [total * i // count for i in range(count + 1)]
        return [f"{official}[{a}:{b}]" for a, b in itertools.pairwise(bounds)]

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields a part's documents in the files' order."""
        official, _, bounds = part.removesuffix("]").partition("[")
        start, stop = map(int, bounds.split(":"))
        drawn = self._draws_validation and official == "train"
        for position, (data, label) in enumerate(self._records(official, start, stop), start):
            text = decode(data)
            if drawn and hash_split(text, PERCENTS) != split:
                continue
            if official == "unsupervised" or not self._label_key:
                label = None  # unlabelled examples carry -1
            if fault := text_fault(text) or self._label_fault(label):
                yield BadExample(f"{self._folder}, split {official}, record {position}", fault)
            else:
                yield Example(f"{official}-{position:05d}", text, label)

    def _label_fault(self, label: int | None) -> str:
        last = len(self.class_names) - 1
        return "" if label is None or 0 <= label <= last else f"label {label} is not in 0 .. {last}"

    def _records(self, official: str, start: int, stop: int) -> Iterator[tuple[bytes, int | None]]:
        """Yields texts and labels (None without a label key)."""
        import_quietly()
        if self._file_format == "array_record":
            import tensorflow_datasets as tfds  # takes seconds to import

            # Unlike tfds.builder(), this reads the folder without look-ups and downloads.
            builder = tfds.builder_from_directory(str(self._folder))
            records = builder.as_data_source(split=official)
            for index in range(start, stop):
                record = records[index]
                label = int(record[self._label_key]) if self._label_key else None
                yield record[self._text_key], label
            return
        import tensorflow as tf

        # TFDS's own reader decodes record by record: 25 times slower.
        features = {self._text_key: tf.io.FixedLenFeature([], tf.string)}
        if self._label_key:
            features[self._label_key] = tf.io.FixedLenFeature([], tf.int64)
        paths = [str(self._folder / name) for name, _ in self._shards[official]]
        dataset = tf.data.TFRecordDataset(paths).skip(start).take(stop - start).batch(READ_BATCH)
        dataset = dataset.map(lambda records: tf.io.parse_example(records, features)).prefetch(2)
        options = tf.data.Options()
        options.autotune.enabled = False  # as in data_pipelines.batches.dataset
        yield from self._rows(dataset.with_options(options), official, start)

    def _rows(
        self, dataset: Any, official: str, position: int
    ) -> Iterator[tuple[bytes, int | None]]:
        import tensorflow as tf

        try:
            for batch in dataset.as_numpy_iterator():
                texts = batch[self._text_key].tolist()
                labels = batch[self._label_key].tolist() if self._label_key else [None] * len(texts)
                position += len(texts)
                yield from zip(texts, labels, strict=True)
        except tf.errors.OpError as error:
            raise InputError(
                f"{self._folder}, split {official} cannot be read after record {position}: "
                f"{error.message.splitlines()[0]}"
            ) from error


def _version_folder(root: Path, name: str) -> Path:
    """Returns root/NAME[/CONFIG]/VERSION of the newest version."""
    base = root / name
    versions, configs = _versions(base), []
    if not versions and "/" not in name:
        configs = [config for config in _folders(base) if _versions(base / config)]
        if len(configs) > 1:
            raise InputError(
                f"{base} holds several configs: write tfds:{name}/CONFIG with one of "
                f"{', '.join(configs)}"
            )
        if configs:
            base /= configs[0]
            versions = _versions(base)
    if not name or not versions:
        raise InputError(
            f"--data_dir={root} holds no prepared {name}: "
            f"{base / 'VERSION' / 'dataset_info.json'} is missing; "
            f"it holds {', '.join(_folders(root)) or 'nothing'}"
        )
    return base / versions[-1]


def _versions(folder: Path) -> list[str]:
    """Returns the prepared versions in a folder, oldest first."""
    names = [n for n in _folders(folder) if re.fullmatch(r"\d+\.\d+\.\d+", n)]
    names = [n for n in names if (folder / n / "dataset_info.json").is_file()]
    return sorted(names, key=lambda name: tuple(map(int, name.split("."))))


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a data set's description: {error}") from error


def _described(
    folder: Path, info: dict[str, Any]
) -> tuple[str, dict[str, list[tuple[str, int]]], dict[str, int]]:
    """Returns the file format, and by split the files (name, examples) and the size in bytes."""
    path = folder / "dataset_info.json"
    shards, sizes = {}, {}
    try:
        file_format = info.get("fileFormat", "tfrecord")
        for split in info["splits"]:
            lengths = [int(n) for n in split["shardLengths"]]
            stem = f"{info['name']}-{split['name']}.{file_format}"
            shards[split["name"]] = [
                (f"{stem}-{i:05d}-of-{len(lengths):05d}", n) for i, n in enumerate(lengths)
            ]
            sizes[split["name"]] = int(split.get("numBytes", 0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a data set's description") from error
    if file_format not in ("tfrecord", "array_record"):
        raise InputError(
            f"{path}: files of format {file_format} are not read; prepare the data "
            "set again with file_format=tfrecord"
        )
    return file_format, shards, sizes


def _choose_features(description: dict[str, Any], options: SourceOptions) -> tuple[str, str, int]:
    """Returns the text feature, the label feature ("" for none) and the number of classes."""
    features = description.get("featuresDict", {}).get("features", {})
    texts = [name for name, feature in features.items() if _is_text(feature)]
    classes = {
        name: int(feature["classLabel"].get("numClasses", 0))
        for name, feature in features.items()
        if "classLabel" in feature and options.with_labels
    }
    faults, chosen = [], []
    for flag, key, found in (
        ("text_key", options.text_key, texts),
        ("label_key", options.label_key, list(classes)),
    ):
        if key and key not in found:
            faults.append(f"--{flag}={key} is not one of its features {', '.join(found) or '-'}")
        elif not key and (len(found) > 1 or (not found and flag == "text_key")):
            faults.append(
                f"it has {len(found)} features for --{flag}: {', '.join(found) or '-'}; "
                f"choose one of the features with --{flag}"
            )
        chosen.append(key or "".join(found[:1]))
    raise_if(faults)
    return chosen[0], chosen[1], classes.get(chosen[1], 0)


def _class_names(folder: Path, label_key: str, count: int) -> tuple[str, ...]:
    """Returns the names in LABEL.labels.txt, or numbers if that file is missing."""
    path = folder / f"{label_key}.labels.txt"
    names: list[str] = []
    if label_key and path.is_file():
        names = path.read_bytes().decode("utf-8", "replace").splitlines()
    return tuple(names) if len(names) == count else tuple(map(str, range(count)))


def _is_text(feature: dict[str, Any]) -> bool:
    tensor = feature.get("tensor", {})
    scalar = tensor.get("dtype") == "string" and not tensor.get("shape")
    return scalar or ("text" in feature and "sequence" not in feature)
