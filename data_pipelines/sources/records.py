"""Records of `text:`, `csv:`, `tsv:` and `jsonl:` files: values by column or key."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.errors import InputError
from data_pipelines.sources.lines import Range, read_csv, read_lines, strip_ending
from data_pipelines.sources.text import MAX_DOCUMENT_BYTES, TOO_LONG, decode, text_fault


class Record(NamedTuple):
    """A line of text, or a record of a table."""

    offset: int  # start of the record in the uncompressed file, in bytes
    line_index: int  # of its first line within the range
    values: Mapping[str, Any]  # by column or key; a line of text has "text"
    fault: str  # why there are no values, or ""


def record_fault(record: Record, text_key: str) -> str:
    """Returns why a record's text is not a document, or ""."""
    if record.fault:
        return record.fault
    text = record.values.get(text_key)
    if not isinstance(text, str):
        return f"{text_key!r} is {kind_of(text)}, not text"
    return TOO_LONG if len(text) > MAX_DOCUMENT_BYTES else text_fault(text)


def read_columns(kind: str, path: str) -> list[str]:
    """Returns a file's columns, or the keys of its first JSON object; [] if there is none.

    Raises:
        InputError: the file cannot be read, or names no columns, or one twice.
    """
    if kind == "csv":
        first = next(read_csv(Range(path)), None)
        return _checked_columns(path, first.row if first else [])
    if kind == "tsv":
        line = next(read_lines(Range(path)), None)
        return _tsv_columns(path, line.data if line else None)
    records = read_records("jsonl", Range(path), [])
    keys = next((list(record.values) for record in records if not record.fault), [])
    return _checked_columns(path, keys) if keys else []


def read_records(kind: str, part: Range, columns: Sequence[str]) -> Iterator[Record]:
    """Yields a range's records, without a table's line of column names.

    Args:
        kind: "text", "csv", "tsv" or "jsonl".
        part: starts with a record.
        columns: a table's; [] takes those that the file's first line names, if the range has it.

    Raises:
        InputError: the file cannot be read to the end of the range, or names no columns, or one
            twice.
    """
    if kind == "csv":
        for record in read_csv(part):
            if record.offset == 0:
                columns = columns or _checked_columns(part.path, record.row)
                continue
            values, fault = _by_column(record.row, columns)
            yield Record(record.offset, record.line_index, values, record.fault or fault)
        return
    for line in read_lines(part):
        if kind == "tsv" and line.offset == 0:
            columns = columns or _tsv_columns(part.path, line.data)
        elif line.data is None:
            yield Record(line.offset, line.line_index, {}, TOO_LONG)
        else:
            text = decode(strip_ending(line.data))
            yield Record(line.offset, line.line_index, *_parse(kind, text, columns))


def _parse(kind: str, text: str, columns: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    """Returns a line's values, and why it has none (or "")."""
    if kind == "text":
        return {"text": text}, ""
    if not text or text.isspace():
        return {}, "an empty line"
    if kind == "tsv":
        return _by_column(text.split("\t"), columns)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if not isinstance(values, dict):
        return {}, f"{kind_of(values)} instead of a JSON object"
    return values, ""


def _by_column(row: Sequence[str], columns: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    if len(row) != len(columns):
        return {}, f"{len(row)} columns instead of {len(columns)}"
    return dict(zip(columns, row, strict=True)), ""


def _tsv_columns(path: str, line: bytes | None) -> list[str]:
    return _checked_columns(path, decode(strip_ending(line or b"")).split("\t"))


def _checked_columns(path: str, columns: list[str]) -> list[str]:
    if not columns or columns == [""]:
        raise InputError(f"{path}: its first line does not name the columns")
    if len(set(columns)) != len(columns):
        raise InputError(f"{path} names a column twice: {', '.join(columns)}")
    return columns


def kind_of(value: Any) -> str:
    """Returns a value's type in words for people who do not know Python."""
    kinds = {type(None): "missing", bool: "a truth value", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else "a number")
