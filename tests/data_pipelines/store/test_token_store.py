import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID
from data_pipelines.store.manifest import token_dtype
from data_pipelines.store.seal import SEAL, with_seal
from data_pipelines.store.token_store import TokenStore
from tests.fuzzing import FUZZ

MakeStore = Callable[..., TokenStore]


def test_properties(store: TokenStore) -> None:
    assert store.splits == ("train", "test", "unsupervised")
    assert (store.vocab_size, store.num_classes, store.note) == (6, 2, "made by a test")
    assert store.class_names == ("0", "1")  # it was made without names
    assert store.vocab_path.read_text() == "<pad>\n<unk>\n<eos>\na\nc\nb\n"
    assert store.tokenizer_config == {"type": "word", "lowercase": True}
    assert store.manifest["splits"]["train"]["examples"] == 5
    assert store.manifest["splits"]["train"]["tokens"] == 15
    assert len(store.manifest["splits"]["train"]["shards"]) == 3
    assert store.manifest["token_dtype"] == "uint16"
    store.verify()


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


def test_faults_of_files_are_reported_together(store: TokenStore) -> None:
    for name in ("test-00000-of-00001.tokens", "train-00000-of-00003.labels"):
        (store.folder / name).unlink()
    with pytest.raises(InputError) as error:
        TokenStore(store.folder)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["vocab.txt", "manifest.json", "train-00001-of-00003.offsets"])
def test_links_are_refused(store: TokenStore, tmp_path: Path, name: str) -> None:
    (store.folder / name).rename(tmp_path / "elsewhere")
    (store.folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name} is a link"):
        TokenStore(store.folder)


def overwrite(store: TokenStore, name: str, place: int, value: int) -> None:
    """Changes one number of a file, and its checksum in the manifest."""
    path = store.folder / name
    dtype = {"tokens": "<u2", "offsets": "<i8", "labels": "<i4"}[path.suffix[1:]]
    numbers = np.frombuffer(path.read_bytes(), dtype).copy()
    numbers[place] = value
    path.write_bytes(numbers.tobytes())
    manifest = store.manifest
    for shard in manifest["splits"]["train"]["shards"]:
        if shard["name"] == path.stem:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shard["files"][path.suffix[1:]]["sha256"] = digest
    write_sealed(store.folder, manifest)


def write_sealed(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest whose own checksum is right."""
    manifest.pop(SEAL, None)
    (folder / "manifest.json").write_text(json.dumps(with_seal(manifest)))


@pytest.mark.parametrize(("place", "value"), [(0, 1), (2, 4), (2, 2**62)])
def test_offsets_that_do_not_span_the_tokens_are_found_at_once(
    store: TokenStore, place: int, value: int
) -> None:
    overwrite(store, "train-00000-of-00003.offsets", place, value)
    with pytest.raises(InputError, match="train-00000-of-00003.offsets is damaged"):
        TokenStore(store.folder)


@pytest.mark.parametrize(
    ("kind", "place", "value", "message"),
    [
        ("tokens", 1, 6, "has ids from 2 to 6; the manifest allows 1 to 5"),
        ("tokens", 0, 0, "has ids from 0 to"),
        ("tokens", 3, 3, "has a document without an end token"),
        ("offsets", 1, 0, "has offsets that do not rise"),
        ("offsets", 1, 2**62, "has offsets that do not rise"),
        ("offsets", 1, -5, "has offsets that do not rise"),
        ("labels", 0, 2, "has labels from 0 to 2; the manifest allows -1 to 1"),
        ("labels", 0, -2, "has labels from -2 to 0; the manifest allows -1 to 1"),
    ],
)
def test_verify_finds_what_the_checksums_do_not(
    store: TokenStore, kind: str, place: int, value: int, message: str
) -> None:
    overwrite(store, f"train-00000-of-00003.{kind}", place, value)
    with pytest.raises(InputError) as error:
        TokenStore(store.folder).verify()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("value", "document"), [(2**40, 0), (0, 0), (-5, 0), (-5, 1)])
def test_reading_through_damaged_offsets_is_an_input_error(
    store: TokenStore, value: int, document: int
) -> None:
    overwrite(store, "train-00000-of-00003.offsets", 1, value)
    view = TokenStore(store.folder).split("train")
    for read in (view.lengths_of, lambda rows: view.gather(rows, 9)):
        with pytest.raises(InputError, match="train-00000-of-00003.offsets is damaged"):
            read(np.array([document]))
    with pytest.raises(InputError, match="damaged"):
        view.pieces(5)


def test_verify_reads_in_parts(
    tmp_path: Path, write_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [[3 + j % 90 for j in range(i % 17)] + [END_ID] for i in range(200)]
    store = write_store(tmp_path / "store", documents, 2, 100)
    monkeypatch.setattr("data_pipelines.store.verification.READ_BYTES", 64)
    store.verify()
    # The eighth offset is the first of the second part.
    overwrite(store, "train-00000-of-00002.offsets", 8, 3)
    with pytest.raises(InputError, match="00000-of-00002.offsets has offsets that do not rise"):
        TokenStore(store.folder).verify()
    store = write_store(tmp_path / "other", documents, 2, 100)
    overwrite(store, "train-00001-of-00002.tokens", -1, 99)
    with pytest.raises(InputError, match="00001-of-00002.tokens has a document without an end"):
        TokenStore(store.folder).verify()


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
        (["version"], 3),
        (["vocab_size"], "6"),
        (["vocab_size"], 70_000),
        (["splits", "train", "tokens"], 14),
        (["splits", "train", "shards", 0, "name"], "../train-00000-of-00003"),
        (["splits", "train", "shards", 0, "examples"], 3),
        (["splits", "train", "shards", 0, "files"], {}),
        (["splits", "train"], None),
        (["splits", "train", "shards"], {}),
        (["splits", "train", "shards", 0], "train-00000-of-00003"),
        (["splits", "train", "shards", 0, "examples"], True),
        (["splits", "train", "shards", 0, "tokens"], -1),
        (["splits", "../other"], {"examples": 0, "tokens": 0, "shards": []}),
        (["vocab_file"], "vocab.txt"),
        (["num_classes"], 2.5),
        (["class_names"], "neg, pos"),
        (["class_names"], ["neg", 1]),
        (["class_names"], ["neg", "pos", "so-so"]),
        (["label_sets"], []),
        (["label_sets"], [[0], 1]),
        (["label_sets"], [[0], [9]]),
        (["label_sets"], [[True]]),
        (["num_classes"], 2**40),
        (["vocab_size"], True),
        (["tokenizer"], {"type": "letters"}),
        (["tokenizer"], {"type": "word"}),
        (["tokenizer"], {"type": "word", "lowercase": 1}),
        (["splits", "train", "shards", 0, "tokens"], 2**63),
    ],
)
def test_damaged_manifest_is_named(store: TokenStore, path: list, value: object) -> None:
    manifest = json.loads((store.folder / "manifest.json").read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    write_sealed(store.folder, manifest)
    with pytest.raises(InputError, match="manifest.json"):
        TokenStore(store.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": {"type": "word", "lowercase": False}}, "is not the vocabulary of"),
        ({"tokenizer": {"type": "byte"}}, "not the vocabulary of bytes"),
        ({"vocab_sha256": "0" * 64}, "is not the vocabulary of"),
        ({"vocab_size": 7}, "has 6 lines; the manifest says 7"),
        ({"splits": "dev"}, "has no documents in its split dev"),
    ],
)
def test_verify_finds_what_would_fail_when_the_store_is_used(
    store: TokenStore, change: dict, message: str
) -> None:
    manifest = store.manifest | change
    if "splits" in change:
        empty = {"examples": 0, "tokens": 0, "bad_examples": 0, "shards": []}
        manifest["splits"] = store.manifest["splits"] | {"dev": empty}
    write_sealed(store.folder, manifest)
    with pytest.raises(InputError, match=message):
        TokenStore(store.folder).verify()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\na\nb\n", "vocabulary line 5: 'a' is repeated"),
        ("a\nb c\nd\n", "vocabulary line 5: 'b c' is empty or holds white space"),
    ],
)
def test_verify_finds_a_vocabulary_that_no_tokenizer_takes(
    store: TokenStore, lines: str, message: str
) -> None:
    data = ("<pad>\n<unk>\n<eos>\n" + lines).encode()
    store.vocab_path.write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_sealed(store.folder, store.manifest | {"vocab_file": entry})
    with pytest.raises(InputError, match=message):
        TokenStore(store.folder).verify()


def test_a_manifest_has_a_checksum_of_its_own(store: TokenStore) -> None:
    path = store.folder / "manifest.json"
    path.write_text(path.read_text().replace("made by a test", "made by a text"))
    with pytest.raises(InputError, match=f"{SEAL} does not match: prepare the store again"):
        TokenStore(store.folder)
    manifest = json.loads(path.read_text())
    del manifest[SEAL]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"has no '{SEAL}'"):
        TokenStore(store.folder)


def test_a_manifest_that_is_too_large_is_not_read(store: TokenStore) -> None:
    with (store.folder / "manifest.json").open("r+b") as file:
        file.truncate(10 << 30)  # takes no room
    with pytest.raises(InputError, match="has 10737418240 bytes, more than"):
        TokenStore(store.folder)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udcff"])
def test_manifest_that_is_not_json_is_named(store: TokenStore, text: str) -> None:
    (store.folder / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match="manifest.json cannot be read"):
        TokenStore(store.folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def change_manifest(folder: Path, data: st.DataObject) -> None:
    """Replaces, removes or adds something anywhere in the manifest."""
    manifest: Any = json.loads((folder / "manifest.json").read_text())
    place = manifest
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if isinstance(place[key], int) and data.draw(st.booleans()):
        place[key] += data.draw(st.integers(-3, 3))
    elif data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(json_values)
    if data.draw(st.booleans()):
        write_sealed(folder, manifest)
    else:
        (folder / "manifest.json").write_text(json.dumps(manifest))


def change_file(folder: Path, data: st.DataObject) -> None:
    """Cuts, lengthens or changes a file, or puts something else in its place."""
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    kind = data.draw(st.sampled_from(["cut", "longer", "byte", "link", "folder", "number"]))
    path.unlink()
    if kind == "link":
        path.symlink_to(folder / "manifest.json")
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "longer":
        path.write_bytes(content + b"\x00" * 8)
    else:
        new = data.draw(st.binary(min_size=1, max_size=1 if kind == "byte" else 8))
        content[place : place + len(new)] = new
        path.write_bytes(content)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory, write_store: MakeStore) -> Path:
    documents = [[3, 4, END_ID], [END_ID], [5, END_ID], [6, 7, 8, 9, END_ID], [3, END_ID]]
    folder = tmp_path_factory.mktemp("undamaged") / "store"
    write_store(folder, documents, 2, 10)
    return folder


@pytest.mark.seconds
@FUZZ
@given(st.data())
def test_no_damage_ends_in_anything_but_an_input_error(
    undamaged: Path, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "store"
        shutil.copytree(undamaged, folder)
        changes = data.draw(st.sampled_from([[change_manifest], [change_file], []]))
        for change in changes or [change_manifest, change_file]:
            change(folder, data)
        try:
            store = TokenStore(folder)
            view = store.split(*store.splits)
            rows = np.arange(len(view))
            for part in (view, view.pieces(3)):
                part.gather(np.arange(len(part)), 3)
                part.gather_parts(rows, 0 * rows, view.lengths_of(rows) // 2)
                part.labels_of(rows)
            store.verify()
        except InputError:
            return
        assert view.num_tokens == view.lengths_of(rows).sum()
