"""The `prepare` command: a source's text -> a token store.

python -m data_pipelines.prepare --source=movie_reviews --out=DIR

A source's parts are tokenized independently (`prepare_parts`), by as many processes as the machine
has cores or by Apache Beam (`prepare_runners`, `prepare_beam`): each part becomes a draft, its
documents in numbers of its own words. From the drafts' word counts comes the vocabulary; then each
draft is renumbered and becomes a shard. Drafts and shards are kept in OUT.building, so that a
prepare that was killed goes on where it was. The store's bytes depend on the data and the flags
alone.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import flag_fields
from data_pipelines.errors import InputError
from data_pipelines.flag_fields import flag
from data_pipelines.prepare.beam import BeamRunner, beam_faults
from data_pipelines.prepare.parts import (
    BadExamples,
    Draft,
    Part,
    ShardTask,
    draft_part,
    parts_of,
    shard_part,
    write_vocabulary,
)
from data_pipelines.prepare.runners import Function, Progress, run_here, runner_for
from data_pipelines.sources import Source, class_names, open_source
from data_pipelines.sources.combined import open_combined
from data_pipelines.store.store_writer import finish_store
from data_pipelines.store.token_store import TokenStore, token_dtype
from data_pipelines.tokenizers import TOKENIZERS
from data_pipelines.tokenizers.subword_vocabulary import learn_pieces
from data_pipelines.tokenizers.vocabulary import FIRST_ID

# Words of other splits must not shape the vocabulary: they are what a model is judged on.
VOCABULARY_SPLITS = ("train", "unsupervised")
# What decides the documents' ids, besides the data.
CONTENT = (
    *("source", "unlabelled", "labelled"),
    *("text_key", "label_key", "id_key", "unlabelled_text_key"),
    *("tokenizer", "vocab_size", "min_count", "lowercase"),
)
DRAFT_VERSION = 1  # of the drafts' format and of the rules by which text becomes words
_source, _tokens = functools.partial(flag, "Source"), functools.partial(flag, "Tokens")
_execution = functools.partial(flag, "Execution")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how. Each field is a flag of `prepare` and carries its help.

    Raises:
        InputError: A value is out of range, or two contradict each other.
    """

    # fmt: off
    source: str = _source("", "Source of the text; see docs/data-sources.md.")
    unlabelled: str = _source("", "Source of unlabelled text. Replaces --source, together with "
        "--labelled.")
    labelled: str = _source("", "Source of labelled documents. Replaces --source, together with "
        "--unlabelled.")
    data_dir: str | None = _source(None, "Folder of prepared TFDS data sets, for tfds: sources.")
    text_key: str = _source("", "Column or key of the text. Default: text.")
    label_key: str = _source("", "Column or key of the label. Default: label.")
    id_key: str = _source("", "Column or key of the id. Default: file name and position.")
    unlabelled_text_key: str = _source("", "Column or key of the text of --unlabelled. "
        "Default: text.")
    tokenizer: str = _tokens("word", "Unit of text that becomes a token.", choices=TOKENIZERS)
    vocab_size: int = _tokens(20_000, "Vocabulary size, including the 3 reserved ids. Characters "
        "and bytes may need fewer.", at_least=4)
    min_count: int = _tokens(2, "Smallest count of a word in training text. Rarer words become "
        "unknown, and do not shape subwords.", at_least=1)
    lowercase: bool | None = _tokens(None, "Lower-case the text. Default: true, except for "
        "bytes.")
    max_bad_examples: int = _source(0, "Number of unusable documents to leave out before prepare "
        "stops.",
        at_least=0)
    processes: int = _execution(1, "Number of processes that tokenize. 0: one per core. The result "
        "is the same.", at_least=0)
    runner: str = _execution("", "Apache Beam runner: DirectRunner, FlinkRunner, SparkRunner or "
        "DataflowRunner. Default: processes of this machine.")
    beam_options: str = _execution("", "Options for Apache Beam, e.g. '--flink_master=HOST:8081'.")
    # fmt: on

    def __post_init__(self) -> None:
        if faults := flag_fields.all_faults(self, PrepareConfig._faults):
            raise InputError("\n".join(faults))
        if self.lowercase is None:
            object.__setattr__(self, "lowercase", self.tokenizer != "byte")

    def _faults(self) -> list[str]:
        faults = []
        if bool(self.source) == bool(self.unlabelled or self.labelled) or (
            bool(self.unlabelled) != bool(self.labelled)
        ):
            faults.append("--source is required, or --unlabelled and --labelled instead of it")
        if self.unlabelled_text_key and not self.unlabelled:
            faults.append(f"--unlabelled_text_key={self.unlabelled_text_key} needs --unlabelled")
        return faults + self._byte_faults() + beam_faults(self.runner, self.beam_options)

    def _byte_faults(self) -> list[str]:
        if self.tokenizer != "byte":
            return []
        faults = []
        if self.vocab_size < FIRST_ID + 256:
            faults.append(
                f"--vocab_size={self.vocab_size} is less than the {FIRST_ID + 256} ids of "
                "--tokenizer=byte"
            )
        if self.lowercase:
            faults.append("--lowercase is not for --tokenizer=byte, which keeps every byte")
        return faults

    def content(self) -> dict[str, Any]:
        """Returns the manifest's `prepare_config`: what decides the documents' ids."""
        return {name: getattr(self, name) for name in CONTENT}

    def tokenizer_config(self) -> dict[str, Any]:
        """Returns what the tokenizer's `config()` is."""
        if self.tokenizer == "byte":
            return {"type": "byte"}
        return {"type": self.tokenizer, "lowercase": self.lowercase}

    def open_source(self) -> Source:
        """Opens the source, or the two.

        Raises:
            InputError: a spec or a key is wrong, or data is missing.
        """
        keys = {"text_key": self.text_key, "label_key": self.label_key, "id_key": self.id_key}
        if self.source:
            return open_source(self.source, self.data_dir, **keys)
        return open_combined(
            self.unlabelled, self.labelled, self.data_dir, self.unlabelled_text_key, **keys
        )


def ensure_store(
    config: PrepareConfig, folder: str | Path, log: Callable[[str], None] = print
) -> TokenStore:
    """Opens the store in `folder`, or makes it first.

    Processes of one host may call it at the same time: one builds, the others wait for it. With
    `processes=1`, building runs TensorFlow operations in this process, so a program that makes a
    `MultiWorkerMirroredStrategy` must make it before.

    Args:
        config: what the store must hold. Where it exists already, the source is not looked at.
        folder: the store's; its lock is the file FOLDER.lock beside it.
        log: takes lines of progress.

    Returns:
        The opened store.

    Raises:
        InputError: the folder holds another store or other files, cannot be written, or the
            source, its documents or the vocabulary's size is wrong.
        WorkerDiedError: a process of those that tokenize was killed.
    """
    folder = Path(folder).resolve()
    if (folder / "manifest.json").exists():
        return _open_same(config, folder)
    source = config.open_source()
    with _locked(folder, log):
        if not (folder / "manifest.json").exists():
            build_store(config, source, folder, log)
    return _open_same(config, folder)


def _open_same(config: PrepareConfig, folder: Path) -> TokenStore:
    store = TokenStore(folder)
    # Before there was a choice, a store said nothing of its tokenizer.
    found, wanted = {"tokenizer": "word", **store.manifest["prepare_config"]}, config.content()
    differences = [
        f"{key} is {found.get(key, '') or 'not set'}, not {value or 'not set'}"
        for key, value in wanted.items()
        if found.get(key, "") != value
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

    What is unfinished is in FOLDER.building. It stays if this process is stopped, and is used the
    next time if the source and the tokenizer are the same; it goes with an InputError.

    Raises:
        InputError: the folder is in use, more documents than --max_bad_examples cannot be used,
            or --vocab_size is larger than the data.
        WorkerDiedError: a process of those that tokenize was killed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} is in use and is no token store: choose another folder "
            "(--store of the trainer, --out of prepare) or delete it"
        )
    if source.note:
        log(source.note)
    building = folder.with_name(folder.name + ".building")
    try:
        _Build(config, source, building, log).run(folder)
    except InputError:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(building)


class _Build:
    """One build's steps; each leaves its result in files and skips what is there."""

    def __init__(
        self, config: PrepareConfig, source: Source, building: Path, log: Callable[[str], None]
    ) -> None:
        self._config = config
        self._tokenizer = config.tokenizer_config()
        self._source = source
        self._log = log
        self._building = building
        self._begin = time.monotonic()
        self._parts = parts_of(source)
        self._runner = _runner(config, len(self._parts))

    def run(self, folder: Path) -> None:
        draft_key = self._draft_key()
        drafts_folder = _only_folder(self._building, "drafts", draft_key)
        self._draft(drafts_folder)
        drafts = [Draft(drafts_folder, part) for part in self._parts]
        dropped = _find_duplicates(drafts)
        bad_examples = self._check_bad_examples(drafts, dropped)
        pieces = self._choose_pieces(drafts, dropped)
        facts, vocab = self._vocabulary(drafts_folder, pieces)
        tasks = _shard_tasks(drafts, dropped, token_dtype(facts["vocab_size"]).name)
        key = _digest(draft_key.encode(), repr(tasks).encode(), vocab.read_bytes())
        shards_folder = _only_folder(self._building, "shards", key)
        entries = self._shards(drafts_folder, shards_folder, vocab, tasks)
        self._finish(folder, shards_folder, vocab.read_bytes(), facts, entries, bad_examples)

    def _draft_key(self) -> str:
        """Returns a digest of all that decides the drafts."""
        tokenizer = json.dumps([DRAFT_VERSION, self._tokenizer], sort_keys=True)
        return _digest(tokenizer.encode(), repr(self._parts).encode(), _fingerprint(self._source))

    def _draft(self, folder: Path) -> None:
        todo = [part for part in self._parts if not (folder / f"{part.name}.npz").exists()]
        done = len(self._parts) - len(todo)
        if done:
            self._log(f"prepare: going on: {done} of {len(self._parts)} parts are there already")
        function = functools.partial(draft_part, folder, self._source, self._tokenizer)
        self._runner(function, todo, Progress(len(todo), self._log))

    def _check_bad_examples(
        self, drafts: list[Draft], dropped: dict[str, tuple[int, ...]]
    ) -> dict[str, int]:
        """Reports the bad examples; returns how many there are by split.

        Raises:
            InputError: there are more than allowed.
        """
        bad = BadExamples()
        by_split: Counter[str] = Counter()
        for draft in drafts:
            found = draft.bad_examples()
            bad.merge(found["first"], found["reasons"])
            by_split[draft.part.split] += sum(found["reasons"].values())
        for draft in drafts:
            for number in dropped.get(draft.part.name, ()):
                where = f"{draft.part.split}, {draft.part.part}: document {number + 1}"
                bad.add(f"{where}, id {draft.example_ids()[number]!r}", "its id is there before")
                by_split[draft.part.split] += 1
        if not len(bad):
            return {}
        allowed = self._config.max_bad_examples
        report = _bad_examples_report(bad, allowed)
        if len(bad) > allowed:
            raise InputError(report)
        self._log(report)
        return dict(by_split)

    def _choose_pieces(self, drafts: list[Draft], dropped: dict[str, tuple[int, ...]]) -> list[str]:
        """Returns the vocabulary, most frequent first, ties by bytes.

        Raises:
            InputError: there are not as many words, or subwords, as --vocab_size says.
        """
        kind, min_count = self._config.tokenizer, self._config.min_count
        size = self._config.vocab_size - FIRST_ID
        if kind == "byte":
            return []
        total = _count_words(drafts, dropped)
        frequent = [word for word, count in total.items() if count >= min_count]
        frequent.sort(key=lambda word: (-total[word], word))
        if kind == "subword":
            self._log(f"prepare: learning subwords from {len(frequent):,} words")
            counts = {word.decode(): total[word] for word in frequent}
            pieces = learn_pieces(counts, size, min_count)
        else:
            pieces = [word.decode() for word in frequent[:size]]
        if len(pieces) < size and kind != "character":
            raise InputError(
                f"--vocab_size={self._config.vocab_size} is larger than the data: {len(pieces)} "
                f"{kind}s are seen --min_count={min_count} times or more, so it can be at most "
                f"{FIRST_ID + len(pieces)}"
            )
        return pieces

    def _vocabulary(self, folder: Path, pieces: list[str]) -> tuple[dict[str, Any], Path]:
        """Returns what the manifest says of the vocabulary, and the path of its file."""
        function = functools.partial(write_vocabulary, folder, self._tokenizer)
        # A cluster would take minutes to start for this; and processes spare this one TensorFlow.
        run = run_here if self._config.runner else self._runner
        run(function, [pieces], Progress(1, self._log))
        facts = json.loads((folder / "vocabulary.json").read_bytes())
        return facts, folder / "vocab.txt"

    def _shards(
        self, drafts: Path, folder: Path, vocab: Path, tasks: list[ShardTask]
    ) -> dict[str, list[dict[str, Any]]]:
        """Returns the manifest's entries of all shards, by split."""
        todo = [task for task in tasks if not (folder / f"{task.name}.json").exists()]
        function = functools.partial(shard_part, drafts, folder, vocab, self._tokenizer)
        self._runner(function, todo, Progress(len(todo), self._log))
        entries: dict[str, list[dict[str, Any]]] = {}
        for task in tasks:
            entry = json.loads((folder / f"{task.name}.json").read_bytes())
            entries.setdefault(task.part.split, []).append(entry)
        return entries

    def _finish(
        self,
        folder: Path,
        shards_folder: Path,
        vocab: bytes,
        facts: dict[str, Any],
        entries: dict[str, list[dict[str, Any]]],
        bad_examples: dict[str, int],
    ) -> None:
        source = self._source
        for split in source.splits:
            if split not in entries:
                self._log(f"prepare: {split} has no documents, so the store has no such split")
        facts = {
            "source": source.name,
            "note": source.note,
            "num_classes": source.num_classes,
            "class_names": class_names(source),
            **facts,
            "prepare_config": self._config.content(),
        }
        finish_store(shards_folder, folder, vocab, facts, entries, bad_examples)
        shards = [entry for split in entries.values() for entry in split]
        self._log(
            f"prepare: {sum(e['examples'] for e in shards):,} documents, "
            f"{sum(e['tokens'] for e in shards):,} tokens, {facts['vocab_size']:,} ids "
            f"in {folder} after {time.monotonic() - self._begin:.1f} s"
        )


def _count_words(drafts: list[Draft], dropped: dict[str, tuple[int, ...]]) -> dict[bytes, int]:
    """Returns how often each word is seen in `VOCABULARY_SPLITS`, dropped documents left out."""
    total: dict[bytes, int] = {}
    for draft in drafts:
        if draft.part.split in VOCABULARY_SPLITS:
            counts = draft.counts_without(dropped.get(draft.part.name, ())).tolist()
            for word, count in zip(draft.words(), counts, strict=True):
                total[word] = total.get(word, 0) + count
    return total


def _runner(
    config: PrepareConfig, tasks: int
) -> Callable[[Function, Sequence[Any], Progress], None]:
    if config.runner:
        return BeamRunner(config.runner, config.beam_options)
    return runner_for(config.processes, tasks)


def _only_folder(building: Path, kind: str, key: str) -> Path:
    """Returns building/KIND-KEY, made if it is not there; others of its kind are removed."""
    wanted = building / f"{kind}-{key}"
    wanted.mkdir(parents=True, exist_ok=True)
    for path in building.glob(f"{kind}-*"):
        if path != wanted:
            shutil.rmtree(path)
    return wanted


class _FileCollector(pickle.Pickler):
    """Notes the files that a pickled object names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.files: dict[str, tuple[int, int]] = {}

    def persistent_id(self, value: object) -> None:
        if isinstance(value, str | Path) and os.path.isfile(value):
            status = os.stat(value)
            self.files[str(value)] = (status.st_size, status.st_mtime_ns)


def _fingerprint(source: Source) -> bytes:
    """Returns bytes that change with the source's options and with the files that it names."""
    buffer = io.BytesIO()
    collector = _FileCollector(buffer)
    collector.dump(source)
    return buffer.getvalue() + repr(sorted(collector.files.items())).encode()


def _digest(*values: bytes) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(len(value).to_bytes(8, "big") + value)
    return digest.hexdigest()[:16]


def _find_duplicates(drafts: list[Draft]) -> dict[str, tuple[int, ...]]:
    """Returns, by the part's name, the documents whose id an earlier document has.

    Ids are compared by their hashes first, and where those are equal, as they are.
    """
    hashes = [draft.array("id_hashes") for draft in drafts]
    flat = np.concatenate([np.zeros(0, np.uint64), *hashes])
    ordered = np.sort(flat)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    seen: set[str] = set()
    dropped = {}
    for draft, values in zip(drafts, hashes, strict=True):
        candidates = np.flatnonzero(np.isin(values, repeated)).tolist() if len(repeated) else []
        if not candidates:
            continue
        ids = draft.example_ids()
        numbers = []
        for number in candidates:
            if ids[number] in seen:
                numbers.append(number)
            seen.add(ids[number])
        if numbers:
            dropped[draft.part.name] = tuple(numbers)
    return dropped


def _bad_examples_report(bad: BadExamples, allowed: int) -> str:
    verdict = "so they are left out" if len(bad) <= allowed else "correct the data or allow more"
    lines = [f"{len(bad):,} bad examples; --max_bad_examples={allowed} allows {allowed}: {verdict}"]
    lines += [f"  {where}: {why}" for where, why in bad.first]
    if len(bad) > len(bad.first):
        lines.append(f"  and {len(bad) - len(bad.first):,} more")
    lines += [f"{count:,} times: {why}" for why, count in bad.by_count()]
    return "\n".join(lines)


def _shard_tasks(
    drafts: list[Draft], dropped: dict[str, tuple[int, ...]], dtype: str
) -> list[ShardTask]:
    """Returns the shards to be made: one for each part that has documents."""
    kept: dict[str, list[tuple[Part, tuple[int, ...]]]] = {}
    for draft in drafts:
        left_out = dropped.get(draft.part.name, ())
        if draft.num_examples > len(left_out):
            kept.setdefault(draft.part.split, []).append((draft.part, left_out))
    return [
        ShardTask(part, f"{split}-{number:05d}-of-{len(parts):05d}", left_out, dtype)
        for split, parts in kept.items()
        for number, (part, left_out) in enumerate(parts)
    ]
