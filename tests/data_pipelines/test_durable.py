import hashlib
import threading
from pathlib import Path

import pytest

from data_pipelines import durable
from data_pipelines.durable import write_file, write_folder


def test_a_file_is_written_whole_with_its_digest(tmp_path: Path) -> None:
    entry = write_file(tmp_path / "a", [b"one ", b"", b"two"])
    assert (tmp_path / "a").read_bytes() == b"one two"
    assert entry == {"bytes": 7, "sha256": hashlib.sha256(b"one two").hexdigest()}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_file(tmp_path / "a", [b"old"])

    def blocks():
        yield b"new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_file(tmp_path / "a", blocks())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_reader_never_misses_a_folder_that_is_replaced(tmp_path: Path) -> None:
    folder, new, over = tmp_path / "bundle", tmp_path / "bundle.new", threading.Event()
    write_folder(new, folder, {"a": b"0"})
    missing = []

    def read() -> None:
        while not over.is_set():
            try:
                (folder / "a").stat()
            except FileNotFoundError as error:
                missing.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        write_folder(new, folder, {"a": str(number).encode()})
    over.set()
    reader.join()
    assert not missing
    assert (folder / "a").read_bytes() == b"199"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_without_the_exchange_a_cut_off_replacement_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_exchanged", lambda one, other: False)
    folder, new = tmp_path / "bundle", tmp_path / "bundle.new"
    for text in (b"one", b"two"):
        write_folder(new, folder, {"a": text})
        assert (folder / "a").read_bytes() == text
    folder.rename(tmp_path / ".bundle.replaced")  # killed between the two renames

    def full_disk() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_folder(new, folder, {"a": b"three"}, pause=full_disk)
    assert (folder / "a").read_bytes() == b"two"
    write_folder(new, folder, {"a": b"three"})
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_user_s_copy_under_a_similar_name_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "new", tmp_path / "encoder.old", {"a": b"kept by a person"})
    write_folder(tmp_path / "new", tmp_path / "encoder", {"a": b"one"})
    write_folder(tmp_path / "new", tmp_path / "encoder", {"a": b"two"})
    assert (tmp_path / "encoder.old" / "a").read_bytes() == b"kept by a person"


def test_a_writer_with_time_pauses_after_every_piece(tmp_path: Path) -> None:
    pauses = []
    part = bytes(range(256)) * (durable.PIECE_BYTES // 100)
    durable.write_new(tmp_path / "a", [b"head", part], lambda: pauses.append(1))
    assert (tmp_path / "a").read_bytes() == b"head" + part
    assert len(pauses) == 1 + -(-len(part) // durable.PIECE_BYTES)
