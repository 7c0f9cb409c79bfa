import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.errors import InputError
from data_pipelines.sources import lines as module
from data_pipelines.sources.lines import (
    Range,
    line_ranges,
    parse_csv_line,
    read_csv,
    read_lines,
    strip_ending,
)

# The folder is shared by the examples: each writes its file anew.
repeated = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@repeated
@given(
    data=st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\xef\xbb\xbf", b"\xff", b"bc"])).map(
        b"".join
    ),
    part_bytes=st.integers(1, 12),
)
def test_ranges_of_any_size_give_each_line_once(
    tmp_path: Path, data: bytes, part_bytes: int
) -> None:
    path = tmp_path / "lines"
    path.write_bytes(data)
    whole = [line.data for line in read_lines(Range(str(path)))]
    ranges = line_ranges(str(path), part_bytes)
    parts = [(part, list(read_lines(part))) for part in ranges]
    assert [line.data for _, found in parts for line in found] == whole
    assert b"".join(whole) == data.removeprefix(b"\xef\xbb\xbf")
    assert ranges == line_ranges(str(path), part_bytes)
    places = [part.where(line.line_index) for part, found in parts for line in found]
    assert places == [f"{path}, line {number}" for number in range(1, len(whole) + 1)]
    for part, found in parts:
        assert all(part.start <= line.offset < (part.stop or 1 << 60) for line in found)
        assert all(data[line.offset : line.end].endswith(line.data) for line in found)


@repeated
@given(rows=st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2)))
def test_any_csv_comes_back_as_it_was_written(tmp_path: Path, rows: list[list[str]]) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    found = list(read_csv(Range(str(path))))
    # A byte-order mark at the head of the file is not part of the text.
    if rows and rows[0][0].startswith("\ufeff") and not any(c in rows[0][0] for c in ',"\r\n'):
        rows[0][0] = rows[0][0][1:]
    assert [record.row for record in found] == rows
    data = path.read_bytes()
    for record in found:
        rest = Range(str(path), record.offset, None, None)
        assert next(read_csv(rest)).row == record.row
        assert data[: record.offset].count(b"\n") == record.line_index


def test_csv_goes_on_after_records_that_are_not_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n"x"y,1\n\nc,d\ne\rf,g\n"last",1')
    found = [(r.line_index, r.row, r.fault) for r in read_csv(Range(str(path)))]
    assert [row for _, row, _ in found] == [["a", "b"], [], [], ["c", "d"], [], ["last", "1"]]
    assert "not CSV" in found[1][2] and found[2][2] == "an empty line" and "not CSV" in found[4][2]
    assert [index for index, _, _ in found] == list(range(6))


def test_csv_whose_quote_is_not_closed_names_the_line_it_opens_in(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n"open,3\n4,5\n')
    with pytest.raises(InputError, match=r"a\.csv, line 3: a quote .* never closed"):
        list(read_csv(Range(str(path))))


def test_lines_too_long_to_be_documents_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 4)
    path = tmp_path / "a"
    path.write_bytes(b"abc\nabcd\nabcdefgh\nab\nabcde")
    found = [line.data for line in read_lines(Range(str(path)))]
    assert found == [b"abc\n", None, None, b"ab\n", None]
    assert [r.row for r in read_csv(Range(str(path)))] == [["abc"], [], [], ["ab"], []]


def test_gzip_that_is_cut_off_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    text = "".join(f"document {i * i}\n" for i in range(200_000)).encode()
    whole = gzip.compress(text)
    path.write_bytes(whole[: len(whole) // 2])
    count = 0
    with pytest.raises(InputError, match=r"a\.txt\.gz is cut off in line \d+ ") as caught:
        for line in read_lines(Range(str(path))):
            assert line.data == f"document {count * count}\n".encode()
            count += 1
    assert count > 10_000 and f"in line {count + 1} (after {line.end:,} bytes" in str(caught.value)


def test_gzip_with_a_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    data = bytearray(gzip.compress(b"good film\n" * 1000))
    data[-6] ^= 1  # in the checksum
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read .*incorrect data check"):
        list(read_lines(Range(str(path))))


def test_compressed_file_is_one_range(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"a\nb\n"))
    assert line_ranges(str(path), 1) == [Range(str(path))]


def test_only_the_last_line_end_is_stripped() -> None:
    assert [strip_ending(d) for d in (b"a\r\n", b"a\n", b"a", b"\r\r\n", b"\n")] == [
        b"a", b"a", b"a", b"\r", b"",
    ]  # fmt: skip


def test_parse_csv_line_has_no_limit_below_a_long_document() -> None:
    long = "word " * 200_000
    buffer = io.StringIO()
    csv.writer(buffer).writerow(["1", long])
    assert parse_csv_line(buffer.getvalue()) == (["1", long], "")
    assert parse_csv_line('"open')[1].startswith("not CSV")
