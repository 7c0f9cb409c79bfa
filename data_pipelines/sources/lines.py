"""Lines and CSV records of files, in ranges that several processes can read independently."""

import csv
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from data_pipelines import files
from data_pipelines.errors import InputError
from data_pipelines.sources.text import BOM, MAX_DOCUMENT_BYTES, TOO_LONG, decode

PART_BYTES = 8 << 20


class Range(NamedTuple):
    """The lines (or records) of a file that start in a range of its uncompressed bytes."""

    path: str
    start: int = 0
    stop: int | None = None  # end of the range, exclusive; None means the end of the file
    line: int | None = 1  # number of the range's first line, from 1; None if unknown
    unit: str = "line"  # what `line` counts

    def where(self, line_index: int) -> str:
        """Returns "PATH, line N" of a line; may read what lies before the range to count lines."""
        return f"{self.path}, {self.unit} {self._first_line() + line_index}"

    def _first_line(self) -> int:
        if self.line is not None:
            return self.line
        count, left = 2, self.start - 1
        with files.open_binary(self.path) as file:
            while left and (data := file.read(min(left, 1 << 20))):
                count += data.count(b"\n")
                left -= len(data)
        return count


class Line(NamedTuple):
    """A line with its ending; `data` is None if it is longer than MAX_DOCUMENT_BYTES."""

    offset: int  # start of the line in the uncompressed file, in bytes
    end: int  # start of the next line
    line_index: int  # 0 for the first line of the range
    data: bytes | None


def line_ranges(path: str, part_bytes: int = PART_BYTES) -> list[Range]:
    """Returns ranges that together give each line once; a compressed file is one range."""
    size = files.size_bytes(path)
    if files.is_compressed(path) or size <= part_bytes:
        return [Range(path)]
    starts = range(0, size, part_bytes)
    return [Range(path, a, min(a + part_bytes, size), None if a else 1) for a in starts]


def read_lines(part: Range) -> Iterator[Line]:
    """Yields a range's lines without a byte-order mark.

    Raises:
        InputError: the file cannot be read to the end of the range.
    """
    end, index = part.start, 0
    try:
        with files.open_decompressed(part.path) as file:
            for line in lines_of(file, part.start, part.stop):
                end, index = line.end, line.line_index + 1
                yield line
    except OSError as error:
        _, _, line_number = part.where(index).rpartition(", ")
        progress = f"in {line_number} (after {end:,} bytes of text)"
        raise files.read_error(part.path, error, progress) from error


def lines_of(file: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[Line]:
    """Yields the lines that start in a range of a file; seeks only if `start` is above 0."""
    offset, index = start, 0
    if start:
        # The line that holds the byte before the range belongs to an earlier range.
        file.seek(start - 1)
        offset += _skip_line(file) - 1
    while stop is None or offset < stop:
        data: bytes | None = file.readline(MAX_DOCUMENT_BYTES + 1)
        if not data:
            return
        length = len(data)
        if length > MAX_DOCUMENT_BYTES:
            length += 0 if data.endswith(b"\n") else _skip_line(file)
            data = None
        elif offset == 0:
            data = data.removeprefix(BOM)
        yield Line(offset, offset + length, index, data)
        offset += length
        index += 1


def _skip_line(file: BinaryIO) -> int:
    """Reads to the end of the line and returns the number of bytes read."""
    skipped = 0
    while data := file.readline(1 << 20):
        skipped += len(data)
        if data.endswith(b"\n"):
            break
    return skipped


def strip_ending(data: bytes) -> bytes:
    r"""Returns a line without its \n or \r\n."""
    return data.removesuffix(b"\n").removesuffix(b"\r")


class CsvRecord(NamedTuple):
    """A record of a CSV file."""

    offset: int  # start of the record in the uncompressed file, in bytes
    line_index: int  # of its first line within the range
    row: list[str]  # its fields, as `text.decode` gives them
    fault: str  # why the record has no fields, or ""


def read_csv(part: Range) -> Iterator[CsvRecord]:
    """Yields the records (RFC 4180) of a range that starts with a record.

    After a record that is not CSV, reading continues with the next line.

    Raises:
        InputError: the file cannot be read to the end of the range, or a quote is not closed.
    """
    lines = _TextLines(part)
    reader = _csv_reader(lines)
    while True:
        offset, index = lines.next_offset, lines.next_index
        try:
            row = next(reader)
            fault = "" if row else "an empty line"
        except StopIteration:
            return
        except _TooLong:
            row, fault = [], TOO_LONG
        except csv.Error as error:
            if lines.ended or "field limit" in str(error):
                where = part.where(index)
                raise InputError(f"{where}: a quote in this record is never closed") from error
            row, fault = [], f"not CSV: {error}"
        yield CsvRecord(offset, index, row, fault)


def parse_csv_line(text: str) -> tuple[list[str], str]:
    """Returns the fields of a record that is one line, and why it has none (or "")."""
    try:
        return next(_csv_reader(iter([text])), []), ""
    except csv.Error as error:
        return [], f"not CSV: {error}"


def _csv_reader(lines: Iterator[str]) -> Iterator[list[str]]:
    # The limit is global; its default is less than a long document.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_DOCUMENT_BYTES))
    return csv.reader(lines, strict=True)


class _TooLong(Exception):
    """A line is longer than MAX_DOCUMENT_BYTES."""


class _TextLines:
    """A range's lines as text for `csv.reader`, which takes no more of them than it needs."""

    def __init__(self, part: Range) -> None:
        self._lines = read_lines(part)
        self.next_offset = part.start
        self.next_index = 0
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.next_offset, self.next_index = line.end, line.line_index + 1
        if line.data is None:
            raise _TooLong
        return decode(line.data)
