import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.store.store_writer import finish_store, write_shard
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers.vocabulary import digest, lines_bytes

VOCAB = lines_bytes(["a", "b", "c"])
FACTS = {
    "source": "random",
    "note": "",
    "num_classes": 2,
    "tokenizer": {"type": "word", "lowercase": True},
    "vocab_size": 6,
    "vocab_sha256": digest({"type": "word", "lowercase": True}, VOCAB),
    "prepare_config": {},
}


def test_shards_become_a_store_without_what_else_lies_there(tmp_path: Path) -> None:
    building = tmp_path / "building"
    building.mkdir()
    blocks = [np.array([3, 2, 4]), np.array([5, 2])]
    entry = write_shard(
        building,
        "train-00000-of-00001",
        blocks,
        np.array([2, 3]),
        np.array([1, -1]),
        np.dtype("<u2"),
    )
    (building / "train-00000-of-00001.json").write_text(json.dumps(entry))
    (building / ".0.partial").touch()
    finish_store(building, tmp_path / "store", VOCAB, FACTS, {"train": [entry]}, {"train": 7})
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    store = TokenStore(tmp_path / "store")
    store.verify()
    assert store.manifest["splits"]["train"]["bad_examples"] == 7
    assert store.split("train").labels_of(np.arange(2)).tolist() == [1, -1]
    tokens, lengths = store.split("train").gather(np.arange(2), 9)
    assert tokens.tolist() == [[3, 2, 0], [4, 5, 2]] and lengths.tolist() == [2, 3]
    assert len(list(store.folder.iterdir())) == 5


def test_lengths_that_do_not_fit_the_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train-00000-of-00001"):
        write_shard(
            tmp_path,
            "train-00000-of-00001",
            [np.array([3, 2])],
            np.array([3]),
            np.array([0]),
            np.dtype("<u2"),
        )
