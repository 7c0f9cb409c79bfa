"""The interface of a source of text."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, Protocol

SPLITS = ("train", "validation", "test", "unsupervised")


class Example(NamedTuple):
    """A document.

    Attributes:
        id: the same in every run.
        label: None for an unlabelled document. With --labels=multi: number of its set of labels.
        context: what it belongs to, such as its author; "" if that is unknown.
    """

    id: str
    text: str
    label: int | None
    context: str = ""


class BadExample(NamedTuple):
    """A document that cannot be used.

    Attributes:
        where: the file and its line, member or record, e.g. "reviews.csv, line 17".
        why: the reason, e.g. "label 'x' is not one of neg, pos".
    """

    where: str
    why: str


class Source(Protocol):
    """Documents in named splits. A pickled source can be read elsewhere without opening it again.

    Attributes:
        name: the spec that opens it, e.g. "movie_reviews".
        note: one line about the origin of the splits; may be empty.
        class_names: labels are indices into these; () for an unlabelled source.
        label_sets: with --labels=multi, the classes of each set of labels that a document has;
            other sources lack it.
        splits: those of `SPLITS` that it has.
    """

    name: str
    note: str
    class_names: tuple[str, ...]
    splits: tuple[str, ...]

    def parts(self, split: str) -> list[str]:
        """Returns the unique names of the split's parts, in order.

        One process reads a part. Parts depend on the data only, not on the number of processes.
        """
        ...

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields the part's documents, always in the same order.

        Raises:
            InputError: a file is damaged, so that the number of lost documents is unknown.
        """
        ...


def label_sets_of(source: Source) -> tuple[tuple[int, ...], ...]:
    """Returns the source's `label_sets`; () if its documents have one label each."""
    return getattr(source, "label_sets", ())


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What a spec alone does not say.

    Attributes:
        data_dir: folder of prepared data sets, for `tfds:`; None means TFDS_DATA_DIR.
        text_key: column, key or feature of the text; "" means "text", or the only text feature
            of a `tfds:` data set.
        label_key: the same for the label; "" means "label", or the only class label of a `tfds:`
            data set, if it exists. A key that is given must exist.
        id_key: column or key of the document's id; "" means ids made of file name and position.
        context_key: the same for the context; "" means none.
        labels: "single", or "multi" for sources whose documents have a set of labels.
        with_labels: False ignores labels, and reads a pattern of file names as one split
            (for --unlabelled).
    """

    data_dir: str | None = None
    text_key: str = ""
    label_key: str = ""
    id_key: str = ""
    context_key: str = ""
    labels: str = "single"
    with_labels: bool = True
