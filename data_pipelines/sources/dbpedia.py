"""`dbpedia:`: titles and abstracts of 14 classes (Zhang, Zhao & LeCun 2015)."""

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from data_pipelines.sources.archive import Archive
from data_pipelines.sources.lines import (
    PART_BYTES,
    Line,
    Range,
    line_ranges,
    lines_of,
    parse_csv_line,
    read_lines,
    strip_ending,
)
from data_pipelines.sources.source import BadExample, Example
from data_pipelines.sources.splits import hash_split
from data_pipelines.sources.text import TOO_LONG, decode, text_fault

TAR_PART = "archive"
PERCENTS = {"train": 90, "validation": 10}
CLASSES = (
    *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder"),
    *("MeanOfTransportation", "Building", "NaturalPlace", "Village", "Animal", "Plant"),
    *("Album", "Film", "WrittenWork"),
)
PATTERNS = {"train": r"(?:^|/)train\.csv$", "test": r"(?:^|/)test\.csv$"}


class Dbpedia:
    """train.csv and test.csv with the columns class (1 .. 14), title, content; see `Source`.

    A document is its title, a space and its content. The files have no header, and no record has a
    line break. Labels are class - 1; ids are SPLIT@OFFSET, the byte at which the line starts.

    Args:
        path: the folder or the tar archive (dbpedia_csv.tar.gz).

    Raises:
        InputError: the path or one of the files is missing.
    """

    class_names: tuple[str, ...] = CLASSES
    splits: tuple[str, ...] = ("train", "validation", "test")

    def __init__(self, path: str) -> None:
        self.name = f"dbpedia:{path}"
        self.note = (
            f"{self.name}: official test split; validation is 10 % of the official training "
            "texts by a hash of the text"
        )
        self._archive = Archive(path)
        self._archive.require({f"{split}.csv": pattern for split, pattern in PATTERNS.items()})
        self._ranges: dict[str, dict[str, Range]] = {split: {} for split in PATTERNS}
        if not self._archive.is_tar:
            for split, pattern in PATTERNS.items():
                name = next(n for n in self._archive.names if re.search(pattern, n))
                for part in line_ranges(f"{self._archive.path}/{name}", PART_BYTES):
                    self._ranges[split][f"{split}.csv[{part.start}]"] = part

    def parts(self, split: str) -> list[str]:
        """Returns ranges of a file's lines; a tar archive is one part."""
        return list(self._ranges["test" if split == "test" else "train"]) or [TAR_PART]

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields a part's documents in the file's order."""
        origin = "test" if split == "test" else "train"
        if part != TAR_PART:
            lines = self._ranges[origin][part]
            yield from _documents(read_lines(lines), split, lines.where)
            return

        def parse(name: str, where: str, file: BinaryIO) -> Iterator[Example | BadExample]:
            return _documents(lines_of(file), split, lambda i: f"{where}, line {i + 1}")

        wanted = re.compile(PATTERNS[origin]).search
        yield from self._archive.parse(wanted, parse, report_links=split != "validation")


def _documents(
    lines: Iterator[Line], split: str, where: Callable[[int], str]
) -> Iterator[Example | BadExample]:
    origin = "test" if split == "test" else "train"
    for line in lines:
        text, label, fault = _document(line)
        if origin == "train" and hash_split(text, PERCENTS) != split:
            continue
        if fault:
            yield BadExample(where(line.line_index), fault)
        else:
            yield Example(f"{origin}@{line.offset}", text, label)


def _document(line: Line) -> tuple[str, int, str]:
    """Returns text, label and why the line is unusable (or "")."""
    if line.data is None:
        return "", 0, TOO_LONG
    row, fault = parse_csv_line(decode(strip_ending(line.data)))
    if not fault and len(row) != 3:
        fault = f"{len(row)} columns instead of 3 (class, title, content)"
    if fault:
        return "", 0, fault
    text = f"{row[1].strip()} {row[2].strip()}".strip()
    if not re.fullmatch(r"[1-9]|1[0-4]", row[0]):
        return text, 0, f"class {row[0][:40]!r} is not in 1 .. {len(CLASSES)}"
    return text, int(row[0]) - 1, text_fault(text)
