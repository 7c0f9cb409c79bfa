"""Documents in lines and records: `text:`, `csv:`, `tsv:` and `jsonl:` files."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.errors import InputError
from data_pipelines.files import is_compressed, size_bytes
from data_pipelines.sources import BadExample, Example, SourceOptions
from data_pipelines.sources.hash_split import hash_split
from data_pipelines.sources.lines import (
    PART_BYTES,
    Range,
    first_line,
    line_ranges,
    read_csv,
    read_lines,
    strip_ending,
)
from data_pipelines.sources.splits import describe, find_origins, lay_out, short_names
from data_pipelines.sources.text import TOO_LONG, decode, text_fault

MAX_CLASSES = 1_000


class Record(NamedTuple):
    """A line of text, or a record of a table.

    Attributes:
        offset: where it starts in the uncompressed file, in bytes.
        line_index: of its first line within the range that was read.
        values: what it holds by column or key.
        fault: why it holds nothing, or "".
    """

    offset: int
    line_index: int
    values: Mapping[str, Any]
    fault: str


class Table:
    """Files of lines or records; see `Source`.

    Ids are the document's `--id_key`, or FILE@OFFSET with the byte at which it starts. A label is
    any whole number or word; the distinct labels of the training files, sorted (by value where all
    are whole numbers), are the classes 0, 1, ... Opening reads labelled and CSV files once.

    Args:
        kind: "text", "csv", "tsv" or "jsonl".
        pattern: see `splits.find_origins`.
        options: `text_key`, `label_key`, `id_key`, `with_labels`.
        part_bytes: about how large a part is.

    Raises:
        InputError: files, columns or keys are missing, or a file is damaged.
    """

    def __init__(
        self, kind: str, pattern: str, options: SourceOptions, part_bytes: int = PART_BYTES
    ) -> None:
        self.name = f"{kind}:{pattern}"
        self._kind = kind
        self._text_key = options.text_key or "text"
        self._id_key = options.id_key
        origins = find_origins(pattern)
        columns = self._read_columns(origins)
        self._columns = {path: keys for path, keys in columns.items() if keys}
        self._label_key = self._find_label_key(origins, options)
        self._check_columns(options)
        layout = lay_out(origins, bool(self._label_key), draw=options.with_labels)
        self.splits = tuple(layout)
        self._layout = layout
        self._short = short_names([path for paths in origins.values() for path in paths])
        self._classes: dict[str, int] = {}
        self._ranges = self._scan(origins, part_bytes)
        self.num_classes = len(self._classes)
        self.class_names = tuple(self._classes)
        self.note = f"{self.name}: {describe(layout)}; {self._describe_labels()}"

    def _describe_labels(self) -> str:
        if not self._label_key:
            return "no labels"
        named = [f"{label}={number}" for label, number in self._classes.items()]
        return f"labels {', '.join(_shortened(named))}"

    def parts(self, split: str) -> list[str]:
        """Returns ranges of files, e.g. "a.csv[0:8388651]"; small files are put together."""
        return list(self._ranges[self._layout[split].origin])

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields a part's documents in the files' order."""
        for place in self._ranges[self._layout[split].origin][part]:
            yield from self._examples_in(place, split)

    def _examples_in(self, place: Range, split: str) -> Iterator[Example | BadExample]:
        origin, percents = self._layout[split]
        short = self._short[place.path]
        for record in self._records(place):
            try:
                id_, text, label = self._document(record, origin)
                number = self._class_of(label)
            except _Unusable as error:
                # It may have no text to hash: the first of the splits that share a file reports it.
                if not percents or split == next(iter(percents)):
                    line = first_line(place) + record.line_index
                    yield BadExample(f"{place.path}, line {line}", str(error))
                continue
            if not percents or hash_split(text, percents) == split:
                yield Example(id_ or f"{short}@{record.offset}", text, number)

    def _document(self, record: Record, origin: str) -> tuple[str, str, str | None]:
        """Returns id ("" without an id key), text and label (None where none is wanted)."""
        if fault := record_fault(record, self._text_key):
            raise _Unusable(fault)
        text = record.values[self._text_key]
        id_ = self._word(record, self._id_key) if self._id_key else ""
        if not self._label_key or origin == "unsupervised":
            return id_, text, None
        return id_, text, self._word(record, self._label_key)

    def _word(self, record: Record, key: str) -> str:
        """Returns a label or an id: text, or a whole number or truth value of JSON as text."""
        value = record.values.get(key)
        if isinstance(value, bool | int):
            value = str(value).lower()
        if not isinstance(value, str):
            raise _Unusable(f"{key!r} is {_kind_of(value)}, not a word or a whole number")
        if fault := text_fault(value):
            raise _Unusable(f"{key!r}: {fault}")
        return value

    def _class_of(self, label: str | None) -> int | None:
        if label is None:
            return None
        if label not in self._classes:
            known = ", ".join(_shortened(list(self._classes)))
            raise _Unusable(f"label {label[:40]!r} is not one of {known}")
        return self._classes[label]

    def _scan(
        self, origins: dict[str, list[str]], part_bytes: int
    ) -> dict[str, dict[str, list[Range]]]:
        """Returns the parts' ranges by origin and part, and finds the classes."""
        # Without labelled training files the classes are the labels of validation and test.
        labelled = {"", "train"} & set(origins) or set(origins) - {"unsupervised"}
        seen: dict[str, None] = {}
        by_origin: dict[str, dict[str, list[Range]]] = {}
        for origin, paths in origins.items():
            labels = seen if self._label_key and origin in labelled else None
            ranges = (r for p in paths for r in self._ranges_of(p, origin, labels, part_bytes))
            by_origin[origin] = {
                self._part_name(group): group for group in _grouped(ranges, part_bytes)
            }
        if self._label_key and not seen:
            raise InputError(f"no document has a usable {self._label_key!r} (--label_key)")
        self._classes = {label: i for i, label in enumerate(_in_order(seen))}
        return by_origin

    def _part_name(self, group: list[Range]) -> str:
        first = group[0]
        stop = "" if first.stop is None else first.stop
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        return f"{self._short[first.path]}[{first.start}:{stop}]{more}"

    def _ranges_of(
        self, path: str, origin: str, labels: dict[str, None] | None, part_bytes: int
    ) -> list[Range]:
        """Returns a file's ranges; reads it where that is needed, and adds what labels it has."""
        needs_records = self._kind == "csv" and not is_compressed(path)
        if labels is None and not needs_records:
            return line_ranges(path, part_bytes)
        starts = [(0, 1)]
        for record in self._records(Range(path, 0, None, 1)):
            if record.offset >= starts[-1][0] + part_bytes and not is_compressed(path):
                starts.append((record.offset, record.line_index + 1))
            if labels is not None:
                self._add_label(labels, record, origin, path)
        stops = [offset for offset, _ in starts[1:]] + [None]
        return [Range(path, a, b, line) for (a, line), b in zip(starts, stops, strict=True)]

    def _add_label(self, labels: dict[str, None], record: Record, origin: str, path: str) -> None:
        try:
            label = self._document(record, origin)[2]
        except _Unusable:
            return  # reported when the documents are read
        if label is not None:
            labels.setdefault(label)
        if len(labels) > MAX_CLASSES:
            raise InputError(
                f"{path}: more than {MAX_CLASSES:,} distinct values of {self._label_key!r}, e.g. "
                f"{', '.join(list(labels)[:3])}: choose the label with --label_key"
            )

    def _records(self, part: Range) -> Iterator[Record]:
        """Yields a range's records, without the line of column names."""
        return read_records(self._kind, part, self._columns.get(part.path, []))

    def _read_columns(self, origins: dict[str, list[str]]) -> dict[str, list[str]]:
        """Returns each file's columns, or the keys of its first record; [] where it has none."""
        if self._kind == "text":
            return {}
        paths = [path for paths in origins.values() for path in paths]
        columns = {path: self._read_columns_of(path) for path in paths}
        faults = [
            fault
            for path, keys in columns.items()
            if (keys or self._kind != "jsonl") and (fault := _columns_fault(path, keys))
        ]
        if faults:
            raise InputError("\n".join(faults))
        return columns

    def _read_columns_of(self, path: str) -> list[str]:
        whole = Range(path, 0, None, 1)
        if self._kind == "csv":
            first = next(read_csv(whole), None)
            return first.row if first else []
        if self._kind == "tsv":
            line = next(read_lines(whole), None)
            return decode(strip_ending(line.data or b"")).split("\t") if line else []
        return next((list(r.values) for r in read_records("jsonl", whole, []) if not r.fault), [])

    def _find_label_key(self, origins: dict[str, list[str]], options: SourceOptions) -> str:
        """Returns the label's column: the one that was asked for, "label", or "" for none."""
        if self._kind == "text" or not options.with_labels:
            return ""
        asked = options.label_key
        key = asked or "label"
        paths = [p for origin in origins if origin != "unsupervised" for p in origins[origin]]
        paths = [path for path in paths if path in self._columns]
        lacking = [path for path in paths if key not in self._columns[path]]
        if lacking and (asked or len(lacking) < len(paths)):
            raise InputError(
                "\n".join(
                    f"{path} has no {key!r} (--label_key); it has "
                    f"{', '.join(_shortened(self._columns[path]))}"
                    for path in lacking
                )
            )
        return "" if lacking or not paths else key

    def _check_columns(self, options: SourceOptions) -> None:
        """Raises InputError unless all files have the text and the id that is asked for."""
        wanted = {"text_key": self._text_key, "id_key": self._id_key}
        faults = [
            f"{path} has no {key!r} (--{flag}); it has {', '.join(_shortened(columns))}"
            for path, columns in self._columns.items()
            for flag, key in wanted.items()
            if key and key not in columns
        ]
        if faults:
            raise InputError("\n".join(faults))


class _Unusable(Exception):
    """Why a record is not a document."""


def record_fault(record: Record, text_key: str) -> str:
    """Returns why a record's text is not a document, or ""."""
    if record.fault:
        return record.fault
    text = record.values.get(text_key)
    if not isinstance(text, str):
        return f"{text_key!r} is {_kind_of(text)}, not text"
    return text_fault(text)


def read_records(kind: str, part: Range, columns: Sequence[str]) -> Iterator[Record]:
    """Yields a range's records, without a table's line of column names.

    Args:
        kind: "text", "csv", "tsv" or "jsonl".
        part: starts with a record.
        columns: of a table; [] for those that its first line names, where the range has it.

    Raises:
        InputError: the file cannot be read to the end of the range, or names no columns, or one
            twice.
    """
    if kind == "csv":
        for record in read_csv(part):
            if record.offset == 0:
                columns = columns or _checked_columns(part.path, record.row)
                continue
            fault = record.fault or _count_fault(record.row, columns)
            values = {} if fault else dict(zip(columns, record.row, strict=True))
            yield Record(record.offset, record.line_index, values, fault)
        return
    for line in read_lines(part):
        text = None if line.data is None else decode(strip_ending(line.data))
        if kind == "tsv" and line.offset == 0:
            columns = columns or _checked_columns(part.path, (text or "").split("\t"))
        elif text is None:
            yield Record(line.offset, line.line_index, {}, TOO_LONG)
        else:
            yield Record(line.offset, line.line_index, *_parse(kind, text, columns))


def _parse(kind: str, text: str, columns: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    """Returns what a line holds, and why it holds nothing."""
    if kind == "text":
        return {"text": text}, ""
    if not text or text.isspace():
        return {}, "an empty line"
    if kind == "jsonl":
        return _parse_json(text)
    row = text.split("\t")
    fault = _count_fault(row, columns)
    return {} if fault else dict(zip(columns, row, strict=True)), fault


def _checked_columns(path: str, columns: list[str]) -> list[str]:
    if fault := _columns_fault(path, columns):
        raise InputError(fault)
    return columns


def _columns_fault(path: str, columns: list[str]) -> str:
    if not columns or columns == [""]:
        return f"{path}: its first line does not name the columns"
    if len(set(columns)) != len(columns):
        return f"{path} names a column twice: {', '.join(columns)}"
    return ""


def _grouped(ranges: Iterable[Range], part_bytes: int) -> Iterator[list[Range]]:
    """Yields ranges in order, as many together as have part_bytes in all (as they are stored)."""
    group: list[Range] = []
    room = part_bytes
    for part in ranges:
        size = (size_bytes(part.path) if part.stop is None else part.stop) - part.start
        if group and size > room:
            yield group
            group, room = [], part_bytes
        group.append(part)
        room -= size
    yield group


def _count_fault(row: Sequence[str], columns: Sequence[str]) -> str:
    if len(row) == len(columns):
        return ""
    return f"{len(row)} columns instead of {len(columns)}"


def _parse_json(text: str) -> tuple[Mapping[str, Any], str]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if not isinstance(values, dict):
        return {}, f"{_kind_of(values)} instead of a JSON object"
    return values, ""


def _kind_of(value: Any) -> str:
    """Returns what a value is in words that need no Python."""
    kinds = {type(None): "missing", bool: "a truth value", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else "a number")


def _in_order(labels: Mapping[str, None]) -> list[str]:
    """Returns labels sorted by value where all are whole numbers, otherwise as text."""
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _shortened(words: list[str]) -> list[str]:
    """Returns at most ten words and a sign that there are more."""
    return words if len(words) <= 10 else [*words[:10], f"... ({len(words)})"]
