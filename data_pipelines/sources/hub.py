"""Records of Hugging Face data sets, by ranges of rows; needs `datasets` (the extra hf).

A data set is a folder that `save_to_disk` wrote, or a name in the cache of `load_dataset`. Nothing
is downloaded or streamed: the library is offline, and a data set that is not there is an error.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.errors import InputError
from data_pipelines.sources.lines import Range
from data_pipelines.sources.records import Record
from data_pipelines.sources.source import SPLITS

READ_ROWS = 512
PART_ROWS = 20_000


def hub_origins(name: str) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the places of a data set's rows by split, "" for one without splits.

    Args:
        name: FOLDER or NAME[:CONFIG].

    Returns:
        `NAME#SPLIT` by split, each a list of one; and the splits that are not read.

    Raises:
        InputError: the data set is missing, or has no split for training.
    """
    splits = _loaded(name)
    origins = {split: [f"{name}#{split}"] for split in ("", *SPLITS) if split in splits}
    if not {"", "train", "unsupervised"} & origins.keys():
        raise InputError(f"has no split train or unsupervised; it has {', '.join(splits)}")
    return origins, sorted(splits.keys() - origins.keys())


def fingerprint(path: str) -> str:
    """Returns what changes with the rows of `NAME#SPLIT`."""
    found: str = _split(path)._fingerprint
    return found


def columns(path: str) -> list[str]:
    """Returns the names of the columns of `NAME#SPLIT`."""
    names: list[str] = _split(path).column_names
    return names


def ranges(path: str) -> list[Range]:
    """Returns ranges of rows, `start` to `stop`; `line` is the number of the first, from 1."""
    rows = len(_split(path))
    return [
        Range(path, start, min(start + PART_ROWS, rows), start + 1, "row")
        for start in range(0, rows, PART_ROWS)
    ]


def read_range(part: Range, names: list[str]) -> Iterator[Record]:
    """Yields the records of a range; `offset` is the row's number in the split, from 0.

    A class label is its name, "" for -1; a list of class labels is a list of names.

    Args:
        part: one of `ranges`.
        names: the columns to read.
    """
    stop = part.stop or 0
    split = _split(part.path).select_columns(names)
    decode = {name: _decoder(split.features[name]) for name in names}
    for start in range(part.start, stop, READ_ROWS):
        rows = split[start : min(start + READ_ROWS, stop)]
        for index, row in enumerate(zip(*(rows[name] for name in names), strict=True)):
            values = {n: decode[n](value) for n, value in zip(names, row, strict=True)}
            number = start + index
            yield Record(number, number - part.start, values, "")


def _decoder(feature: Any) -> Any:
    """Returns a function from a column's value to the value of a record."""
    names = getattr(feature, "names", None)
    if names is not None:
        return lambda value: names[value] if value is not None and value >= 0 else None
    inner = getattr(feature, "feature", None)
    if inner is not None and not isinstance(inner, dict):
        decode = _decoder(inner)
        return lambda values: None if values is None else [decode(value) for value in values]
    return lambda value: value


def _split(path: str) -> Any:
    name, _, split = path.rpartition("#")
    return _loaded(name)[split]


@functools.lru_cache(maxsize=4)
def _loaded(name: str) -> dict[str, Any]:
    """Returns the data set's splits; {"": ...} of one without splits."""
    if not name:
        raise InputError("names no data set: write hf:FOLDER or hf:NAME[:CONFIG]")
    try:
        import datasets
    except ImportError:
        raise InputError("needs the package datasets: pip install 'warmstate[hf]'") from None
    try:
        with _offline():
            found = _load(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot be loaded: {first}. Nothing is downloaded here: save it with "
            "load_dataset(...).save_to_disk(FOLDER) and name the folder"
        ) from None
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"": found}


def _load(name: str) -> Any:
    import datasets

    folder = Path(name)
    if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(name)
    at, _, config = (name, "", "") if folder.exists() else name.partition(":")
    return datasets.load_dataset(at, config or None)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keeps `datasets` from the network, also in a process that has imported it already."""
    import datasets
    import huggingface_hub.constants

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
