"""Labelled and unlabelled rows in one batch, whatever the number of shards."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.batches.batch_plan import BatchPlan
from data_pipelines.prepare import PrepareConfig, build_store
from data_pipelines.sources import Example
from data_pipelines.store.token_store import TokenStore
from tests.conftest import SomeReviews
from trainer.stages.finetune_batches import FinetuneBatches
from trainer.training.run import StoreBatches

MAX_TOKENS = 20


class HalfLabelled(SomeReviews):
    """A `Source`: as its base, and the training reviews again without their labels."""

    splits = ("train", "validation", "test", "unsupervised")

    def examples(self, split: str, part: str) -> Iterator[Example]:
        """Yields reviews of both labels in turn, or of none."""
        if split != "unsupervised":
            yield from super().examples(split, part)
            return
        for example in super().examples("train", part):
            yield Example(f"unlabelled {example.id}", example.text, None)


@pytest.fixture(scope="session")
def half_labelled_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a store with labelled and unlabelled reviews."""
    folder = tmp_path_factory.mktemp("stores") / "half_labelled"
    source = HalfLabelled({"train": 26, "validation": 20, "test": 20})
    build_store(PrepareConfig("movie_reviews", vocab_size=400), source, folder, lambda line: None)
    return folder


def batches(store: TokenStore, rank: int, size: int, local: int) -> FinetuneBatches:
    distributor = SimpleNamespace(rank=rank, num_local_shards=local, num_shards=size * local)

    def of(split: str, batch_size: int) -> StoreBatches:
        view = store.split(split)
        plan = BatchPlan(view, max_tokens=MAX_TOKENS, global_batch=batch_size, seed=3)
        return StoreBatches(view, plan, distributor, store)

    return FinetuneBatches(of("train", 8), of("unsupervised", 3))


def rows(batch: dict, labelled: bool) -> list[tuple[int, ...]]:
    """Returns the documents of a batch, in order, without padding."""
    wanted = (batch["weights"] > 0) & ((batch["labels"] >= 0) == labelled)
    lengths = batch["lengths"][wanted]
    return [tuple(r[:n].tolist()) for r, n in zip(batch["tokens"][wanted], lengths, strict=True)]


@pytest.mark.parametrize(("size", "local"), [(1, 1), (3, 1), (1, 2), (9, 1)])
def test_shards_share_out_the_same_documents(
    half_labelled_store: Path, size: int, local: int
) -> None:
    store = TokenStore(half_labelled_store)
    steps = 5  # the last batch of an epoch is a small one
    whole = list(batches(store, 0, 1, 1)(0, steps).as_numpy_iterator())
    parts = [
        list(batches(store, r, size, local)(0, steps).as_numpy_iterator()) for r in range(size)
    ]
    sizes = []
    for step, expected in enumerate(whole):
        own = [part[step] for part in parts]
        for labelled in (True, False):
            found = [document for batch in own for document in rows(batch, labelled)]
            # With several local shards the unlabelled rows lie between the labelled ones.
            assert sorted(found) == sorted(rows(expected, labelled))
        for batch in own:
            assert batch["step"] == step
            assert batch["tokens"].shape[1] == expected["tokens"].shape[1]
            assert len(batch["row_starts"]) == local + 1
            assert batch["row_starts"][-1] == len(batch["tokens"]) == len(batch["labels"])
            assert (batch["global_counts"] == expected["global_counts"][0]).all()
        documents = rows(expected, True)
        sizes.append(len(documents))
        counts = [len(documents), len(documents) + len(rows(expected, False))]
        tokens = sum(map(len, documents))
        np.testing.assert_array_equal(expected["global_counts"][0], [*counts, tokens])
    assert min(sizes) < max(sizes) == 8
