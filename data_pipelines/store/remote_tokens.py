"""Tokens of shards that stay at an address: the documents of a batch are read by byte ranges.

For a store that is larger than the disk. An epoch's order takes the documents of each batch from
the whole store, so to fetch and evict shards would move the store many times an epoch.
"""

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from data_pipelines.errors import InputError, TransientError
from data_pipelines.object_store import (
    MissingError,
    ObjectStore,
    RefusedError,
    StoreError,
    patiently,
)
from data_pipelines.reserved_ids import END_ID, PADDING_ID

RETRY_SECONDS = 120.0  # for a store that does not answer, anew for each batch
MAX_GAP_BYTES = 1 << 14  # read for nothing rather than by another request
Range = tuple[str, int, int]  # a shard's name, and the first and last token but one


class RemoteTokens:
    """The `.tokens` files of the store at `url`.

    Threads may read at once. There is no digest of a document, so what is compared is the number of
    bytes and that all ids are words of the vocabulary: another store's ends of documents are not.

    Attributes:
        fault: The error that ended a read, for those who see it through TensorFlow.
    """

    def __init__(
        self, url: str, dtype: np.dtype, vocab_size: int, log: Callable[[str], None]
    ) -> None:
        self.fault: InputError | None = None
        self._store, self._log, self._is_failing = ObjectStore(url), log, False
        self._dtype, self._vocab_size = dtype, vocab_size

    def read(self, ranges: list[Range]) -> list[np.ndarray]:
        """Returns tokens [start, stop) of shards; ranges that are close are one request.

        Raises:
            InputError: The store lacks a shard, or refuses to be read, or it is not the one of the
                manifest. A TransientError if it does not answer.
        """
        try:
            return self._read(ranges)
        except StoreError as error:
            is_final = isinstance(error, MissingError | RefusedError)
            self.fault = (InputError if is_final else TransientError)(
                f"--store={self._store.url} cannot be read: {error}"
            )
        except InputError as error:
            self.fault = error
        raise self.fault

    def _read(self, ranges: list[Range]) -> list[np.ndarray]:
        from fsspec.utils import merge_offset_ranges

        url, size = self._store.url, self._dtype.itemsize
        asked = [(f"{name}.tokens", size * start, size * stop) for name, start, stop in ranges]
        lists = [list(each) for each in zip(*(a for a in asked if a[1] < a[2]), strict=True)]
        if not lists:
            return [np.empty(0, self._dtype)] * len(ranges)
        merged = list(zip(*merge_offset_ranges(*lists, MAX_GAP_BYTES), strict=True))
        blocks = patiently(lambda: self._store.read_ranges(merged), RETRY_SECONDS, self._say, url)
        self._is_failing = False
        for (path, start, stop), block in zip(merged, blocks, strict=True):
            if len(block) != stop - start:
                raise InputError(
                    f"--store={url}: {path} gave {len(block)} bytes in place of bytes {start} to "
                    f"{stop}: it was cut off, or the server does not answer requests for ranges"
                )
        begins, tokens = [each[:2] for each in merged], []
        for path, start, stop in asked:
            place = bisect_right(begins, (path, start)) - 1
            inside = blocks[place][start - begins[place][1] : stop - begins[place][1]]
            tokens.append(np.frombuffer(inside, self._dtype))
            self._check(path, tokens[-1])
        return tokens

    def _say(self, line: str) -> None:
        """Logs one line for all threads that meet a failure of the store."""
        if not self._is_failing:
            self._is_failing = True
            self._log(line)

    def _check(self, path: str, words: np.ndarray) -> None:
        is_word = (words != PADDING_ID) & (words != END_ID) & (words < self._vocab_size)
        if not is_word.all():
            raise InputError(
                f"--store={self._store.url}: {path} is not the one that its manifest names: copy "
                "the store there again"
            )
