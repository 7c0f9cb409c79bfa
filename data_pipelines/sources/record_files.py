"""`text:`, `csv:`, `tsv:`, `jsonl:`, `parquet:` and `hf:`: a document in each line or record."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from data_pipelines.errors import InputError, raise_if
from data_pipelines.files import is_compressed, size_bytes
from data_pipelines.sources import hub, parquet
from data_pipelines.sources.lines import PART_BYTES, Range, line_ranges
from data_pipelines.sources.records import Record, kind_of, read_columns, read_records, record_fault
from data_pipelines.sources.source import BadExample, Example, SourceOptions
from data_pipelines.sources.splits import describe, find_origins, hash_split, lay_out, short_names
from data_pipelines.sources.text import text_fault

MAX_CLASSES = 1_000
# What reads tables whose columns are known without reading rows.
_TABLES: dict[str, Any] = {"parquet": parquet, "hf": hub}
# A label, or with --labels=multi the sorted labels of a document.
Label = str | tuple[str, ...]
# The distinct labels (None if another split has them) and sets of labels of files, in an order.
Found = tuple[dict[str, None] | None, dict[Label, None]]


class RecordFiles:
    """Files of lines or records; see `Source`.

    Ids are the document's `--id_key`, or FILE@OFFSET with the byte (Parquet: the row) at which it
    starts. A label is a whole number or a word. The distinct labels of the training files, sorted
    (by value if all are whole numbers), are the classes 0, 1, ... Opening reads labelled files and
    CSV files once. With --labels=multi a document has a set of such labels: a list, or text in
    which they are separated by "|".

    Args:
        kind: "text", "csv", "tsv", "jsonl", "parquet" or "hf".
        pattern: see `splits.find_origins`; of "hf", see `hub.hub_origins`.
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
        self._has_sets = options.labels == "multi"
        origins, ignored = hub.hub_origins(pattern) if kind == "hf" else (find_origins(pattern), [])
        self._columns = {} if kind == "text" else self._read_columns(origins)
        self._label_key = self._find_label_key(origins, options)
        self._layout = lay_out(origins, bool(self._label_key), draw=options.with_labels)
        self.splits = tuple(self._layout)
        paths = [path for paths in origins.values() for path in paths]
        self._short = short_names(paths)
        # Part of what a prepare that was stopped compares before it resumes.
        self._fingerprints = [hub.fingerprint(path) for path in paths] if kind == "hf" else []
        self._classes: dict[str, int] = {}
        self._sets: dict[Label, int] = {}
        self._ranges = self._scan(origins, part_bytes)
        self.class_names = tuple(self._classes)
        self.label_sets = tuple(
            tuple(self._classes[word] for word in words) for words in self._sets
        )
        labels = _shortened([f"{label}={number}" for label, number in self._classes.items()])
        self.note = f"{self.name}: {describe(self._layout)}; " + (
            f"labels {labels}{', several a document' if self._has_sets else ''}"
            if self._label_key
            else "no labels"
        )
        self.note += f"; not read: {', '.join(ignored)}" if ignored else ""

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

    def _document(self, record: Record, origin: str) -> tuple[str, str, Label | None]:
        """Returns id ("" without an id key), text and label (None if it is not used)."""
        if fault := record_fault(record, self._text_key):
            raise _Unusable(fault)
        text = record.values[self._text_key]
        id_ = _word(record, self._id_key) if self._id_key else ""
        if not self._label_key or origin == "unsupervised":
            return id_, text, None
        read = _words if self._has_sets else _word
        return id_, text, read(record, self._label_key)

    def _class_of(self, label: Label) -> int:
        for word in (label,) if isinstance(label, str) else label:
            if word not in self._classes:
                raise _Unusable(f"label {word[:40]!r} is not one of {_shortened(self._classes)}")
        return self._classes[label] if isinstance(label, str) else self._sets[label]

    def _scan(
        self, origins: dict[str, list[str]], part_bytes: int
    ) -> dict[str, dict[str, list[Range]]]:
        """Returns the parts' ranges by origin and part, and finds the classes."""
        # Without labelled training files the classes are the labels of validation and test.
        labelled = {"", "train"} & set(origins) or set(origins) - {"unsupervised"}
        seen: dict[str, None] = {}
        sets: dict[Label, None] = {}
        by_origin: dict[str, dict[str, list[Range]]] = {}
        for origin, paths in origins.items():
            found: Found | None = None
            if self._label_key and origin in labelled:
                found = (seen, sets)
            elif self._label_key and self._has_sets and origin != "unsupervised":
                found = (None, sets)
            ranges = (r for p in paths for r in self._ranges_of(p, origin, found, part_bytes))
            by_origin[origin] = {
                self._part_name(group): group for group in _grouped(ranges, part_bytes)
            }
        if self._label_key and not seen:
            raise InputError(f"no document has a usable {self._label_key!r} (--label_key)")
        self._classes = {label: i for i, label in enumerate(_in_order(seen))}
        known = [words for words in sets if self._classes.keys() >= set(words)]
        self._sets = {words: i for i, words in enumerate(sorted(known))}
        return by_origin

    def _part_name(self, group: list[Range]) -> str:
        first = group[0]
        stop = "" if first.stop is None else first.stop
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        return f"{self._short[first.path]}[{first.start}:{stop}]{more}"

    def _ranges_of(
        self, path: str, origin: str, labels: Found | None, part_bytes: int
    ) -> list[Range]:
        """Returns a file's ranges. Reads the file if necessary, and adds its labels to `labels`."""
        if self._kind in _TABLES:
            groups = _TABLES[self._kind].ranges(path)
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

    def _add_label(self, found: Found, record: Record, origin: str, path: str) -> None:
        try:
            label = self._document(record, origin)[2]
        except _Unusable:
            return  # `examples` reports it
        labels, sets = found
        if isinstance(label, tuple):
            sets.setdefault(label)
        if label is None or labels is None:
            return
        labels.update(dict.fromkeys([label] if isinstance(label, str) else label))
        if len(labels) > MAX_CLASSES:
            raise InputError(
                f"{path}: more than {MAX_CLASSES:,} distinct values of {self._label_key!r}, e.g. "
                f"{', '.join(list(labels)[:3])}: choose the label with --label_key"
            )

    def _records(self, part: Range) -> Iterator[Record]:
        if self._kind in _TABLES:
            keys = {self._text_key, self._id_key, self._label_key, self._context_key}
            names = [k for k in self._columns[part.path] if k in keys]
            return _TABLES[self._kind].read_range(part, names)
        return read_records(self._kind, part, self._columns.get(part.path, []))

    def _read_columns(self, origins: dict[str, list[str]]) -> dict[str, list[str]]:
        """Returns the columns, or the keys of the first record, of each file that has any."""
        columns, faults = {}, []
        for path in (path for paths in origins.values() for path in paths):
            try:
                table = _TABLES.get(self._kind)
                columns[path] = table.columns(path) if table else read_columns(self._kind, path)
            except InputError as error:
                faults.append(str(error))
                continue
            keys = {"text": self._text_key, "id": self._id_key, "context": self._context_key}
            for name, key in keys.items():
                if columns[path] and key and key not in columns[path]:
                    faults.append(_lacks(path, key, f"{name}_key", columns[path]))
        raise_if(faults)
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


def _words(record: Record, key: str) -> tuple[str, ...]:
    """Returns a document's set of labels, sorted: a list, or text with "|" between them."""
    values = record.values.get(key)
    if isinstance(values, str):
        if re.fullmatch(r"\s*\[.*\]\s*", values):
            raise _Unusable(f"{key!r} is {values[:40]!r}, a list written as text: write a|b")
        values = [word.strip() for word in values.split("|") if word.strip()]
    elif not isinstance(values, list):
        return (_word(record, key),)
    items = (record._replace(values={key: value}) for value in values)
    return tuple(sorted({_word(item, key) for item in items}))


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
