"""Streams rows of text to predict, from files or standard input.

Reads files by the rules of the sources `text:`, `csv:`, `tsv:` and `jsonl:`, in one pass, without
splits and labels.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data_pipelines import files
from data_pipelines.errors import InputError
from data_pipelines.sources.lines import Range
from data_pipelines.sources.records import read_records, record_fault

KINDS = ("text", "csv", "tsv", "jsonl")
STANDARD_INPUT = "/dev/stdin"


class Row(NamedTuple):
    """A line of text or a record of a table."""

    where: str  # the file and the line, e.g. "reviews.csv, line 17"
    text: str  # the document, "" if there is a fault
    values: Mapping[str, Any]  # the row by column or key; a line of text has "text"
    fault: str  # why the row has no document, or ""


def kind_and_path(spec: str) -> tuple[str, str]:
    """Splits `[KIND:]PATH`; a missing KIND follows from the ending, and is text for any other."""
    kind, colon, path = spec.partition(":")
    if colon and kind in KINDS:
        return kind, path
    name = spec.removesuffix(".gz").removesuffix(".zst")
    return next((kind for kind in KINDS[1:] if name.endswith(f".{kind}")), "text"), spec


def read_rows(spec: str, text_key: str = "text", context_key: str = "") -> Iterator[Row]:
    """Yields rows in order.

    Args:
        spec: `[KIND:]FILES`; FILES is a pattern, or "-" for standard input.
        text_key: column or key of the text; unused for lines of text.
        context_key: column that tables must have, too; "" for none.

    Raises:
        InputError: no file matches, one cannot be read to its end, or lacks the column.
    """
    kind, pattern = kind_and_path(spec)
    paths = [STANDARD_INPUT] if pattern == "-" else files.find_files(pattern)
    if not paths:
        raise InputError(f"--input={spec}: no file matches {pattern}")
    for path in paths:
        yield from _rows_of(kind, path, "text" if kind == "text" else text_key, context_key)


def _rows_of(kind: str, path: str, text_key: str, context_key: str) -> Iterator[Row]:
    name = "standard input" if path == STANDARD_INPUT else path
    columns_known = kind in ("text", "jsonl")
    for record in read_records(kind, Range(path), []):
        if not columns_known and not record.fault:
            columns_known = True
            for key, why in ((text_key, "--text_key"), (context_key, "the classifier's contexts")):
                if key and key not in record.values:
                    raise InputError(
                        f"{name} has no column {key!r} ({why}); it has {', '.join(record.values)}"
                    )
        fault = record_fault(record, text_key)
        text = "" if fault else record.values[text_key]
        yield Row(f"{name}, line {1 + record.line_index}", text, record.values, fault)
