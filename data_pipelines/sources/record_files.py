"""`text:`, `csv:`, `tsv:`, `jsonl:` and `parquet:`: a document in each line or record."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain

from data_pipelines.errors import InputError
from data_pipelines.files import is_compressed, size_bytes
from data_pipelines.sources.lines import PART_BYTES, Range, line_ranges
from data_pipelines.sources.parquet import parquet_columns, read_row_group, row_groups
from data_pipelines.sources.records import (
    Record,
    kind_of,
    read_columns,
    read_records,
    record_fault,
)
from data_pipelines.sources.source import BadExample, Example, SourceOptions
from data_pipelines.sources.splits import describe, find_origins, hash_split, lay_out, short_names
from data_pipelines.sources.text import text_fault

MAX_CLASSES = 1_000


class RecordFiles:
    """Files of lines or records; see `Source`.

    Ids are the document's `--id_key`, or FILE@OFFSET with the byte (Parquet: the row) at which it
    starts. A label is a whole number or a word. The distinct labels of the training files, sorted
    (by value if all are whole numbers), are the classes 0, 1, ... Opening reads labelled files and
    CSV files once.

    Args:
        kind: "text", "csv", "tsv", "jsonl" or "parquet".
        pattern: see `splits.find_origins`.
        options: `text_key`, `label_key`, `id_key`, `context_key`, `with_labels`.
        part_bytes: approximate size of a part; of Parquet, each row group is a part.

    Raises:
        InputError: files, columns or keys are missing, or a file is damaged.
    """

    def __init__(
        self, kind: str, pattern: str, options: SourceOptions, part_bytes: int = PART_BYTES
    ) -> None:
        self.name = f"{kind}:{pattern}"
        self._kind = kind
        self._text_key = options.text_key or "text"
        self._id_key, self._context_key = options.id_key, options.context_key
        origins = find_origins(pattern)
        self._columns = {} if kind == "text" else self._read_columns(origins)
        self._label_key = self._find_label_key(origins, options)
        self._layout = lay_out(origins, bool(self._label_key), draw=options.with_labels)
        self.splits = tuple(self._layout)
        self._short = short_names([path for paths in origins.values() for path in paths])
        self._classes: dict[str, int] = {}
        self._ranges = self._scan(origins, part_bytes)
        self.class_names = tuple(self._classes)
        labels = _shortened([f"{label}={number}" for label, number in self._classes.items()])
        self.note = f"{self.name}: {describe(self._layout)}; " + (
            f"labels {labels}" if self._label_key else "no labels"
        )

    def parts(self, split: str) -> list[str]:
        """Returns ranges of files, e.g. "a.csv[0:8388651]"; small files share a part."""
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
                number = None if label is None else self._class_of(label)
                context = _word(record, self._context_key, "") if self._context_key else ""
            except _Unusable as error:
                # It may have no text to hash: the first of the splits that share a file reports it.
                if not percents or split == next(iter(percents)):
                    yield BadExample(place.where(record.line_index), str(error))
                continue
            if not percents or hash_split(text, percents) == split:
                yield Example(id_ or f"{short}@{record.offset}", text, number, context)

    def _document(self, record: Record, origin: str) -> tuple[str, str, str | None]:
        """Returns id ("" without an id key), text and label (None if it is not used)."""
        if fault := record_fault(record, self._text_key):
            raise _Unusable(fault)
        text = record.values[self._text_key]
        id_ = _word(record, self._id_key) if self._id_key else ""
        if not self._label_key or origin == "unsupervised":
            return id_, text, None
        return id_, text, _word(record, self._label_key)

    def _class_of(self, label: str) -> int:
        if label not in self._classes:
            raise _Unusable(f"label {label[:40]!r} is not one of {_shortened(self._classes)}")
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
        """Returns a file's ranges. Reads the file if necessary, and adds its labels to `labels`."""
        if self._kind == "parquet":
            groups = row_groups(path)
            if labels is not None:
                for record in chain.from_iterable(map(self._records, groups)):
                    self._add_label(labels, record, origin, path)
            return groups
        divisible = not is_compressed(path)
        if labels is None and not (self._kind == "csv" and divisible):
            return line_ranges(path, part_bytes)
        starts = [(0, 1)]
        for record in self._records(Range(path)):
            if divisible and record.offset >= starts[-1][0] + part_bytes:
                starts.append((record.offset, record.line_index + 1))
            if labels is not None:
                self._add_label(labels, record, origin, path)
        stops = [offset for offset, _ in starts[1:]] + [None]
        return [Range(path, a, b, line) for (a, line), b in zip(starts, stops, strict=True)]

    def _add_label(self, labels: dict[str, None], record: Record, origin: str, path: str) -> None:
        try:
            label = self._document(record, origin)[2]
        except _Unusable:
            return  # `examples` reports it
        if label is not None:
            labels.setdefault(label)
        if len(labels) > MAX_CLASSES:
            raise InputError(
                f"{path}: more than {MAX_CLASSES:,} distinct values of {self._label_key!r}, e.g. "
                f"{', '.join(list(labels)[:3])}: choose the label with --label_key"
            )

    def _records(self, part: Range) -> Iterator[Record]:
        if self._kind == "parquet":
            keys = {self._text_key, self._id_key, self._label_key, self._context_key}
            return read_row_group(part, [k for k in self._columns[part.path] if k in keys])
        return read_records(self._kind, part, self._columns.get(part.path, []))

    def _read_columns(self, origins: dict[str, list[str]]) -> dict[str, list[str]]:
        """Returns the columns, or the keys of the first record, of each file that has any."""
        columns, faults = {}, []
        for path in (path for paths in origins.values() for path in paths):
            try:
                parquet = self._kind == "parquet"
                columns[path] = parquet_columns(path) if parquet else read_columns(self._kind, path)
            except InputError as error:
                faults.append(str(error))
                continue
            keys = {"text": self._text_key, "id": self._id_key, "context": self._context_key}
            for name, key in keys.items():
                if columns[path] and key and key not in columns[path]:
                    faults.append(_lacks(path, key, f"{name}_key", columns[path]))
        if faults:
            raise InputError("\n".join(faults))
        return {path: keys for path, keys in columns.items() if keys}

    def _find_label_key(self, origins: dict[str, list[str]], options: SourceOptions) -> str:
        """Returns the label's column: --label_key or "label"; "" if the documents have none."""
        if self._kind == "text" or not options.with_labels:
            return ""
        key = options.label_key or "label"
        paths = [p for origin in origins if origin != "unsupervised" for p in origins[origin]]
        paths = [path for path in paths if path in self._columns]
        lacking = [path for path in paths if key not in self._columns[path]]
        if lacking and (options.label_key or len(lacking) < len(paths)):
            raise InputError(
                "\n".join(_lacks(p, key, "label_key", self._columns[p]) for p in lacking)
            )
        return "" if lacking or not paths else key


class _Unusable(Exception):
    """Why a record is not a document."""


def _word(record: Record, key: str, missing: str | None = None) -> str:
    """Returns a label, id or context: text, or a whole number or truth value of JSON as text.

    Args:
        record: the record.
        key: column or key.
        missing: returned for a value that is missing or empty; None makes it unusable.
    """
    value = record.values.get(key)
    if missing is not None and (value is None or value == ""):
        return missing
    if isinstance(value, bool | int):
        value = str(value).lower()
    if not isinstance(value, str):
        raise _Unusable(f"{key!r} is {kind_of(value)}, not a word or a whole number")
    if fault := text_fault(value):
        raise _Unusable(f"{key!r}: {fault}")
    return value


def _grouped(ranges: Iterable[Range], part_bytes: int) -> Iterator[list[Range]]:
    """Yields ranges in order, in groups of at most `part_bytes` stored bytes; row groups alone."""
    group: list[Range] = []
    room = part_bytes
    for part in ranges:
        size = (size_bytes(part.path) if part.stop is None else part.stop) - part.start
        size = size if part.unit == "line" else part_bytes
        if group and size > room:
            yield group
            group, room = [], part_bytes
        group.append(part)
        room -= size
    if group:
        yield group


def _in_order(labels: Iterable[str]) -> list[str]:
    """Returns labels sorted by value if all are whole numbers, otherwise as text."""
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _lacks(path: str, key: str, flag: str, columns: list[str]) -> str:
    return f"{path} has no {key!r} (--{flag}); it has {_shortened(columns)}"


def _shortened(words: Iterable[str]) -> str:
    """Returns at most ten words, and how many there are if there are more."""
    words = list(words)
    return ", ".join(words if len(words) <= 10 else [*words[:10], f"... ({len(words)})"])
