"""Lines and CSV records of files, in ranges that several processes can read independently."""

import csv
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from data_pipelines import files
from data_pipelines.errors import InputError
from data_pipelines.sources.text import BOM, MAX_DOCUMENT_BYTES, TOO_LONG, decode

PART_BYTES = 8 << 20


class Range(NamedTuple):
    """The lines (or records) of a file that start in a range of its uncompressed bytes.

    Attributes:
        stop: where the range ends, exclusive; None means the end of the file.
        line: the number of the range's first line, from 1; None where it is not yet known.
    """

    path: str
    start: int
    stop: int | None
    line: int | None


class Line(NamedTuple):
    """A line with its ending; `data` is None where it is longer than MAX_DOCUMENT_BYTES.

    Attributes:
        offset: where the line starts in the uncompressed file, in bytes.
        end: where the next line starts.
        line_index: 0 for the first line of the range.
    """

    offset: int
    end: int
    line_index: int
    data: bytes | None


def line_ranges(path: str, part_bytes: int = PART_BYTES) -> list[Range]:
    """Returns ranges that give each line of a file once; a compressed file is one range."""
    size = files.size_bytes(path)
    if files.is_compressed(path) or size <= part_bytes:
        return [Range(path, 0, None, 1)]
    starts = range(0, size, part_bytes)
    return [Range(path, a, min(a + part_bytes, size), None if a else 1) for a in starts]


def read_lines(part: Range) -> Iterator[Line]:
    """Yields a range's lines without a byte-order mark.

    Raises:
        InputError: the file cannot be read to the end of the range.
    """
    reached = (part.start, 0)
    try:
        with files.open_decompressed(part.path) as file:
            for line in lines_of(file, part.start, part.stop):
                reached = (line.end, line.line_index + 1)
                yield line
    except files.READ_ERRORS as error:
        number = first_line(part) + reached[1]
        progress = f"in line {number} (after {reached[0]:,} bytes of text)"
        raise files.read_error(part.path, error, progress) from error


def lines_of(file: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[Line]:
    """Yields the lines that start in a range of a file; only a start above 0 needs seeking."""
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
    """Reads to the end of the line and returns how many bytes that were."""
    skipped = 0
    while data := file.readline(1 << 20):
        skipped += len(data)
        if data.endswith(b"\n"):
            break
    return skipped


def first_line(part: Range) -> int:
    """Returns the number of a range's first line, from 1; reads what lies before if it must."""
    if part.line is not None or part.start == 0:
        return part.line or 1
    count, left = 2, part.start - 1
    with files.open_binary(part.path) as file:
        while left and (data := file.read(min(left, 1 << 20))):
            count += data.count(b"\n")
            left -= len(data)
    return count


def strip_ending(data: bytes) -> bytes:
    r"""Returns a line without its \n or \r\n."""
    return data.removesuffix(b"\n").removesuffix(b"\r")


class CsvRecord(NamedTuple):
    """A record of a CSV file.

    Attributes:
        offset: where it starts in the uncompressed file, in bytes.
        line_index: of its first line within the range.
        row: its fields; bytes that are not UTF-8 are as `text.decode` leaves them.
        fault: why there are no fields, or "".
    """

    offset: int
    line_index: int
    row: list[str]
    fault: str


def read_csv(part: Range) -> Iterator[CsvRecord]:
    """Yields the records (RFC 4180) of a range that starts with a record.

    After a record that is not CSV, reading goes on with the next line.

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
                where = f"{part.path}, line {first_line(part) + index}"
                raise InputError(f"{where}: a quote in this record is never closed") from error
            row, fault = [], f"not CSV: {error}"
        yield CsvRecord(offset, index, row, fault)


def parse_csv_line(text: str) -> tuple[list[str], str]:
    """Returns the fields of a record that is one line, and why it has none."""
    try:
        return next(_csv_reader(iter([text])), []), ""
    except csv.Error as error:
        return [], f"not CSV: {error}"


def _csv_reader(lines: Iterator[str]) -> Iterator[list[str]]:
    # The module's limit is global and only ever raised; its default is less than a long document.
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
