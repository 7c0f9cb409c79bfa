"""IMDB reviews as TensorFlow Datasets prepares them: the official splits. Never downloads."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.errors import InputError
from data_pipelines.sources import Example
from data_pipelines.sources.hash_split import hash_split

# Dai & Le 2015 hold 15 % of the labelled training set out for validation.
PERCENTS = {"train": 85, "validation": 15}
FOLDER = Path("imdb_reviews", "plain_text", "1.0.0")
OFFICIAL_SIZES = {"train": 25_000, "test": 25_000, "unsupervised": 50_000}
READ_BATCH = 512


class TfdsImdbReviews:
    """IMDB (Maas et al. 2011): official test and unlabelled reviews; see `Source`.

    Args:
        data_dir: holds imdb_reviews/plain_text/1.0.0; None means TFDS_DATA_DIR.

    Raises:
        InputError: no folder was given, or it does not hold the prepared data set.
    """

    name = "tfds:imdb_reviews"
    note = (
        "tfds:imdb_reviews: official test split; validation is 15 % of the official training "
        "reviews by a hash of the text"
    )
    num_classes = 2
    num_examples = sum(OFFICIAL_SIZES.values())
    splits = ("train", "validation", "test", "unsupervised")

    def __init__(self, data_dir: str | None = None) -> None:
        root = data_dir or os.environ.get("TFDS_DATA_DIR")
        if not root:
            raise InputError(
                f"--source={self.name} needs --data_dir (or TFDS_DATA_DIR): "
                f"the folder that holds {FOLDER}"
            )
        self._folder = Path(root) / FOLDER
        info_path = self._folder / "dataset_info.json"
        if not info_path.is_file():
            raise InputError(
                f"--data_dir={root} holds no prepared imdb_reviews: {info_path} is missing"
            )
        _check_files(self._folder, info_path)

    def examples(self, split: str) -> Iterator[Example]:
        """Yields a split's reviews in the files' order; ids are `OFFICIAL_SPLIT-POSITION`.

        Bytes that are not UTF-8 become U+FFFD.
        """
        official = "train" if split == "validation" else split
        for position, (raw, label) in enumerate(self._read(official)):
            text = raw.decode("utf-8", "replace")
            if official == "train" and hash_split(text, PERCENTS) != split:
                continue
            # Unlabelled reviews carry -1 in this data set.
            yield Example(f"{official}-{position:05d}", text, label if label >= 0 else None)

    def _read(self, official: str) -> Iterator[tuple[bytes, int]]:
        import tensorflow_datasets as tfds  # seconds to import, so only when data is read

        # Unlike tfds.builder(), this reads the folder as it is: no look-ups, no downloads.
        builder = tfds.builder_from_directory(self._folder)
        dataset = builder.as_dataset(
            split=official,
            shuffle_files=False,
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        for batch in tfds.as_numpy(dataset.batch(READ_BATCH).prefetch(2)):
            yield from zip(batch["text"], batch["label"].tolist(), strict=True)


def _check_files(folder: Path, info_path: Path) -> None:
    """Raises InputError unless every record file that the data set's description names exists."""
    try:
        described = {
            split["name"]: [int(n) for n in split["shardLengths"]]
            for split in json.loads(info_path.read_text(encoding="utf-8"))["splits"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{info_path} cannot be read as a data set's description") from error
    for split, size in OFFICIAL_SIZES.items():
        lengths = described.get(split, [])
        if sum(lengths) != size:
            raise InputError(f"{info_path}: split {split} has {sum(lengths)} reviews, not {size}")
        for shard in range(len(lengths)):
            name = f"imdb_reviews-{split}.tfrecord-{shard:05d}-of-{len(lengths):05d}"
            if not (folder / name).is_file():
                raise InputError(f"{folder / name} is missing; prepare imdb_reviews again")
