import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.batches.batch_plan import BatchPlan
from data_pipelines.batches.dataset import make_dataset, read_bucketed
from data_pipelines.errors import InputError
from data_pipelines.prepare import PrepareConfig, contexts, ensure_store
from data_pipelines.store.seal import with_seal
from data_pipelines.store.token_store import TokenStore

# The author of each document, and its number: unknown if it is missing or in no training document.
ROWS = {
    "train": [("bob", 2), ("ann", 1), (None, -1), ("bob", 2), ("", -1), (7, 0), ("zoé", 3)],
    "validation": [("dee", -1), ("bob", 2)],
    "test": [("ann", 1), ("dee", -1), ("zoé", 3)],
}


def write(folder: Path, kind: str) -> str:
    """Writes documents with authors; returns the spec of their source."""
    for split, rows in ROWS.items():
        lines = ["author,label,text"] if kind == "csv" else []
        for number, (author, _) in enumerate(rows):
            record = {"author": author, "label": number % 2, "text": f"good film {number} {split}"}
            if kind == "csv":
                record["author"] = "" if author is None else author
                lines.append(",".join(map(str, record.values())))
            else:
                lines.append(json.dumps(record))
        (folder / f"{split}.{kind}").write_text("\n".join(lines) + "\n")
    return f"{kind}:" + ",".join(f"{split}={folder}/{split}.{kind}" for split in ROWS)


def prepared(folder: Path, source: str, key: str = "author") -> TokenStore:
    config = PrepareConfig(source=source, context_key=key, min_count=1)
    return ensure_store(config, folder / "store", lambda line: None)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return prepared(tmp_path, write(tmp_path, "csv"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_documents_have_the_numbers_of_their_authors(tmp_path: Path, kind: str) -> None:
    store = prepared(tmp_path, write(tmp_path, kind))
    store.verify()
    assert store.context_names == ("7", "ann", "bob", "zoé")
    for split, rows in ROWS.items():
        numbers = [number for _, number in rows]
        assert store.split(split).contexts_of(np.arange(len(rows))).tolist() == numbers
    with pytest.raises(InputError, match="its context_key is author, not not set"):
        prepared(tmp_path, write(tmp_path, kind), key="")


def test_batches_carry_them(store: TokenStore) -> None:
    view = store.split("train")
    plan = BatchPlan(view, max_tokens=20, global_batch=5, seed=0)
    whole = view.contexts_of(plan.indices(0)).tolist()
    shards = [read_bucketed(view, plan, 0, range(i, i + 1), 7) for i in range(7)]
    real = [s["contexts"].tolist() for s in shards if s["weights"].any()]
    assert [number for shard in real for number in shard] == whole
    filler = [s["contexts"].tolist() for s in shards if not s["weights"].any()]
    assert filler == [[-1]] * (7 - len(real)) != []
    (element,) = make_dataset(
        view, plan, start_step=0, stop_step=1, first_shard=0, num_local_shards=1, num_shards=1
    ).as_numpy_iterator()
    assert element["contexts"].tolist() == whole


def test_a_column_of_nothing_or_of_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, "jsonl")
    with pytest.raises(InputError, match=r"has no 'writer' \(--context_key\); it has author"):
        prepared(tmp_path, source, key="writer")
    monkeypatch.setattr(contexts, "MAX_CONTEXTS", 3)
    with pytest.raises(InputError, match="has 4 different values in training documents, more than"):
        prepared(tmp_path, source)
    with pytest.raises(InputError, match="has no use for --context_key=author"):
        prepared(tmp_path, f"text:{tmp_path}/train.jsonl")
    for split, rows in ROWS.items():
        lines = [
            json.dumps({"author": "", "label": i % 2, "text": f"{i}"}) for i in range(len(rows))
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="no training document has a value there"):
        prepared(tmp_path, source)


def test_damage_is_found(store: TokenStore) -> None:
    path = store.folder / "train-00000-of-00001.contexts"
    data = bytearray(path.read_bytes())
    data[0] = 9
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"has contexts from -1 to 9; the manifest allows -1 to 3"):
        store.verify()
    path.write_bytes(data[:-4])
    with pytest.raises(InputError, match="contexts has 24 bytes; the manifest says 28"):
        TokenStore(store.folder)


@pytest.mark.parametrize("names", [["a", "a"], [], "ab", [1]])
def test_wrong_names_in_a_manifest_are_refused(store: TokenStore, names: object) -> None:
    path = store.folder / "manifest.json"
    manifest = {**store.manifest, "context_names": names}
    path.write_text(json.dumps(with_seal(manifest)))
    with pytest.raises(InputError, match="context_names"):
        TokenStore(store.folder)
