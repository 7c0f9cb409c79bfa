"""Records of Parquet files, by row group."""

import contextlib
from collections.abc import Iterator
from typing import Any

from data_pipelines import files
from data_pipelines.errors import InputError
from data_pipelines.sources.lines import Range
from data_pipelines.sources.records import Record

READ_ROWS = 512


def columns(path: str) -> list[str]:
    """Returns the names of a file's columns.

    Raises:
        InputError: the file cannot be read, or names a column twice.
    """
    with _opened(path) as file:
        names: list[str] = file.schema_arrow.names
    if len(set(names)) != len(names):
        raise InputError(f"{path} names a column twice: {', '.join(names)}")
    return names


def ranges(path: str) -> list[Range]:
    """Returns a range for each row group: `start` is its number, `line` its first row's."""
    with _opened(path) as file:
        groups, row = [], 1
        for group in range(file.num_row_groups):
            groups.append(Range(path, group, group + 1, row, "row"))
            row += file.metadata.row_group(group).num_rows
    return groups


def read_range(part: Range, names: list[str]) -> Iterator[Record]:
    """Yields the records of a row group; `offset` is the row's number in the file, from 0.

    Args:
        part: one of `ranges`.


    Raises:
        InputError: the file cannot be read.
    """
    with _opened(part.path) as file:
        batches = file.iter_batches(READ_ROWS, row_groups=[part.start], columns=names)
        rows = (values for batch in batches for values in batch.to_pylist())
        for index, values in enumerate(rows):
            yield Record((part.line or 1) - 1 + index, index, values, "")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with files.open_binary(path) as file, pyarrow.parquet.ParquetFile(file) as parquet:
            yield parquet
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error
