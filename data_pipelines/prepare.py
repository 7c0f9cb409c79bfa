"""The `prepare` command: a source's text -> a token store.

python -m data_pipelines.prepare --source=movie_reviews --out=DIR

Each document is tokenized once. Threads split chunks of documents into words and number each
chunk's distinct words (TensorFlow's string kernels run outside Python's lock); this thread gives
every word a provisional number in order of appearance and keeps the documents as such numbers in
the unfinished folder. Once all words are counted, the shards are those numbers, renumbered.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from data_pipelines.errors import InputError
from data_pipelines.quiet_tensorflow import import_quietly
from data_pipelines.reserved_ids import END_ID, RESERVED, UNKNOWN_ID
from data_pipelines.sources import Example, Source, open_source
from data_pipelines.token_store import NO_LABEL, StoreWriter, TokenStore, token_dtype

CHUNK_EXAMPLES = 512
PROGRESS_SECONDS = 2.0
# Words of other splits must not shape the vocabulary: they are what a model is judged on.
VOCABULARY_SPLITS = ("train", "unsupervised")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
        source: a spec of `sources.open_source`.
        data_dir: where the source's data is, for sources that need it.
        vocab_size: ids in all, the 3 reserved ones included; rarer words become unknown.
        min_count: words seen fewer times in training text become unknown.
        lowercase: whether text is lower-cased.
        shard_examples: documents a shard.
        processes: threads that tokenize; 0 means one a core. Does not change the result.
    """

    source: str
    data_dir: str | None = None
    vocab_size: int = 20_000
    min_count: int = 2
    lowercase: bool = True
    shard_examples: int = 25_000
    processes: int = 0

    def __post_init__(self) -> None:
        least = {"vocab_size": 4, "min_count": 1, "shard_examples": 1, "processes": 0}
        faults = [
            f"--{name}={getattr(self, name)} must be at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if faults:
            raise InputError("\n".join(faults))

    def content(self) -> dict[str, Any]:
        """Returns what decides the documents' ids: the manifest's `prepare_config`."""
        return {
            "source": self.source,
            "vocab_size": self.vocab_size,
            "min_count": self.min_count,
            "lowercase": self.lowercase,
        }


def ensure_store(
    config: PrepareConfig, folder: str | Path, log: Callable[[str], None] = print
) -> TokenStore:
    """Opens the store in `folder`, or makes it first.

    Processes of one host may call it at the same time: one builds, the others wait for it.
    Building runs TensorFlow operations in this process, so a program that makes a
    `MultiWorkerMirroredStrategy` must make it before.

    Args:
        config: what the store must hold. Where it exists already, the source is not looked at.
        folder: the store's; its lock is the file FOLDER.lock beside it.
        log: takes lines of progress.

    Returns:
        The opened store.

    Raises:
        InputError: the folder holds another store or other files, cannot be written, or the
            source or the vocabulary's size is wrong.
    """
    folder = Path(folder).resolve()
    if (folder / "manifest.json").exists():
        return _open_same(config, folder)
    source = open_source(config.source, config.data_dir)
    with _locked(folder, log):
        if not (folder / "manifest.json").exists():
            build_store(config, source, folder, log)
    return _open_same(config, folder)


def _open_same(config: PrepareConfig, folder: Path) -> TokenStore:
    store = TokenStore(folder)
    found, wanted = store.manifest["prepare_config"], config.content()
    differences = [
        f"{key} is {found.get(key)}, not {value}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if differences:
        raise InputError(
            f"{folder} holds another token store: its {'; its '.join(differences)}. "
            "Choose another folder (--store of the trainer, --out of prepare) or delete it"
        )
    return store


@contextlib.contextmanager
def _locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds FOLDER.lock alone. The file stays: removing it would let two processes in at once."""
    path = folder.with_name(folder.name + ".lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise InputError(f"{folder} cannot be written (--store, --out): {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"prepare: waiting for the process that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_store(
    config: PrepareConfig, source: Source, folder: Path, log: Callable[[str], None] = print
) -> None:
    """Makes the store in `folder`, which must not exist or be empty. Takes no lock.

    Raises:
        InputError: the folder is in use, or --vocab_size is larger than the data.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} is in use and is no token store: choose another folder "
            "(--store of the trainer, --out of prepare) or delete it"
        )
    import_quietly()  # only here: opening a store that exists needs no TensorFlow
    from data_pipelines.tokenizer import WordTokenizer

    begin = time.monotonic()
    if source.note:
        log(source.note)
    with StoreWriter(folder) as writer:
        words, drafts = _draft(config, source, writer.temporary, log)
        kept = _choose_words(config, words, drafts)
        tokenizer = WordTokenizer([words[i].decode() for i in kept], config.lowercase)
        new_ids = _new_ids(len(words), kept)
        dtype = token_dtype(tokenizer.vocab_size)
        for split, draft in drafts.items():
            shards = _shards(draft, new_ids, config.shard_examples)
            num_shards = -(-len(draft.labels) // config.shard_examples)
            writer.write_split(split, num_shards, shards, dtype)
            draft.path.unlink()
        writer.finish(
            tokenizer.vocab_bytes,
            {
                "source": source.name,
                "note": source.note,
                "num_classes": source.num_classes,
                "tokenizer": tokenizer.config(),
                "vocab_size": tokenizer.vocab_size,
                "vocab_sha256": tokenizer.sha256,
                "prepare_config": config.content(),
            },
        )
    examples = sum(len(draft.labels) for draft in drafts.values())
    tokens = sum(int(draft.lengths.sum()) for draft in drafts.values())
    log(
        f"prepare: {examples:,} reviews, {tokens:,} tokens, {tokenizer.vocab_size:,} ids "
        f"in {folder} after {time.monotonic() - begin:.1f} s"
    )


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A split as provisional ids: a file of int32 [tokens], and lengths and labels [examples]."""

    path: Path
    lengths: np.ndarray
    labels: np.ndarray

    def tokens(self) -> np.ndarray:
        return np.asarray(np.memmap(self.path, np.int32, mode="r"))


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Some documents' words: the distinct ones, and which of them each document holds."""

    distinct: np.ndarray  # bytes objects [distinct]
    ids: np.ndarray  # int32 [words], into `distinct`
    lengths: np.ndarray  # int64 [documents]
    labels: np.ndarray  # int32 [documents]


def _draft(
    config: PrepareConfig, source: Source, folder: Path, log: Callable[[str], None]
) -> tuple[list[bytes], dict[str, _Draft]]:
    """Tokenizes all splits.

    Returns:
        The distinct words by provisional id, of which 0 is the end of a document; the splits.
    """
    threads = config.processes or os.cpu_count() or 1
    numbers: dict[bytes, int] = {b"": 0}  # no word is empty, so this is free for the end
    drafts = {}
    progress = _Progress(source.num_examples, log)
    split_chunk = _make_split_chunk(config.lowercase)
    with ThreadPoolExecutor(threads) as pool:
        for split in source.splits:
            path = folder / f"{split}.draft"
            lengths, labels = [], []
            chunks = _chunks(source.examples(split))
            with path.open("wb") as file:
                for chunk in _map_in_order(pool, split_chunk, chunks, ahead=2 * threads):
                    ids = _provisional_ids(numbers, chunk)
                    ids.tofile(file)
                    lengths.append(chunk.lengths + 1)
                    labels.append(chunk.labels)
                    progress.add(len(chunk.labels))
            drafts[split] = _Draft(path, np.concatenate(lengths), np.concatenate(labels))
    return list(numbers), drafts


def _make_split_chunk(lowercase: bool) -> Callable[[list[Example]], _Chunk]:
    import tensorflow as tf

    from data_pipelines.tokenizer import WordTokenizer

    tokenizer = WordTokenizer(None, lowercase)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def split_words(texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        words = tokenizer.split(texts)
        distinct, ids = tf.unique(words.flat_values)
        return distinct, ids, words.row_lengths()

    def split_chunk(examples: list[Example]) -> _Chunk:
        texts = [e.text.encode("utf-8", "surrogatepass") for e in examples]
        with tf.device("/CPU:0"):
            distinct, ids, lengths = split_words(tf.constant(texts, tf.string))
        labels = [NO_LABEL if e.label is None else e.label for e in examples]
        return _Chunk(distinct.numpy(), ids.numpy(), lengths.numpy(), np.array(labels, np.int32))

    return split_chunk


def _provisional_ids(numbers: dict[bytes, int], chunk: _Chunk) -> np.ndarray:
    """Returns int32 [words + documents]: the documents, each followed by 0; adds new words."""
    of_distinct = np.array(
        [numbers.setdefault(word, len(numbers)) for word in chunk.distinct.tolist()], np.int32
    )
    ends = np.cumsum(chunk.lengths)
    return np.insert(of_distinct[chunk.ids], ends, np.int32(0))


def _choose_words(
    config: PrepareConfig, words: list[bytes], drafts: dict[str, _Draft]
) -> list[int]:
    """Returns the provisional ids of the vocabulary, most frequent first, ties by bytes."""
    counts = np.zeros(len(words), np.int64)
    for split in VOCABULARY_SPLITS:
        if split in drafts:
            tokens = drafts[split].tokens()
            for start in range(0, len(tokens), 1 << 22):
                counts += np.bincount(tokens[start : start + (1 << 22)], minlength=len(words))
    counts[0] = 0  # the end of a document
    frequent = np.flatnonzero(counts >= config.min_count).tolist()
    largest = 3 + len(frequent)
    if config.vocab_size > largest:
        raise InputError(
            f"--vocab_size={config.vocab_size} is larger than the data: {len(frequent)} words are "
            f"seen --min_count={config.min_count} times or more, so it can be at most {largest}"
        )
    frequent.sort(key=lambda i: (-counts[i], words[i]))
    return frequent[: config.vocab_size - 3]


def _new_ids(num_words: int, kept: list[int]) -> np.ndarray:
    """Returns the final id of each provisional one: int32 [words]."""
    new_ids = np.full(num_words, UNKNOWN_ID, np.int32)
    new_ids[0] = END_ID
    new_ids[kept] = np.arange(len(RESERVED), len(RESERVED) + len(kept))
    return new_ids


def _shards(
    draft: _Draft, new_ids: np.ndarray, shard_examples: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the final tokens [tokens], lengths [examples] and labels [examples] of each shard."""
    tokens = draft.tokens()
    offsets = np.concatenate([[0], np.cumsum(draft.lengths)])
    for start in range(0, len(draft.labels), shard_examples):
        stop = min(start + shard_examples, len(draft.labels))
        yield (
            new_ids[tokens[offsets[start] : offsets[stop]]],
            draft.lengths[start:stop],
            draft.labels[start:stop],
        )


def _chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while chunk := list(islice(examples, CHUNK_EXAMPLES)):
        yield chunk


def _map_in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[list[Example]], _Chunk],
    items: Iterable[list[Example]],
    ahead: int,
) -> Iterator[_Chunk]:
    """Yields function(item) in order; unlike `pool.map` it reads only `ahead` items ahead."""
    waiting: collections.deque[Future[_Chunk]] = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Progress:
    """Prints how many reviews are done, at most every PROGRESS_SECONDS."""

    def __init__(self, total: int, log: Callable[[str], None]) -> None:
        self._total = total
        self._log = log
        self._done = 0
        self._begin = self._printed = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._printed < PROGRESS_SECONDS:
            return
        self._printed = now
        rate = self._done / (now - self._begin)
        left = (self._total - self._done) / rate
        self._log(
            f"prepare: {self._done:,} of {self._total:,} reviews, "
            f"{rate:,.0f} reviews/s, {left:.0f} s left"
        )


def _define_flags() -> None:
    # In a function, because a program that imports this module has flags of the same names.
    flags.DEFINE_string("source", None, "Where the text comes from: see data_pipelines/sources.")
    flags.DEFINE_string("out", None, "The folder to write the token store to.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data sets, for tfds: sources.")
    flags.DEFINE_integer("vocab_size", 20_000, "Ids in all, the 3 reserved ones included.")
    flags.DEFINE_integer("min_count", 2, "Rarer words become unknown.")
    flags.DEFINE_boolean("lowercase", True, "Whether to lower-case text.")
    flags.DEFINE_integer("shard_examples", 25_000, "Documents a shard.")
    flags.DEFINE_integer("processes", 0, "Threads that tokenize; 0 means one a core.")


def _config_from_flags() -> PrepareConfig:
    values = flags.FLAGS
    missing = [f"--{name} is required" for name in ("source", "out") if not values[name].value]
    if missing:
        raise InputError("\n".join(missing))
    return PrepareConfig(
        **{field.name: values[field.name].value for field in dataclasses.fields(PrepareConfig)}
    )


def _main(arguments: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # TFDS tells of every split that it reads
    try:
        if len(arguments) > 1:
            raise InputError(f"{arguments[1]!r} is not a flag")
        # Flushed, so that a log file or a pod's log shows progress as it is made.
        ensure_store(_config_from_flags(), flags.FLAGS.out, functools.partial(print, flush=True))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # text needs no GPU
    _define_flags()
    app.run(_main, flags_parser=_parse_flags)
