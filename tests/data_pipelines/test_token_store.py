import json
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID
from data_pipelines.token_store import StoreWriter, TokenStore, token_dtype

MakeStore = Callable[..., TokenStore]
DOCUMENTS = {
    "train": [("a b c", 1), ("", 0), ("b a", 1), ("c c c c", 0), ("a", 1)],
    "test": [("a z", 0), ("b", 1)],
    "unsupervised": [("a a a", None)],
}
FACTS = {
    "source": "random",
    "note": "",
    "num_classes": 2,
    "tokenizer": {"type": "word", "lowercase": True},
    "vocab_sha256": "00",
    "prepare_config": {},
}


@pytest.fixture
def store(make_store: MakeStore) -> TokenStore:
    # Counts in train + unsupervised: a 6, c 5, b 2.
    return make_store(DOCUMENTS, vocab_size=6, shard_examples=2)


def write_random(folder: Path, documents: list[list[int]], shards: int, vocab_size: int) -> None:
    with StoreWriter(folder) as writer:
        parts = [documents[i::shards] for i in range(shards)]
        arrays = [
            (
                np.array(sum(part, []), np.int64),
                np.array([len(d) for d in part], np.int64),
                np.zeros(len(part)),
            )
            for part in parts
        ]
        writer.write_split("train", shards, arrays, token_dtype(vocab_size))
        writer.finish(b"", {**FACTS, "vocab_size": vocab_size})


def test_properties(store: TokenStore) -> None:
    assert store.splits == ("train", "test", "unsupervised")
    assert (store.vocab_size, store.num_classes, store.note) == (6, 2, "made by a test")
    assert store.vocab_path.read_text() == "<pad>\n<unk>\n<eos>\na\nc\nb\n"
    assert store.tokenizer_config == {"type": "word", "lowercase": True}
    assert store.manifest["splits"]["train"]["examples"] == 5
    assert store.manifest["splits"]["train"]["tokens"] == 15
    assert len(store.manifest["splits"]["train"]["shards"]) == 3
    assert store.manifest["token_dtype"] == "uint16"
    store.verify()


def test_view_over_one_split(store: TokenStore) -> None:
    view = store.split("train")
    assert len(view) == 5
    assert view.lengths.tolist() == [4, 1, 3, 5, 2] and view.lengths.dtype == np.int32
    assert view.labels.tolist() == [1, 0, 1, 0, 1] and view.labels.dtype == np.int32


def test_gather_pads_on_the_right(store: TokenStore) -> None:
    tokens, lengths = store.split("train").gather(np.array([4, 0, 1, 0]), 10)
    assert tokens.tolist() == [[3, 2, 0, 0], [3, 5, 4, 2], [2, 0, 0, 0], [3, 5, 4, 2]]
    assert lengths.tolist() == [2, 4, 1, 4]
    assert tokens.dtype == lengths.dtype == np.int32


def test_gather_keeps_the_last_tokens(store: TokenStore) -> None:
    tokens, lengths = store.split("train").gather(np.array([0, 4]), 2, pad_to=3)
    assert tokens.tolist() == [[4, 2, 0], [3, 2, 0]]
    assert lengths.tolist() == [2, 2]


def test_view_over_several_splits(store: TokenStore) -> None:
    view = store.split("unsupervised", "test")
    assert view.labels.tolist() == [-1, 0, 1]
    assert view.gather(np.arange(3), 9)[0].tolist() == [[3, 3, 3, 2], [3, 1, 2, 0], [5, 2, 0, 0]]


def test_gather_refuses_what_does_not_fit(store: TokenStore) -> None:
    view = store.split("train")
    with pytest.raises(IndexError):
        view.gather(np.array([5]), 4)
    with pytest.raises(IndexError):
        view.gather(np.array([-1]), 4)
    with pytest.raises(ValueError, match="pad_to=2"):
        view.gather(np.array([0]), 4, pad_to=2)
    with pytest.raises(ValueError, match="max_tokens"):
        view.gather(np.array([0]), 0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_gather_equals_python_lists(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    vocab_size = data.draw(st.sampled_from([100, 65535, 65536, 2**20]))
    token = st.integers(0, vocab_size - 1)
    words = data.draw(st.lists(st.lists(token, max_size=8), min_size=3))
    documents = [[*document, END_ID] for document in words]
    shards = data.draw(st.integers(1, 3))
    rows = data.draw(st.lists(st.integers(0, len(documents) - 1)))
    max_tokens = data.draw(st.integers(1, 10))
    folder = tmp_path_factory.mktemp("stores") / "store"
    write_random(folder, documents, shards, vocab_size)
    stored = sum((documents[i::shards] for i in range(shards)), [])
    tokens, lengths = TokenStore(folder).split("train").gather(np.array(rows), max_tokens)
    expected = [stored[row][-max_tokens:] for row in rows]
    assert [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)] == expected
    assert tokens.shape == (len(rows), max((len(e) for e in expected), default=0))
    assert all(not t[n:].any() for t, n in zip(tokens, lengths, strict=True))


@pytest.mark.parametrize(("vocab_size", "name"), [(65535, "uint16"), (65536, "uint32")])
def test_token_dtype(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name


def test_unknown_split_names_those_that_exist(store: TokenStore) -> None:
    with pytest.raises(InputError, match="'dev'.*train, test, unsupervised"):
        store.split("train", "dev")


def test_folder_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a token store"):
        TokenStore(tmp_path)


@pytest.mark.parametrize("kind", ["tokens", "offsets", "labels"])
def test_truncated_file_is_named(store: TokenStore, kind: str) -> None:
    path = store.folder / f"train-00001-of-00003.{kind}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{path.name} has .* bytes"):
        TokenStore(store.folder)


def test_missing_file_is_named(store: TokenStore) -> None:
    (store.folder / "vocab.txt").unlink()
    with pytest.raises(InputError, match="vocab.txt is missing"):
        TokenStore(store.folder)


def test_verify_names_every_damaged_file(store: TokenStore) -> None:
    for name in ("test-00000-of-00001.tokens", "train-00000-of-00003.labels"):
        data = bytearray((store.folder / name).read_bytes())
        data[0] ^= 1
        (store.folder / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        TokenStore(store.folder).verify()
    lines = str(error.value).splitlines()
    assert ["train-00000" in lines[0], "test-00000" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], "other"),
        (["version"], 2),
        (["vocab_size"], "6"),
        (["vocab_size"], 70_000),
        (["splits", "train", "tokens"], 14),
        (["splits", "train", "shards", 0, "name"], "../train-00000-of-00003"),
        (["splits", "train", "shards", 0, "examples"], 3),
        (["splits", "train", "shards", 0, "files"], {}),
        (["splits", "train"], None),
    ],
)
def test_damaged_manifest_is_named(store: TokenStore, path: list, value: object) -> None:
    manifest = json.loads((store.folder / "manifest.json").read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json"):
        TokenStore(store.folder)


def test_manifest_that_is_not_json_is_named(store: TokenStore) -> None:
    (store.folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="manifest.json cannot be read"):
        TokenStore(store.folder)


def test_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "store") as writer:
        assert writer.temporary.is_dir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_writer_replaces_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "store.building").mkdir()
    (tmp_path / "store.building" / "junk").touch()
    write_random(tmp_path / "store", [[1], [2]], 1, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert not (tmp_path / "store" / "junk").exists()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pieces_are_the_documents_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    words = data.draw(st.lists(st.lists(st.integers(3, 99), max_size=30), min_size=3, max_size=6))
    max_tokens = data.draw(st.integers(2, 12))
    folder = tmp_path_factory.mktemp("stores") / "store"
    write_random(folder, [[*document, END_ID] for document in words], 1, 100)
    view = TokenStore(folder).split("train")
    pieces = view.pieces(max_tokens)
    tokens, lengths = pieces.gather(np.arange(len(pieces)), max_tokens)
    assert (lengths == pieces.lengths).all() and lengths.max(initial=0) <= max_tokens
    cut = [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)]
    assert all(piece[-1] == END_ID and END_ID not in piece[:-1] for piece in cut)
    assert sum((piece[:-1] for piece in cut), []) == sum(words, [])
    least = sum(max(1, -(-len(document) // (max_tokens - 1))) for document in words)
    assert len(pieces) == least
    assert len(pieces.labels) == len(pieces)


def test_pieces_of_a_document_are_of_equal_length(tmp_path: Path) -> None:
    write_random(tmp_path / "store", [[*range(3, 13), END_ID], [3, END_ID], [END_ID]], 1, 100)
    pieces = TokenStore(tmp_path / "store").split("train").pieces(5)
    assert pieces.lengths.tolist() == [4, 4, 5, 2, 1]


def test_a_sample_is_a_part_chosen_by_its_seed(tmp_path: Path) -> None:
    documents = [[*range(3, 4 + i), END_ID] for i in range(50)]
    write_random(tmp_path / "store", documents, 2, 100)
    view = TokenStore(tmp_path / "store").split("train")
    first, again, other = (view.sample(10, seed) for seed in (1, 1, 2))
    assert len(first) == 10 and len(set(first.lengths.tolist())) == 10
    assert first.lengths.tolist() == again.lengths.tolist() != other.lengths.tolist()
    assert sorted(view.sample(50, 3).lengths) == sorted(view.lengths)
    rows = first.gather(np.arange(10), 99)[0]
    assert [(row != 0).sum() for row in rows] == first.lengths.tolist()
    for wrong in (0, 51):
        with pytest.raises(ValueError, match="there are 50"):
            view.sample(wrong, 0)
