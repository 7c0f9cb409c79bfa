import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import durable
from data_pipelines.errors import InputError
from tests import forked
from tests.fuzzing import EDITS, FUZZ, edited
from tests.integration import damage
from trainer import safe_files
from trainer.models import bundle
from trainer.safe_files import DamagedError
from trainer.training import checkpoint

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.array(5, np.int64),
    "none": np.zeros((0, 4), np.float16),
    "flags": np.array([True, False]),
}


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    durable.write_new(path, safe_files.tensor_parts(TENSORS))
    read = safe_files.read_tensors(path, json.loads(json.dumps(safe_files.specs(TENSORS))))
    assert read.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()
    for name, array in safetensors.numpy.load_file(path).items():  # others read it as well
        assert (array.dtype, array.tobytes()) == (TENSORS[name].dtype, TENSORS[name].tobytes())
    with pytest.raises(FileExistsError):
        durable.write_new(path, [b""])


def test_tensors_in_another_order_of_their_bytes_are_written_in_order(tmp_path: Path) -> None:
    turned = {"a": TENSORS["a"].T, "part": np.arange(10.0)[::3]}
    (tmp_path / "x").write_bytes(b"".join(map(bytes, safe_files.tensor_parts(turned))))
    read = safe_files.read_tensors(tmp_path / "x", safe_files.specs(turned))
    assert all(np.array_equal(read[name], turned[name]) for name in turned)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry()}, bytes(7), "asks for 8 bytes; it has 7"),
        ({"a": entry()}, bytes(9), "asks for 8 bytes; it has 9"),
        ({"a": entry(offsets=(0, 4))}, bytes(4), "4 bytes for a shape of [2]"),
        ({"a": entry(shape=[2**62, 2**62])}, bytes(8), "8 bytes for a shape"),
        ({"a": entry(shape=[-2])}, bytes(8), "shape [-2]"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "shape [True, 2]"),
        ({"a": entry(shape=[2.0])}, bytes(8), "shape [2.0]"),
        ({"a": entry(shape="22")}, bytes(8), "shape 22"),
        ({"a": entry("PICKLE")}, bytes(8), "'PICKLE'"),
        ({"a": entry(["F32"])}, bytes(8), "TypeError"),
        ({"a": [1]}, bytes(8), "TypeError"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlap"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "leave a gap"),
        ({"\ud800": entry()}, bytes(8), "UnicodeEncodeError"),
        ({"b": entry()}, bytes(8), "tensor 'a' is not there and should be"),
        ({"a": entry("I32")}, bytes(8), "tensor 'a' is ['int32', [2]] and should be"),
        ([], b"", "no JSON object"),
        (b"{" * 5, b"", "no JSON"),
        (b"[" * 500_000, b"", "no JSON"),
        (b"\xff\xfe", b"", "no JSON"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header, data: bytes, says: str) -> None:
    path = write(tmp_path / "x", header, data)
    with pytest.raises(DamagedError) as error:
        safe_files.read_tensors(path, {"a": ["float32", [2]]})
    assert says in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "shape", [[0, 2**62], [2**62, 0], [0, 2**63], [0, 10**30], [1] * 65, [0] * 33]
)
def test_absurd_shapes_are_damage(tmp_path: Path, shape: list[int]) -> None:
    """Also where the caller expects them: encoder.json comes from the same stranger."""
    size = 4 * math.prod(shape)
    path = write(tmp_path / "x", {"a": entry(shape=shape, offsets=(0, size))}, bytes(size))
    with pytest.raises(DamagedError, match="'a': ValueError: a shape of"):
        safe_files.read_tensors(path, {"a": ["float32", shape]})


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_a_header_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(DamagedError, match="is damaged: its header would have"):
        safe_files.read_tensors(tmp_path / "x", {})


def test_text_replaces_a_planted_link_and_leaves_equal_files_alone(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "config.json"
    victim.write_text("of somebody else")
    for text in ("one", "two"):
        (tmp_path / "config.json.new").symlink_to(victim)
        safe_files.replace_text(path, text)
        assert (path.read_text(), path.is_symlink()) == (text, False)
    before = path.stat()
    safe_files.replace_text(path, "two")
    assert path.stat() == before
    path.unlink()
    path.symlink_to(victim)
    safe_files.replace_text(path, "of somebody else")
    assert not path.is_symlink()
    assert victim.read_text() == "of somebody else"
    assert {each.name for each in tmp_path.iterdir()} == {"victim", "config.json"}


LARGE = """
import sys
from pathlib import Path
from benchmarks.processes import peak_megabytes
from trainer import safe_files

before = peak_megabytes()
for name, read in (
    ("header", lambda path: safe_files.read_tensors(path, {})),
    ("tensors", lambda path: safe_files.read_tensors(path, {"a": ["float32", [2]]})),
    ("json", safe_files.read_sealed),
    ("vocab", lambda path: safe_files.file_sha256(path, 1 << 20)),
):
    try:
        read(Path(sys.argv[1]) / name)
    except safe_files.DamagedError as error:
        print(error)
print("grew by MiB", round(peak_megabytes() - before))
"""


def test_ten_gigabytes_are_refused_within_little_memory(tmp_path: Path) -> None:
    size = 10 << 30  # sparse: they take no room on the disk
    (tmp_path / "header").write_bytes((size - 8).to_bytes(8, "little"))
    write(tmp_path / "tensors", {"a": entry(shape=[size // 4], offsets=(0, size))})
    for name in ("header", "tensors", "json", "vocab"):
        path = tmp_path / name
        path.touch()
        os.truncate(path, size + (path.stat().st_size if name == "tensors" else 0))
    done = forked.run(
        [sys.executable, "-c", LARGE, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
        timeout=60,
    )
    *faults, grew = done.stdout.splitlines()
    assert len(faults) == 4, done.stderr
    assert "1048576 are allowed" in faults[0]
    assert "should be ['float32', [2]]" in faults[1]
    assert int(grew.split()[-1]) < 32


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(DamagedError, match="not a regular file"):
        safe_files.read_sealed(tmp_path / "x")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "missing", write(tmp_path / "x", b"{")):
        for _ in range(5):
            with pytest.raises(DamagedError):
                safe_files.read_sealed(path)
    assert len(os.listdir("/proc/self/fd")) == before


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=8,
        ),
    )
)
@settings(max_examples=50, deadline=None)
def test_what_is_sealed_is_read(values: dict) -> None:
    path = Path(os.environ["PYTEST_SAFE_FILES"]) / "sealed"
    path.write_bytes(safe_files.sealed(values))
    expected = json.loads(json.dumps(values))
    assert repr(safe_files.read_sealed(path)) == repr(expected)  # repr: nan is not nan


@pytest.fixture(autouse=True)
def folder_for_hypothesis(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    monkeypatch.setenv("PYTEST_SAFE_FILES", str(tmp_path_factory.mktemp("hypothesis")))


# Fuzzing: bytes of a good file changed at random, or JSON values replaced and sealed again.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    damage.make_checkpoints(folder)
    damage.make_bundle(folder, "classifier")
    return folder


def read_both(folder: Path, expect_success: bool) -> None:
    for read in (
        lambda: bundle.load(folder / "classifier", "classifier", "--classifier"),
        lambda: checkpoint.read(folder / "checkpoints" / "step-00000002"),
    ):
        try:
            read()
        except (InputError, DamagedError):
            assert not expect_success


@FUZZ
@given(
    st.sampled_from(["classifier.json", "classifier.safetensors", "vocab.txt", "state.json",
                     "state.safetensors"]),
    EDITS,
)  # fmt: skip
def test_changed_bytes_give_only_the_named_errors(good: Path, name: str, edits: list) -> None:
    path = next(good.glob(f"c*/{name}"), None) or good / "checkpoints" / "step-00000002" / name
    before = path.read_bytes()
    after = edited(before, edits)
    path.write_bytes(after)
    try:
        read_both(good, expect_success=says_the_same(name, before, after))
        if not says_the_same(name, before, after):
            with pytest.raises((InputError, DamagedError)):
                read_one(good, name)
    finally:
        path.write_bytes(before)


def says_the_same(name: str, before: bytes, after: bytes) -> bool:
    """Returns whether two files hold the same: of JSON, white space does not count."""
    if not name.endswith(".json"):
        return before == after
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def read_one(folder: Path, name: str) -> None:
    if name.startswith("state"):
        checkpoint.read(folder / "checkpoints" / "step-00000002")
    else:
        bundle.load(folder / "classifier", "classifier", "--classifier")


@FUZZ
@given(st.sampled_from(["classifier.json", "state.json"]), st.data())
def test_other_values_with_a_right_checksum_give_only_the_named_errors(
    good: Path, name: str, data: st.DataObject
) -> None:
    path = next(good.glob(f"c*/{name}"), None) or good / "checkpoints" / "step-00000002" / name
    before = path.read_bytes()
    values = safe_files.read_sealed(path)
    inner = values
    while True:  # a value at some depth
        key = data.draw(st.sampled_from(sorted(inner)))
        if not (isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans())):
            break
        inner = inner[key]
    inner[key] = data.draw(VALUES)
    path.write_bytes(safe_files.sealed(values))
    try:
        read_both(good, expect_success=False)
    finally:
        path.write_bytes(before)


@FUZZ
@given(st.sampled_from(["dtype", "shape", "data_offsets"]), VALUES)
def test_other_headers_give_only_the_named_errors(good: Path, field: str, value: object) -> None:
    path = good / "classifier" / "classifier.safetensors"
    before = path.read_bytes()
    size = int.from_bytes(before[:8], "little")
    header = json.loads(before[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name][field] = value
    write(path, header, before[8 + size :])
    try:
        read_both(good, expect_success=False)
    finally:
        path.write_bytes(before)
