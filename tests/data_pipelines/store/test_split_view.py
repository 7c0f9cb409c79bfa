import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from data_pipelines.reserved_ids import END_ID
from data_pipelines.store.manifest import VERSION
from data_pipelines.store.seal import with_seal
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore

MakeStore = Callable[..., TokenStore]


def everything(view: SplitView) -> list[list[int]]:
    """Returns the tokens of every document."""
    tokens, lengths = view.gather(np.arange(len(view)), 10_000)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def test_view_over_one_split(store: TokenStore) -> None:
    view = store.split("train")
    assert len(view) == 5
    assert view.lengths_of(np.arange(5)).tolist() == [4, 1, 3, 5, 2] and view.num_tokens == 15
    assert view.labels_of(np.array([4, 1])).tolist() == [1, 0]
    assert view.labels_of(np.array([4])).dtype == np.int32


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
    assert view.labels_of(np.arange(3)).tolist() == [-1, 0, 1]
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
    tmp_path_factory: pytest.TempPathFactory, write_store: MakeStore, data: st.DataObject
) -> None:
    vocab_size = data.draw(st.sampled_from([100, 65535, 65536, 2**20]))
    token = st.integers(0, vocab_size - 1)
    words = data.draw(st.lists(st.lists(token, max_size=8), min_size=3))
    documents = [[*document, END_ID] for document in words]
    shards = data.draw(st.integers(1, 3))
    rows = data.draw(st.lists(st.integers(0, len(documents) - 1)))
    max_tokens = data.draw(st.integers(1, 10))
    folder = tmp_path_factory.mktemp("stores") / "store"
    view = write_store(folder, documents, shards, vocab_size).split("train")
    stored = sum((documents[i::shards] for i in range(shards)), [])
    tokens, lengths = view.gather(np.array(rows, np.int64), max_tokens)
    expected = [stored[row][-max_tokens:] for row in rows]
    assert [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)] == expected
    assert tokens.shape == (len(rows), max((len(e) for e in expected), default=0))
    assert all(not t[n:].any() for t, n in zip(tokens, lengths, strict=True))
    lengths = view.lengths_of(np.array(rows, np.int64))
    assert lengths.tolist() == [len(stored[row]) for row in rows]
    parity = sum((list(range(len(documents)))[i::shards] for i in range(shards)), [])
    assert (view.labels_of(np.array(rows, np.int64)) % 2 == np.array(parity)[rows] % 2).all()


stores_of_documents = st.lists(
    st.lists(st.integers(3, 99), max_size=30), min_size=1, max_size=80
).map(lambda words: [[*document, END_ID] for document in words])


@settings(max_examples=60, deadline=None)
@given(stores_of_documents, st.integers(1, 3), st.integers(2, 12), st.data())
def test_pieces_are_the_documents_cut(
    tmp_path_factory: pytest.TempPathFactory,
    write_store: MakeStore,
    documents: list[list[int]],
    shards: int,
    max_tokens: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("stores") / "store"
    view = write_store(folder, documents, shards, 100).split("train")
    if data.draw(st.booleans()):
        view = view.sample(data.draw(st.integers(1, len(view))), seed=1)
    pieces = view.pieces(max_tokens)
    whole, cut = everything(view), everything(pieces)
    assert all(piece[-1] == END_ID and END_ID not in piece[:-1] for piece in cut)
    assert sum((piece[:-1] for piece in cut), []) == sum((text[:-1] for text in whole), [])
    counts = [max(1, -(-len(text[:-1]) // (max_tokens - 1))) for text in whole]
    assert len(pieces) == sum(counts) and pieces.num_tokens == sum(map(len, cut))
    labels = view.labels_of(np.arange(len(view)))
    assert pieces.labels_of(np.arange(len(pieces))).tolist() == labels.repeat(counts).tolist()
    # Any pieces, in any order and more than once, are the same ones.
    rows = np.array(data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=20)), np.int64)
    assert pieces.lengths_of(rows).tolist() == [len(cut[row]) for row in rows]
    tokens, lengths = pieces.gather(rows, max_tokens)
    assert [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)] == [cut[r] for r in rows]


def test_pieces_of_a_document_are_of_equal_length(tmp_path: Path, write_store: MakeStore) -> None:
    documents = [[*range(3, 13), END_ID], [3, END_ID], [END_ID]]
    pieces = write_store(tmp_path / "store", documents, 1, 100).split("train").pieces(5)
    assert pieces.lengths_of(np.arange(5)).tolist() == [4, 4, 5, 2, 1]


@settings(max_examples=40, deadline=None)
@given(stores_of_documents, st.integers(1, 3), st.booleans(), st.booleans(), st.data())
def test_parts_are_slices_of_the_documents(
    tmp_path_factory: pytest.TempPathFactory,
    write_store: MakeStore,
    documents: list[list[int]],
    shards: int,
    cut: bool,
    backward: bool,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("stores") / "store"
    view = write_store(folder, documents, shards, 100).split("train")
    view = view.pieces(4) if cut else view
    view = view.reversed() if backward else view
    texts = everything(view)
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9))
    starts = [data.draw(st.integers(0, len(texts[row]))) for row in rows]
    stops = [
        data.draw(st.integers(start, len(texts[row])))
        for row, start in zip(rows, starts, strict=True)
    ]
    arrays = (np.array(values, np.int64) for values in (rows, starts, stops))
    expected = [texts[row][a:b] for row, a, b in zip(rows, starts, stops, strict=True)]
    assert view.gather_parts(*arrays).tolist() == sum(expected, [])


@settings(max_examples=30, deadline=None)
@given(stores_of_documents, st.integers(1, 40))
def test_reversed_documents_are_cut_first_and_end_with_their_end(
    tmp_path_factory: pytest.TempPathFactory,
    write_store: MakeStore,
    documents: list[list[int]],
    max_tokens: int,
) -> None:
    folder = tmp_path_factory.mktemp("stores") / "store"
    view = write_store(folder, documents, 2, 100).split("train")
    rows = np.arange(len(view))
    tokens, lengths = view.reversed().gather(rows, max_tokens, pad_to=45)
    forward, same = view.gather(rows, max_tokens, pad_to=45)
    assert tokens.shape == forward.shape and lengths.tolist() == same.tolist()
    for backward, text, length in zip(tokens, forward, lengths, strict=True):
        assert backward.tolist() == [*text[: length - 1][::-1], END_ID, *text[length:]]
    backward = view.reversed()
    assert backward.num_tokens == view.num_tokens and len(backward) == len(view)
    assert everything(backward.reversed()) == everything(view)
    assert everything(backward.pieces(3)) == everything(view.pieces(3).reversed())
    assert everything(backward.sample(1, 7)) == everything(view.sample(1, 7).reversed())
    assert backward.labels_of(rows).tolist() == view.labels_of(rows).tolist()


@pytest.mark.parametrize("backward", [False, True])
def test_parts_outside_a_document_are_refused(store: TokenStore, backward: bool) -> None:
    view = store.split("train")
    view = view.reversed() if backward else view
    for index, start, stop in ((0, 0, 5), (0, -1, 2), (0, 3, 2), (5, 0, 1)):
        with pytest.raises(IndexError):
            view.gather_parts(*(np.array([x]) for x in (index, start, stop)))


def test_a_sample_is_a_part_chosen_by_its_seed(tmp_path: Path, write_store: MakeStore) -> None:
    documents = [[*range(3, 4 + i), END_ID] for i in range(50)]
    view = write_store(tmp_path / "store", documents, 2, 100).split("train")
    first, again, other = (everything(view.sample(10, seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 10
    assert all(document in documents for document in first)
    assert sorted(everything(view.sample(50, 3))) == sorted(documents)
    assert everything(view.sample(20, 1))[:10] == first
    assert view.sample(10, 1).num_tokens == sum(map(len, first))
    assert everything(view.sample(10, 1).sample(10, 1)) != first
    for wrong in (0, 51):
        with pytest.raises(ValueError, match="there are 50"):
            view.sample(wrong, 0)


def test_a_split_without_documents(tmp_path: Path, write_store: MakeStore) -> None:
    view = write_store(tmp_path / "store", [], 1, 100).split("train")
    for part in (view, view.pieces(5)):
        assert (len(part), part.num_tokens) == (0, 0)
        assert part.gather(np.array([], np.int64), 4)[0].shape == (0, 0)


SHARDS, DOCUMENTS_OF_SHARD, TOKENS_OF_DOCUMENT = 40, 208_000, 240
READ_IN_A_CHILD = """
import sys
import numpy as np
from benchmarks.processes import peak_megabytes, status_megabytes
from data_pipelines.batches.batch_plan import BatchPlan, PackedPlan
from data_pipelines.store.token_store import TokenStore

before = peak_megabytes(), status_megabytes("RssAnon")
view = TokenStore(sys.argv[1]).split("train")
for part in (view, view.pieces(128), view.sample(2_000_000, seed=0)):
    for size in ({"global_batch": 64}, {"tokens_per_batch": 16_000}):
        plan = BatchPlan(part, max_tokens=400, seed=0, **size)
        for step in range(30_000, 30_060):
            part.gather(plan.indices(step), 400)
plan = PackedPlan(view, max_tokens=400, global_batch=64, seed=0, carried=True)
for step in range(30_000, 30_060):
    view.gather_parts(*plan.parts(0, *plan.ranges(step))[1:])
after = peak_megabytes(), status_megabytes("RssAnon")
grew = [round(now - then) for now, then in zip(after, before)]
print(len(view), view.num_tokens, *grew)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_two_billion_tokens_are_read_in_bounded_memory(tmp_path: Path) -> None:
    write_sparse_store(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", READ_IN_A_CHILD, tmp_path], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    documents, tokens, peak_mib, anonymous_mib = map(int, child.stdout.split())
    assert documents == SHARDS * DOCUMENTS_OF_SHARD
    assert tokens == documents * TOKENS_OF_DOCUMENT > 1_990_000_000
    # The peak counts the pages of the files that were touched, all of the offsets (67 MB) among
    # them; the system may take those back.
    print(f"peak {peak_mib} MiB, anonymous {anonymous_mib} MiB above the start")
    assert peak_mib < 300
    assert anonymous_mib < 32


def write_sparse_store(folder: Path) -> None:
    """Writes 4 GB of tokens, all of them holes of the files; real offsets."""
    offsets = np.arange(DOCUMENTS_OF_SHARD + 1, dtype="<i8") * TOKENS_OF_DOCUMENT
    num_tokens = DOCUMENTS_OF_SHARD * TOKENS_OF_DOCUMENT
    sizes = {"tokens": 2 * num_tokens, "offsets": offsets.nbytes, "labels": 4 * DOCUMENTS_OF_SHARD}
    files = {kind: {"bytes": size, "sha256": ""} for kind, size in sizes.items()}
    shards = []
    for number in range(SHARDS):
        name = f"train-{number:05d}-of-{SHARDS:05d}"
        for kind in ("tokens", "labels"):
            with (folder / f"{name}.{kind}").open("wb") as file:
                file.truncate(sizes[kind])
        offsets.tofile(folder / f"{name}.offsets")
        counts = {"examples": DOCUMENTS_OF_SHARD, "tokens": num_tokens}
        shards.append({"name": name, **counts, "files": files})
    split = {name: SHARDS * shards[0][name] for name in ("examples", "tokens")}
    manifest = {
        "format": "warmstate-token-store",
        "version": VERSION,
        "source": "",
        "note": "",
        "num_classes": 2,
        "tokenizer": {"type": "byte"},
        "vocab_size": 1000,
        "vocab_sha256": "",
        "prepare_config": {},
        "vocab_file": {"bytes": 0, "sha256": ""},
        "token_dtype": "uint16",
        "splits": {"train": {**split, "shards": shards}},
    }
    (folder / "vocab.txt").touch()
    (folder / "manifest.json").write_text(json.dumps(with_seal(manifest)))


def test_tokens_are_counted_over_all_documents(store: TokenStore) -> None:
    view = store.split("train", "unsupervised")
    expected = np.bincount(sum(everything(view), []), minlength=9)
    np.testing.assert_array_equal(view.token_counts(9), expected)


def test_documents_are_counted_by_the_words_that_they_have(store: TokenStore) -> None:
    view = store.split("train", "unsupervised")
    expected = np.bincount(sum((sorted(set(words)) for words in everything(view)), []), minlength=9)
    np.testing.assert_array_equal(view.document_counts(9), expected)
