"""Divides documents into splits: by file names that the user gives, or by a hash of the text.

A bare pattern of file names is divided by hash: labelled documents into 80 % train, 10 % validation
and 10 % test; unlabelled ones into 90 % unsupervised and 10 % validation. With
`train=PATTERN,test=PATTERN` the splits are as named; a missing validation split is a tenth of
train (without train, of unsupervised).
"""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from data_pipelines import files
from data_pipelines.errors import InputError, raise_if
from data_pipelines.sources.source import SPLITS

LABELLED_PERCENTS = {"train": 80, "validation": 10, "test": 10}
_NAMES = "|".join(SPLITS)


def hash_split(text: str, percents: Mapping[str, int]) -> str:
    """Returns the split of a text. Equal texts get equal splits, on every machine.

    Args:
        percents: whole percents by split, adding up to 100. The order matters.

    Raises:
        ValueError: the percents do not add up to 100.
    """
    if sum(percents.values()) != 100:
        raise ValueError(f"percents add up to {sum(percents.values())}, not 100: {dict(percents)}")
    # "surrogatepass" because a str may hold lone surrogates, which plain UTF-8 refuses.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    bucket = int.from_bytes(digest[:8], "big") % 100
    for split, percent in percents.items():
        if bucket < percent:
            return split
        bucket -= percent
    raise AssertionError("unreachable: the buckets cover 0 .. 99")


class SplitFiles(NamedTuple):
    """The files of a split."""

    origin: str  # the split that the user gave the files for; "" for a bare pattern
    percents: Mapping[str, int] | None  # shares by `hash_split`, if several splits share the files


def find_origins(text: str) -> dict[str, list[str]]:
    """Returns the files by the split that they were given for; "" stands for a bare pattern.

    Args:
        text: the rest of a spec: PATTERN or SPLIT=PATTERN,SPLIT=PATTERN.

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
        origins[split] = []
        try:
            origins[split] = _find(pattern)
        except InputError as error:
            faults.append(str(error))
    first: dict[str, str] = {}
    faults += [
        f"{path} is in {first[path]} and in {split}"
        for split, paths in origins.items()
        for path in paths
        if first.setdefault(path, split) != split
    ]
    if not {"train", "unsupervised"} & set(origins):
        faults.append("names neither train=PATTERN nor unsupervised=PATTERN")
    raise_if(faults)
    return origins


def _find(pattern: str) -> list[str]:
    paths = files.find_files(pattern)
    if paths:
        return paths
    if files.is_dir(pattern):
        raise InputError(f"{pattern} is a folder: write {os.path.join(pattern, '*')}")
    hint = f"; splits are named {', '.join(SPLITS)}" if re.match(r"\w+=", pattern) else ""
    raise InputError(f"no file matches {pattern}{hint}")


def lay_out(
    origins: Mapping[str, list[str]], labelled: bool, draw: bool = True
) -> dict[str, SplitFiles]:
    """Returns the splits, in the order of `SPLITS`, by this module's rule.

    Args:
        origins: the result of `find_origins`.
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
    """Returns a phrase about how the splits were made."""
    shares = ", ".join(
        f"{split} {source.percents[split]} %"
        for split, source in layout.items()
        if source.percents and len(source.percents) > 1
    )
    return f"{shares} of the same files by a hash of the text" if shares else "splits as given"


def short_names(paths: list[str]) -> dict[str, str]:
    """Returns each path relative to the deepest common folder, e.g. {"/d/a/x": "a/x", ...}."""
    folders = [path.split("/")[:-1] for path in paths]
    common = 0
    while all(len(folder) > common for folder in folders) and (
        len({folder[common] for folder in folders}) == 1
    ):
        common += 1
    return {path: "/".join(path.split("/")[common:]) for path in paths}
