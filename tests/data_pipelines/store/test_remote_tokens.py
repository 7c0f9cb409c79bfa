"""Stores whose tokens stay at an address: the same batches, read ahead, and what can fail."""

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from data_pipelines import object_store
from data_pipelines.batches.batch_plan import BatchPlan, PackedPlan
from data_pipelines.batches.dataset import REMOTE_BATCHES, make_dataset
from data_pipelines.errors import InputError, TransientError
from data_pipelines.object_store import ObjectStore, StoreError
from data_pipelines.reserved_ids import END_ID
from data_pipelines.store import remote_tokens
from data_pipelines.store.fetch import cache_folder, fetched
from data_pipelines.store.remote_tokens import RemoteTokens
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore

VOCAB_SIZE = 500
SHARDS = 5


@pytest.fixture
def whole(
    write_store: Callable[..., TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TokenStore:
    """Returns a store of 120 documents of 0 to 60 words in 5 shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "RETRY_SECONDS", (0.02, 0.05))
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 61, 120)
    documents = [[*rng.integers(3, VOCAB_SIZE, n).tolist(), END_ID] for n in lengths]
    return write_store(tmp_path / "whole", documents, SHARDS, VOCAB_SIZE)


def index_bytes(store: TokenStore) -> int:
    """Returns the bytes of all files but the manifest and tokens."""
    files = [p for p in store.folder.iterdir() if p.suffix not in (".json", ".tokens")]
    return sum(path.stat().st_size for path in files)


def opened(store: TokenStore, url: str, shards_here: int = 0) -> TokenStore:
    """Returns the store at `url` with so many shards in the cache."""
    shards = store.manifest["splits"]["train"]["shards"][:shards_here]
    size = index_bytes(store) + sum(shard["files"]["tokens"]["bytes"] for shard in shards)
    folder = fetched(url, lambda line: None, size)
    assert len(list(folder.glob("*.tokens"))) == shards_here
    return TokenStore(folder, url)


def views(store: TokenStore) -> list[SplitView]:
    view = store.split("train")
    return [view, view.pieces(7), view.reversed(), view.sample(50, 1), view.reversed().pieces(9)]


@pytest.mark.parametrize("shards_here", [0, 2, SHARDS])
@pytest.mark.parametrize("place", ["file", "http"])
def test_views_are_those_of_the_whole_store(
    whole: TokenStore, web: Callable[..., str], place: str, shards_here: int
) -> None:
    url = f"file://{whole.folder}" if place == "file" else web(whole.folder)
    there = opened(whole, url, shards_here)
    for here, far in zip(views(whole), views(there), strict=True):
        assert far.is_remote == (shards_here < SHARDS)
        assert far.num_tokens == here.num_tokens
        plan = BatchPlan(here, max_tokens=20, seed=2, global_batch=16)
        for step in range(plan.steps_per_epoch):
            for ours, expected in zip(
                far.gather(plan.indices(step), 20), here.gather(plan.indices(step), 20), strict=True
            ):
                np.testing.assert_array_equal(ours, expected)
        assert (far.token_counts(VOCAB_SIZE) == here.token_counts(VOCAB_SIZE)).all()


def numbers(view: SplitView, plan: BatchPlan | PackedPlan, steps: int) -> list[np.ndarray]:
    shards = {"first_shard": 0, "num_local_shards": 1, "num_shards": 1}
    batches = make_dataset(view, plan, start_step=0, stop_step=steps, **shards)
    return [batch["tokens"] for batch in batches.as_numpy_iterator()]


def test_batches_are_read_ahead_side_by_side(
    whole: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reads end only when all of so many are under way."""
    view = opened(whole, f"file://{whole.folder}").split("train")
    read, all_there, lock, count = RemoteTokens.read, threading.Event(), threading.Lock(), [0]

    def read_when_all_are(self: RemoteTokens, ranges: list) -> list:
        with lock:
            count[0] += 1
        if count[0] == REMOTE_BATCHES:
            all_there.set()
        assert all_there.wait(60), f"only {count[0]} reads at once"
        return read(self, ranges)

    monkeypatch.setattr(RemoteTokens, "read", read_when_all_are)
    plan = PackedPlan(view, max_tokens=11, global_batch=3, seed=1, carried=True)
    found = numbers(view, plan, 40)
    here = whole.split("train")
    expected = numbers(
        here, PackedPlan(here, max_tokens=11, global_batch=3, seed=1, carried=True), 40
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(
    ranges=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(0, 99)), min_size=1
    ),
    gap=st.integers(0, 40),
)
def test_ranges_that_are_close_are_read_together(
    tmp_path_factory: pytest.TempPathFactory, ranges: list, gap: int
) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    data = {str(n): np.arange(3, 103, dtype="<u2") + 100 * n for n in range(3)}
    for name, tokens in data.items():
        (folder / f"{name}.tokens").write_bytes(tokens.tobytes())
    asked: list[int] = []
    far = RemoteTokens(f"file://{folder}", np.dtype("<u2"), VOCAB_SIZE, lambda line: None)
    read = far._store.read_ranges
    far._store.read_ranges = lambda merged: asked.append(len(merged)) or read(merged)
    wanted = [(str(name), min(a, b), max(a, b)) for name, a, b in ranges]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_tokens, "MAX_GAP_BYTES", gap)
        found = far.read(wanted)
    for (name, start, stop), tokens in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(tokens, data[name][start:stop])
    assert sum(asked) <= len({each for each in wanted if each[1] < each[2]})


def test_a_bound_below_the_index_is_refused_with_its_size(whole: TokenStore) -> None:
    url, size = f"file://{whole.folder}", index_bytes(whole)
    with pytest.raises(InputError, match=f"cache_bytes={size - 1} is too small.* {size} bytes"):
        fetched(url, print, size - 1)
    folder = fetched(url, print, size)
    assert TokenStore(folder, url).shards_elsewhere == SHARDS
    assert sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".json") == size
    assert folder.parent == cache_folder(f"stores-{size}")


def test_without_an_address_missing_tokens_are_a_fault(whole: TokenStore) -> None:
    there = opened(whole, f"file://{whole.folder}", 4)
    with pytest.raises(InputError, match="train-00004-of-00005.tokens is missing"):
        TokenStore(there.folder)
    with pytest.raises(InputError, match="--verify reads whole files, and 1 of the store's"):
        there.verify()


def test_another_file_there_is_noticed(whole: TokenStore) -> None:
    view = opened(whole, f"file://{whole.folder}").split("train")
    for path in whole.folder.glob("*.tokens"):  # the ends of documents are elsewhere
        path.write_bytes(path.read_bytes()[2:] + path.read_bytes()[:2])
    with pytest.raises(InputError, match="tokens is not the one that its manifest names"):
        view.gather(np.arange(len(view)), 100)
    for path in whole.folder.glob("*.tokens"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="it was cut off"):
        view.gather(np.arange(len(view)), 100)
    shutil.rmtree(whole.folder)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        view.gather(np.arange(len(view)), 100)


def test_a_server_without_ranges_is_named(
    whole: TokenStore, web: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = web(whole.folder)
    view = opened(whole, url).split("train")
    whole_file = lambda self, ranges: [self.read(name) for name, _, _ in ranges]  # noqa: E731
    monkeypatch.setattr(ObjectStore, "read_ranges", whole_file)
    with pytest.raises(InputError, match="the server does not answer requests for ranges"):
        view.gather(np.arange(3), 100)


def test_a_store_that_fails_is_asked_again_and_then_the_run_may_restart(
    whole: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lines = opened(whole, f"file://{whole.folder}").folder, []
    there = TokenStore(folder, f"file://{whole.folder}", lines.append)
    view, answers = there.split("train"), iter([False, False, True])
    read = ObjectStore.read_ranges

    def fails_twice(store: ObjectStore, ranges: Sequence) -> list[bytes]:
        if not next(answers, False):
            raise StoreError("SlowDown")
        return read(store, ranges)

    monkeypatch.setattr(ObjectStore, "read_ranges", fails_twice)
    assert view.gather(np.arange(3), 100)[0].any() and there.remote and not there.remote.fault
    monkeypatch.setattr(remote_tokens, "RETRY_SECONDS", 0.1)
    with pytest.raises(TransientError, match=f"--store=file://{whole.folder} cannot be read: Slow"):
        view.gather(np.arange(3), 100)
    assert isinstance(there.remote.fault, TransientError)
    assert len(lines) == 2 and all("SlowDown); trying again" in line for line in lines)
    with pytest.raises(TransientError):  # the same failure
        view.gather(np.arange(3), 100)
    assert len(lines) == 2
