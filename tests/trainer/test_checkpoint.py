from pathlib import Path

import keras
import numpy as np
import pytest

from trainer.checkpoint import Checkpointer
from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import make_distributor


class Setup:
    """Two variables and their checkpoints in `folder`."""

    def __init__(self, folder: Path):
        self.lines: list[str] = []
        self.variables = {
            "weights": keras.Variable(np.arange(6, dtype=np.float32).reshape(2, 3)),
            "steps": keras.Variable(2**40 + 1, dtype="int64"),
        }
        distributor = make_distributor("one_device", Cluster(0, 1), 10)
        self.checkpoints = Checkpointer(folder, distributor, self.variables, self.lines.append)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "checkpoints")


def test_there_is_nothing_to_restore(setup: Setup) -> None:
    assert setup.checkpoints.restore() is None


def test_what_is_saved_is_restored(setup: Setup) -> None:
    setup.checkpoints.save(7, {"best": 1.5}, {"w": np.ones(2, np.float32)})
    for variable in setup.variables.values():
        variable.assign(variable * 0)
    step, notes, arrays = setup.checkpoints.restore()
    assert (step, notes, arrays["w"].tolist()) == (7, {"best": 1.5}, [1, 1])
    assert setup.variables["weights"].numpy().ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert int(setup.variables["steps"].numpy()) == 2**40 + 1


def test_the_newest_two_are_kept(setup: Setup, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        setup.checkpoints.save(step, {})
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000010"]
    assert setup.checkpoints.restore()[0] == 10


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["removed", "truncated", "flipped"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(
    setup: Setup, tmp_path: Path, name: str, damage: str
) -> None:
    setup.checkpoints.save(1, {})
    setup.variables["weights"].assign(np.zeros((2, 3)))
    setup.checkpoints.save(2, {})
    path = tmp_path / "checkpoints" / "step-00000002" / name
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2 if name == "state.json" else -1] ^= 0xFF
        path.write_bytes(data)
    assert setup.checkpoints.restore()[0] == 1
    assert setup.variables["weights"].numpy().max() == 5
    assert "step-00000002 is damaged" in setup.lines[0]


def test_a_save_that_was_cut_off_leaves_the_one_before(setup: Setup, tmp_path: Path) -> None:
    setup.checkpoints.save(1, {})
    unfinished = tmp_path / "checkpoints" / "unfinished"
    unfinished.mkdir()
    (unfinished / "state.safetensors").write_bytes(b"half")
    assert setup.checkpoints.restore()[0] == 1
    setup.checkpoints.save(2, {})
    assert setup.checkpoints.restore()[0] == 2


def test_a_run_that_starts_again_forgets_the_old_checkpoints(setup: Setup) -> None:
    setup.checkpoints.forget()  # there are none
    setup.checkpoints.save(5, {})
    setup.checkpoints.forget()
    assert setup.checkpoints.restore() is None
