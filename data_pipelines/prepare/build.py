"""Builds a token store from a source's text.

A source's parts are tokenized independently (`drafts`), by as many processes as the machine has
cores, by Apache Spark or by Apache Beam (`runners`, `spark`, `beam`). The drafts' word counts give
the vocabulary; then each draft becomes a shard. Drafts and shards are kept in OUT.building: a
prepare that was killed resumes from them. The store's bytes depend on the data and the flags alone.
"""

import contextlib
import fcntl
import functools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.durable import make_folder, write_file
from data_pipelines.errors import InputError
from data_pipelines.prepare.bad_examples import BadExamples
from data_pipelines.prepare.beam import BeamRunner
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.contexts import context_names
from data_pipelines.prepare.drafts import Draft, draft_part, find_duplicates, parts_of
from data_pipelines.prepare.fingerprint import digest, fingerprint, keyed_folder
from data_pipelines.prepare.runners import Progress, runner_for
from data_pipelines.prepare.shards import CONTEXTS_FILE, ShardTask, shard_part, shard_tasks
from data_pipelines.prepare.spark import SPARK, SparkRunner
from data_pipelines.prepare.vocabulary import choose_pieces, vocabulary_facts
from data_pipelines.sources.source import Source, label_sets_of
from data_pipelines.store.manifest import MAX_LABEL_CELLS, token_dtype
from data_pipelines.store.store_writer import finish_store
from data_pipelines.store.token_store import TokenStore

DRAFT_VERSION = 2  # of the drafts' format and of the rules by which text becomes words


def ensure_store(
    config: PrepareConfig, folder: str | Path, log: Callable[[str], None] = print
) -> TokenStore:
    """Opens the store in `folder`, or builds it first.

    Processes of one host may call it at the same time: one builds, the others wait. With
    `processes=1`, building runs TensorFlow operations in this process, so a program that makes a
    `MultiWorkerMirroredStrategy` must make it before.

    Args:
        config: what the store must hold. If the store exists, the source is not opened.
        folder: the store's folder; its lock is the file FOLDER.lock.
        log: takes lines of progress.

    Raises:
        InputError: the folder holds another store or other files, cannot be written, or the
            source, its documents or the vocabulary's size is wrong.
        WorkerDiedError: a process that tokenizes was killed.
    """
    folder = Path(folder).resolve()
    if not (folder / "manifest.json").exists():
        source = config.open_source()
        with _locked(folder, log):
            if not (folder / "manifest.json").exists():
                build_store(config, source, folder, log)
    # A build that is killed at its very end leaves its drafts.
    shutil.rmtree(_building(folder), ignore_errors=True)
    store = TokenStore(folder)
    # Stores of before there was a choice do not name it.
    found = {"tokenizer": "word", "labels": "single", **store.manifest["prepare_config"]}
    differences = [
        f"{key} is {found.get(key, '') or 'not set'}, not {value or 'not set'}"
        for key, value in config.content().items()
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
    """Holds FOLDER.lock. The file stays: removing it would let two processes in at once."""
    path = folder.with_name(folder.name + ".lock")
    try:
        make_folder(folder.parent)
        file = path.open("a")
    except OSError as error:
        raise InputError(f"{folder} cannot be written (--store, --out): {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            here = Path.cwd()
            store, lock = (
                p.relative_to(here) if p.is_relative_to(here) else p for p in (folder, path)
            )
            log(f"prepare: another process is preparing {store} and holds {lock}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise InputError(
                f"{path} cannot be locked ({error.strerror}): its file system has no flock, which "
                "keeps two processes from writing one store. Prepare on another file system and "
                "copy the folder, or mount this one with locks (e.g. Lustre's option flock)"
            ) from error
        yield


def build_store(
    config: PrepareConfig, source: Source, folder: Path, log: Callable[[str], None] = print
) -> None:
    """Builds the store in `folder`, which must not exist or be empty. Takes no lock.

    Keeps unfinished work in FOLDER.building. A build that is stopped leaves it for the next one
    with the same source and tokenizer; an InputError removes it.

    Raises:
        InputError: the folder is in use, more documents than --max_bad_examples are unusable,
            or --vocab_size is larger than the data.
        WorkerDiedError: a process that tokenizes was killed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} is in use and is no token store: choose another folder "
            "(--store of the trainer, --out of prepare) or delete it"
        )
    if source.note:
        log(source.note)
    building = _building(folder)
    try:
        _Build(config, source, building, log).run(folder)
    except InputError:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(building, ignore_errors=True)  # the store is whole without that


def _building(folder: Path) -> Path:
    return folder.with_name(folder.name + ".building")


class _Build:
    """The steps of a build. Each leaves its result in files and skips what exists."""

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
        self._runner: Any
        if config.runner == SPARK:
            self._runner = SparkRunner(config.runner_options)
        elif config.runner:
            self._runner = BeamRunner(config.runner, config.runner_options)
        else:
            self._runner = runner_for(config.processes, len(self._parts))

    def run(self, folder: Path) -> None:
        sets, classes = label_sets_of(self._source), self._source.class_names
        if len(sets) * len(classes) > MAX_LABEL_CELLS:
            raise InputError(
                f"{len(sets):,} different sets of {len(classes):,} labels are too many for memory: "
                "leave out rare labels, or use fewer documents"
            )
        rules = json.dumps([DRAFT_VERSION, self._tokenizer], sort_keys=True).encode()
        key = digest(rules, repr(self._parts).encode(), fingerprint(self._source))
        drafts_folder = keyed_folder(self._building, "drafts", key)
        drafts = self._draft(drafts_folder)
        dropped = find_duplicates(drafts)
        bad_examples = self._check_bad_examples(drafts, dropped)
        pieces = choose_pieces(self._config, drafts, dropped, self._log)
        vocab, facts = vocabulary_facts(self._tokenizer, pieces)
        tasks = shard_tasks(drafts, dropped, token_dtype(facts["vocab_size"]).name)
        key = digest(key.encode(), repr(tasks).encode(), vocab)
        shards_folder = keyed_folder(self._building, "shards", key)
        write_file(shards_folder / "vocab.txt", [vocab])
        if self._config.context_key:
            facts |= {"context_names": context_names(drafts, self._config.context_key)}
            names = json.dumps(facts["context_names"]).encode()
            write_file(shards_folder / CONTEXTS_FILE, [names])
        entries = self._write_shards(drafts_folder, shards_folder, tasks)
        self._finish(folder, shards_folder, vocab, facts, entries, bad_examples)

    def _draft(self, folder: Path) -> list[Draft]:
        todo = [part for part in self._parts if not (folder / f"{part.name}.npz").exists()]
        if done := len(self._parts) - len(todo):
            self._log(f"prepare: resuming: {done} of {len(self._parts)} parts are done already")
        function = functools.partial(draft_part, folder, self._source, self._tokenizer)
        self._runner(function, todo, Progress(len(todo), self._log))
        return [Draft(folder, part) for part in self._parts]

    def _check_bad_examples(
        self, drafts: list[Draft], dropped: dict[str, tuple[int, ...]]
    ) -> dict[str, int]:
        """Reports the bad examples and returns their number by split.

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
        report = bad.report(self._config.max_bad_examples)
        if len(bad) > self._config.max_bad_examples:
            raise InputError(report)
        self._log(report)
        return dict(by_split)

    def _write_shards(
        self, drafts: Path, folder: Path, tasks: list[ShardTask]
    ) -> dict[str, list[dict[str, Any]]]:
        """Returns the manifest's entries of all shards, by split."""
        todo = [task for task in tasks if not (folder / f"{task.name}.json").exists()]
        function = functools.partial(shard_part, drafts, folder, self._tokenizer)
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
        vocabulary: dict[str, Any],
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
            "num_classes": len(source.class_names),
            "class_names": source.class_names,
            **({"label_sets": label_sets_of(source)} if label_sets_of(source) else {}),
            **vocabulary,
            "prepare_config": self._config.content(),
        }
        finish_store(shards_folder, folder, vocab, facts, entries, bad_examples)
        shards = [entry for split in entries.values() for entry in split]
        self._log(
            f"prepare: {sum(e['examples'] for e in shards):,} documents, "
            f"{sum(e['tokens'] for e in shards):,} tokens, {facts['vocab_size']:,} ids "
            f"in {folder} after {time.monotonic() - self._begin:.1f} s"
        )
