"""Which files make which split, for sources that are given by patterns of file names.

A bare pattern is divided by a hash of the text: a tenth validation and a tenth test where there
are labels; a tenth validation, the rest unsupervised, where there are none. With
`train=PATTERN,test=PATTERN` the splits are those that are named; where validation is not named, it
is a tenth of train (without train, of unsupervised).
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from data_pipelines import files
from data_pipelines.errors import InputError
from data_pipelines.sources import SPLITS

LABELLED_PERCENTS = {"train": 80, "validation": 10, "test": 10}
_NAMES = "|".join(SPLITS)


class SplitFiles(NamedTuple):
    """Where a split's documents are.

    Attributes:
        origin: the split that the files were given for; "" for a bare pattern.
        percents: where several splits share the files, the share of each by `hash_split`.
    """

    origin: str
    percents: Mapping[str, int] | None


def find_origins(text: str) -> dict[str, list[str]]:
    """Returns the files by the split that they were given for; "" stands for a bare pattern.

    Args:
        text: what follows the kind in a spec: PATTERN or SPLIT=PATTERN,SPLIT=PATTERN.

    Raises:
        InputError: a pattern matches nothing, or a split or a file is named twice.
    """
    if not text:
        raise InputError("names no files: write a pattern, or train=PATTERN,test=PATTERN")
    if not re.match(rf"({_NAMES})=", text):
        return {"": _find(text)}
    origins: dict[str, list[str]] = {}
    faults = []
    for item in re.split(rf",(?=(?:{_NAMES})=)", text):
        split, _, pattern = item.partition("=")
        if split in origins:
            faults.append(f"names {split} twice")
        try:
            origins[split] = _find(pattern)
        except InputError as error:
            faults.append(str(error))
            origins[split] = []
    faults += _shared_files(origins)
    if not {"train", "unsupervised"} & set(origins):
        faults.append("names neither train=PATTERN nor unsupervised=PATTERN")
    if faults:
        raise InputError("\n".join(faults))
    return origins


def _find(pattern: str) -> list[str]:
    paths = files.find_files(pattern)
    if paths:
        faults = [fault for path in paths if (fault := files.compression_fault(path))]
        if faults:
            raise InputError("\n".join(faults))
        return paths
    if files.is_dir(pattern):
        raise InputError(f"{pattern} is a folder: write {os.path.join(pattern, '*')}")
    hint = ""
    if re.match(r"\w+=", pattern):
        hint = f"; splits are named {', '.join(SPLITS)}"
    raise InputError(f"no file matches {pattern}{hint}")


def _shared_files(origins: dict[str, list[str]]) -> list[str]:
    first: dict[str, str] = {}
    return [
        f"{path} is in {first[path]} and in {split}"
        for split, paths in origins.items()
        for path in paths
        if first.setdefault(path, split) != split
    ]


def lay_out(
    origins: Mapping[str, list[str]], labelled: bool, draw: bool = True
) -> dict[str, SplitFiles]:
    """Returns the splits, in the order of `SPLITS`, by the rule at the head of this module.

    Args:
        origins: what `find_origins` returned.
        labelled: whether the documents have labels.
        draw: False draws no splits: a bare pattern is all unsupervised.
    """
    shares: dict[str, Mapping[str, int]] = {}
    if not draw:
        shares = {"": {"unsupervised": 100}}
    elif "" in origins:
        shares = {"": LABELLED_PERCENTS if labelled else {"unsupervised": 90, "validation": 10}}
    elif "validation" not in origins:
        shared = "train" if "train" in origins else "unsupervised"
        shares = {shared: {shared: 90, "validation": 10}}
    layout = {}
    for origin in origins:
        percents = shares.get(origin)
        for split in percents or [origin]:
            layout[split] = SplitFiles(origin, percents)
    return {split: layout[split] for split in SPLITS if split in layout}


def describe(layout: Mapping[str, SplitFiles]) -> str:
    """Returns a phrase about the splits that are drawn; "" where all are given."""
    drawn = {
        split: source.percents[split]
        for split, source in layout.items()
        if source.percents and len(source.percents) > 1
    }
    if not drawn:
        return "splits as given"
    shares = ", ".join(f"{split} {percent} %" for split, percent in drawn.items())
    return f"{shares} of the same files by a hash of the text"


def short_names(paths: list[str]) -> dict[str, str]:
    """Returns each path below the folder that all have in common, e.g. {"/d/a/x": "a/x", ...}."""
    folders = [path.split("/")[:-1] for path in paths]
    common = 0
    while all(len(folder) > common for folder in folders) and (
        len({folder[common] for folder in folders}) == 1
    ):
        common += 1
    return {path: "/".join(path.split("/")[common:]) for path in paths}
