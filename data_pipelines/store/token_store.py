"""Tokenized documents on disk: a manifest, a vocabulary and memory-mapped shards.

A store is a folder of
  manifest.json                   its contents, with sizes, checksums, and a checksum of itself
  vocab.txt                       one token a line; line number - 1 is the id
  SPLIT-00000-of-00002.tokens     ids of all documents, little-endian uint16 or uint32; each
                                  document ends with the end token
  SPLIT-00000-of-00002.offsets    int64 [examples + 1]: the start of each document, in tokens
  SPLIT-00000-of-00002.labels     int32 [examples], -1 for none; with --labels=multi the number
                                  of the document's set in the manifest's label_sets
  SPLIT-00000-of-00002.contexts   int32 [examples], -1 for unknown; only with --context_key
"""

import functools
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError, raise_if
from data_pipelines.store.manifest import (
    OFFSET_DTYPE,
    kinds_of,
    read_manifest,
    shards_of,
    token_dtype,
)
from data_pipelines.store.remote_tokens import RemoteTokens
from data_pipelines.store.seal import SEAL, with_seal
from data_pipelines.store.shards import Shards
from data_pipelines.store.split_view import SplitView, WholeSplit
from data_pipelines.store.verification import store_faults


class TokenStore:
    """A store opened for reading; costs O(shards), whatever its size.

    With `url`, tokens that the folder lacks are read from there, document by document.

    The manifest is not trusted: files must lie in its folder, be no links, and have the sizes that
    its counts ask for; offsets must begin with 0 and end with the number of tokens. `verify` checks
    the rest.

    Args:
        folder: what `prepare` wrote, or `fetch.fetched` fetched.
        url: address of the whole store.
        log: takes a line if the store at `url` fails.

    Attributes:
        remote: reads the tokens at `url`.
        shards_elsewhere: how many shards have their tokens there only.

    Raises:
        InputError: the store is missing, its manifest is damaged, or files have wrong sizes; one
            line for each file.
    """

    def __init__(
        self, folder: str | Path, url: str = "", log: Callable[[str], None] = print
    ) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        self._token_dtype = token_dtype(self.vocab_size)
        self.remote = RemoteTokens(url, self._token_dtype, self.vocab_size, log) if url else None
        self.shards_elsewhere = 0
        faults = [_size_fault(self.vocab_path, self.manifest["vocab_file"]["bytes"])]
        for shard in shards_of(self.manifest):
            paths = {k: self.folder / f"{shard['name']}.{k}" for k in kinds_of(self.manifest)}
            if url and not paths["tokens"].exists():
                self.shards_elsewhere += 1
                del paths["tokens"]
            found = [_size_fault(paths[kind], shard["files"][kind]["bytes"]) for kind in paths]
            faults += found if any(found) else [_ends_fault(paths["offsets"], shard["tokens"])]
        if any(faults):
            raise InputError("\n".join(filter(None, faults)))

    @property
    def vocab_size(self) -> int:
        """The number of ids, including the reserved ones."""
        return self.manifest["vocab_size"]

    @property
    def sha256(self) -> str:
        """The digest of the manifest, which holds those of all files."""
        return with_seal(self.manifest)[SEAL]

    @property
    def vocab_sha256(self) -> str:
        """The tokenizer's digest: its config and its vocabulary."""
        return self.manifest["vocab_sha256"]

    @property
    def vocab_path(self) -> Path:
        """The path of `vocab.txt`."""
        return self.folder / "vocab.txt"

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """The config that `load_tokenizer(vocab_path, config)` takes."""
        return self.manifest["tokenizer"]

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1, or -1 for none; but see `label_sets`."""
        return self.manifest["num_classes"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels' names; their numbers in a store made without names."""
        return tuple(self.manifest.get("class_names", map(str, range(self.num_classes))))

    @functools.cached_property
    def label_sets(self) -> np.ndarray | None:
        """The sets of labels that documents have: 0 or 1, uint8 [sets, classes].

        A document's label is then the number of its set. None if documents have one label each.
        """
        sets = self.manifest.get("label_sets")
        if sets is None:
            return None
        table = np.zeros((len(sets), self.num_classes), np.uint8)
        for row, classes in zip(table, sets, strict=True):
            row[classes] = 1
        return table

    @property
    def context_names(self) -> tuple[str, ...]:
        """The contexts' names; () in a store that was made without --context_key."""
        return tuple(self.manifest.get("context_names", ()))

    @property
    def note(self) -> str:
        """One line about the origin of the splits; may be empty."""
        return self.manifest["note"]

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.manifest["splits"])

    def split(self, *names: str) -> SplitView:
        """Returns a view of one or several splits, one after the other.

        Raises:
            InputError: a split does not exist; the message names those that do.
        """
        for name in names:
            if name not in self.splits:
                raise InputError(
                    f"{self.folder} has no split {name!r}; it has {', '.join(self.splits)}"
                )
        entries = [shard for name in names for shard in self.manifest["splits"][name]["shards"]]
        return WholeSplit(Shards(self.folder, entries, self._token_dtype, self.remote))

    def verify(self) -> None:
        """Reads every file, in O(1) memory, and checks all that a `TokenStore` promises.

        Checksums; that the vocabulary is the tokenizer's; that each document has tokens and ends
        with the end token; that ids, labels and contexts are in their ranges.

        Raises:
            InputError: one line for each fault of each file, or some are not in the folder.
        """
        if self.shards_elsewhere:
            raise InputError(
                f"--verify reads whole files, and {self.shards_elsewhere} of the store's are not on"
                " this disk: leave out --store_cache_bytes, or verify a copy of the store"
            )
        raise_if(list(store_faults(self.folder, self.manifest)))


def _size_fault(path: Path, size: int) -> str:
    try:
        found = path.lstat()
    except OSError:
        return f"{path} is missing; the manifest says {size} bytes"
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is a link or no file; a store's files lie in its own folder"
    if found.st_size != size:
        return f"{path} has {found.st_size} bytes; the manifest says {size} bytes"
    return ""


def _ends_fault(path: Path, num_tokens: int) -> str:
    """Returns a fault unless a file of offsets begins with 0 and ends with `num_tokens`."""
    with path.open("rb") as file:
        first = file.read(OFFSET_DTYPE.itemsize)
        file.seek(-OFFSET_DTYPE.itemsize, 2)
        ends = np.frombuffer(first + file.read(), OFFSET_DTYPE).tolist()
    if ends == [0, num_tokens]:
        return ""
    return f"{path} is damaged: its offsets go from {ends[0]} to {ends[1]}, not 0 to {num_tokens}"
