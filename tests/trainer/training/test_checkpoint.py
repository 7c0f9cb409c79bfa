import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.errors import InputError
from tests import forked
from trainer import safe_files
from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import Distributor
from trainer.distribution.make import make_distributor
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpointer

ENCODER = {"--encoder": "5e7b"}


class Setup:
    """Two variables and their checkpoints in `folder`."""

    def __init__(self, folder: Path, **settings):
        self.folder = folder
        self.lines: list[str] = []
        self.variables = {
            "weights": keras.Variable(np.arange(6, dtype=np.float32).reshape(2, 3)),
            "steps": keras.Variable(2**40 + 1, dtype="int64"),
        }
        distributor = make_distributor("one_device", Cluster(0, 1), 10)
        self.checkpoints = Checkpointer(
            folder, distributor, self.variables, self.lines.append, **settings
        )

    def save(self, step: int, *args) -> None:
        """Saves and waits until it is done."""
        self.checkpoints.save(step, *args)
        assert self.checkpoints.wait()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "checkpoints")


def test_there_is_nothing_to_restore(setup: Setup) -> None:
    assert setup.checkpoints.restore() is None


def test_what_is_saved_is_restored(setup: Setup) -> None:
    setup.save(7, {"best": 1.5}, {"w": np.ones(2, np.float32)})
    for variable in setup.variables.values():
        variable.assign(variable * 0)
    step, notes, arrays = setup.checkpoints.restore()
    assert (step, notes, arrays["w"].tolist()) == (7, {"best": 1.5}, [1, 1])
    assert setup.variables["weights"].numpy().ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert int(setup.variables["steps"].numpy()) == 2**40 + 1


def test_the_newest_two_are_kept(setup: Setup, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        setup.save(step, {})
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000010"]
    assert setup.checkpoints.restore()[0] == 10


def test_as_many_are_kept_as_are_asked_for_in_the_order_of_steps(tmp_path: Path) -> None:
    setup = Setup(tmp_path, keep=3)
    for step in (7, 10**8 - 1, 10**8, 10**8 + 1):  # the last two have a digit more
        setup.save(step, {})
    kept = sorted(int(p.name.removeprefix("step-")) for p in tmp_path.iterdir())
    assert kept == [10**8 - 1, 10**8, 10**8 + 1]
    assert setup.checkpoints.restore()[0] == 10**8 + 1


def test_the_best_are_kept_besides_the_newest(tmp_path: Path) -> None:
    values = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 9.0, 7: None}

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    for step, value in values.items():
        # A new one each time: what is the best survives a restart.
        setup = Setup(tmp_path, keep=1, keep_best=2)
        setup.checkpoints.save(step, {}, None, value)
        assert setup.checkpoints.wait()
    assert names() == ["step-00000002", "step-00000004", "step-00000007"]
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    setup.save(8, {})  # a damaged one is none of the best
    assert names() == ["step-00000004", "step-00000008"]
    assert setup.checkpoints.restore()[0] == 8


def dense_step(variable: keras.Variable) -> None:
    optimizer = keras.optimizers.Adam(1.0)
    optimizer.build([variable])
    step = tf.function(lambda: optimizer.apply([tf.ones((2, 3))], [variable]))
    step()


def sparse_step(variable: keras.Variable) -> None:
    optimizer = keras.optimizers.Adam(1.0)
    optimizer.build([variable])
    gradient = tf.IndexedSlices(tf.ones((1, 3)), tf.constant([1]), tf.constant([2, 3]))
    step = tf.function(lambda: optimizer.apply([gradient], [variable]))
    step()


@pytest.mark.parametrize(
    "change",
    [lambda v: v.assign(np.full((2, 3), 9, np.float32)), dense_step, sparse_step,
     lambda v: v.value.scatter_update(tf.IndexedSlices(tf.ones((1, 3)), tf.constant([1])))],
)  # fmt: skip
def test_what_is_written_is_the_state_at_the_call(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, change: Callable
) -> None:
    may_write, write = threading.Event(), setup.checkpoints._write

    def write_later(*args: object) -> None:
        assert may_write.wait(30)
        write(*args)

    monkeypatch.setattr(setup.checkpoints, "_write", write_later)
    setup.checkpoints.save(1, {})  # returns while the thread waits
    change(setup.variables["weights"])
    assert setup.variables["weights"].numpy().ravel().tolist() != [0, 1, 2, 3, 4, 5]
    may_write.set()
    assert setup.checkpoints.wait()
    setup.checkpoints.restore()
    assert setup.variables["weights"].numpy().ravel().tolist() == [0, 1, 2, 3, 4, 5]


def test_one_write_is_under_way_at_a_time(setup: Setup, tmp_path: Path) -> None:
    for step in range(1, 30):
        setup.checkpoints.save(step, {})
        assert threading.active_count() <= threads_before() + 1
    setup.checkpoints.close()
    newest = tmp_path / "checkpoints" / "step-00000029"
    assert checkpoint.read(newest)[0]["step"] == 29


def threads_before() -> int:
    return sum(not thread.name.startswith("checkpoint") for thread in threading.enumerate())


FAILING_WRITE = """
import sys
import resource
from pathlib import Path
import numpy as np
import tests.conftest
from data_pipelines.errors import InputError
from tests.trainer.training.test_checkpoint import Setup

setup = Setup(Path(sys.argv[1]), errors=sys.argv[2])
setup.save(1, {})
setup.variables["weights"].assign(np.zeros((2, 3)))
# As on a full disk: each write of more than so many bytes of a file fails.
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
for step in (2, 3):
    setup.checkpoints.save(step, {})  # the second raises what the first met
print("trained on", setup.checkpoints.wait(), setup.lines)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
setup.save(4, {})
print([path.name for path in sorted(Path(sys.argv[1]).iterdir())])
"""


@pytest.mark.parametrize("errors", ["stop", "warn"])
def test_a_disk_that_is_full_stops_or_warns_and_the_last_good_one_stays(
    tmp_path: Path, errors: str
) -> None:
    done = forked.run(
        [sys.executable, "-c", FAILING_WRITE, str(tmp_path), errors],
        cwd=Path(__file__).parents[3],
        text=True,
        capture_output=True,
    )
    says = (
        f"the checkpoint of step 2 cannot be written in {tmp_path}: File too large; the last one "
        f"written is {tmp_path / 'step-00000001'}: make room"
    )
    if errors == "stop":
        assert f"InputError: {says}" in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    else:
        assert done.returncode == 0, done.stderr
        assert "trained on False" in done.stdout and f"warning: {says}" in done.stdout
        assert "['step-00000001', 'step-00000004']" in done.stdout
        assert not (tmp_path / "unfinished").exists()
    setup = Setup(tmp_path)
    assert setup.checkpoints.restore()[0] == (1 if errors == "stop" else 4)


def test_a_folder_that_cannot_be_made_is_an_error_at_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    setup = Setup(tmp_path / "file" / "checkpoints")
    setup.checkpoints.save(1, {})
    with pytest.raises(InputError, match="step 1 cannot be written.*there is none yet"):
        setup.checkpoints.save(2, {})


def test_without_a_good_one_nothing_is_renamed_and_all_are_named(
    setup: Setup, tmp_path: Path
) -> None:
    for step in (1, 2):
        setup.save(step, {})
        (tmp_path / f"checkpoints/step-0000000{step}/state.json").unlink()
    for _ in range(2):  # a second try finds the same
        with pytest.raises(InputError, match="no good checkpoint is left") as error:
            setup.checkpoints.restore()
        assert "step-00000001" in str(error.value) and "step-00000002" in str(error.value)


def test_a_damaged_newest_one_is_set_aside_and_the_one_before_is_taken(setup: Setup) -> None:
    for step in (1, 2):
        setup.save(step, {})
    (setup.folder / "step-00000002" / "state.json").write_text("{}")
    names = ["step-00000001", "step-00000002"]
    for before in (2, 3):  # of a replay, which changes nothing
        assert setup.checkpoints.restore(before=before)[0] == 1
        assert sorted(path.name for path in setup.folder.iterdir()) == names and not setup.lines
    assert setup.checkpoints.restore()[0] == 1
    assert sorted(path.name for path in setup.folder.iterdir()) == [names[0], names[1] + ".damaged"]
    (line,) = setup.lines
    assert line.endswith("it is now step-00000002.damaged; trying the one before")


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": {"--store": 7, "--encoder": "5e7b"}},
        {"inputs": ["5e7b"]},
        {"step": 4},
        {"notes": "many"},
        {"format": "another", "format_version": checkpoint.FORMAT_VERSION + 1},
    ],
    ids=str,
)
def test_a_state_that_is_not_one_of_ours_is_damage(setup: Setup, wrong: dict) -> None:
    setup.save(3, {})
    (folder,) = setup.folder.iterdir()
    state = safe_files.read_sealed(folder / "state.json")
    (folder / "state.json").write_bytes(safe_files.sealed(state | wrong))
    with pytest.raises(safe_files.DamagedError, match="is not that of a checkpoint of this name"):
        checkpoint.read(folder)


def test_a_checkpoint_of_another_model_is_no_damage(setup: Setup, tmp_path: Path) -> None:
    setup.save(1, {})
    setup.variables["more"] = keras.Variable(np.zeros(3, np.float32))
    with pytest.raises(InputError, match="of another model: 'more' is not in it"):
        setup.checkpoints.restore()


class TwoWorkers(Distributor):
    """A distributor of two processes as two threads: both must come to every collective."""

    def __init__(self, rank: int, shared: dict):
        super().__init__(rank, size=2)
        self._shared = shared

    def sum_over_processes(self, arrays: list) -> list:
        barrier, mine = self._shared["barrier"], [np.asarray(array) for array in arrays]
        self._shared[self.rank] = mine
        barrier.wait(20)
        total = [a + b for a, b in zip(self._shared[0], self._shared[1], strict=True)]
        barrier.wait(20)
        return total


def test_all_workers_learn_that_the_chief_could_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shared: dict = {"barrier": threading.Barrier(2)}
    raised: list[str] = []

    def work(rank: int) -> None:
        variables = {"w": keras.Variable(np.zeros(2, np.float32))}
        checkpoints = Checkpointer(
            tmp_path / "file" / "sub", TwoWorkers(rank, shared), variables, raised.append
        )
        checkpoints.save(1, {})
        try:
            checkpoints.save(2, {})
        except InputError as error:
            raised.append(str(error))

    workers = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(raised) == 2 and raised[0] == raised[1]
    assert "step 1 cannot be written" in raised[0]


def test_a_save_that_was_cut_off_leaves_the_one_before(setup: Setup, tmp_path: Path) -> None:
    setup.save(1, {})
    unfinished = tmp_path / "checkpoints" / "unfinished"
    unfinished.mkdir()
    (unfinished / "state.safetensors").write_bytes(b"half")
    assert setup.checkpoints.restore()[0] == 1
    setup.save(2, {})
    assert setup.checkpoints.restore()[0] == 2


def test_a_run_that_starts_again_forgets_the_old_checkpoints(setup: Setup) -> None:
    setup.checkpoints.forget()  # there are none
    setup.save(5, {})
    setup.checkpoints.forget()
    assert setup.checkpoints.restore() is None


def test_what_began_with_another_encoder_is_not_gone_on_with(tmp_path: Path) -> None:
    Setup(tmp_path, inputs=ENCODER).save(3, {})
    assert Setup(tmp_path, inputs=ENCODER).checkpoints.restore()[0] == 3
    for same in ({}, ENCODER | {"--backward_encoder": "1d"}):  # of a replay; of another model
        assert Setup(tmp_path, inputs=same).checkpoints.restore()[0] == 3
    other = Setup(tmp_path, inputs={"--encoder": "8a11"})
    with pytest.raises(InputError, match="began with another --encoder than .* 8a11; name"):
        other.checkpoints.restore()


def test_a_checkpoint_that_does_not_say_its_encoder_is_gone_on_with(tmp_path: Path) -> None:
    Setup(tmp_path).save(3, {})
    assert Setup(tmp_path, inputs=ENCODER).checkpoints.restore()[0] == 3


def test_a_run_does_not_continue_with_another_store(tmp_path: Path) -> None:
    Setup(tmp_path, inputs={"--store": "a" * 64}).save(3, {})
    other = Setup(tmp_path, inputs={"--store": "b" * 64})
    with pytest.raises(InputError, match="began with another --store .* was a{12}, and is b{12};"):
        other.checkpoints.restore()


def test_a_checkpoint_of_a_newer_version_is_refused_and_left_alone(setup: Setup) -> None:
    setup.save(3, {})
    (folder,) = setup.folder.iterdir()
    state = safe_files.read_sealed(folder / "state.json")
    newer = state | {"format_version": checkpoint.FORMAT_VERSION + 1}
    (folder / "state.json").write_bytes(safe_files.sealed(newer))
    with pytest.raises(InputError, match="has format 2, of a newer warmstate; this one reads 1"):
        setup.checkpoints.restore()
    assert [path.name for path in setup.folder.iterdir()] == [folder.name]


@pytest.mark.parametrize("failures", [1, checkpoint.READ_TRIES])
def test_an_io_error_is_retried_and_never_taken_for_damage(
    setup: Setup, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.save(3, {})
    left, opens = [failures], os.open

    def flaky(path: Any, *arguments: Any, **settings: Any) -> int:
        if str(path).endswith("state.safetensors") and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return opens(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", flaky)
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", (0.0,) * (checkpoint.READ_TRIES - 1))
    if failures < checkpoint.READ_TRIES:
        assert setup.checkpoints.restore()[0] == 3
    else:
        with pytest.raises(InputError, match="Input/output error, after 4 tries; it may be intact"):
            setup.checkpoints.restore()
    assert [path.name for path in setup.folder.iterdir()] == ["step-00000003"]


def test_a_large_one_is_written_with_pauses_until_somebody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARE_OF_A_CORE", 1e-6)  # a pause takes minutes
    setup = Setup(tmp_path)
    setup.save(1, {})  # a small one needs none
    monkeypatch.setattr(checkpoint, "PACED_BYTES", 0)
    setup.checkpoints.save(2, {})
    setup.checkpoints._thread.join(0.1)
    assert setup.checkpoints._thread.is_alive() and not (tmp_path / "step-00000002").exists()
    assert setup.checkpoints.wait()
    assert setup.checkpoints.restore()[0] == 2


def test_a_pause_leaves_the_writer_its_share_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARE_OF_A_CORE", 0.25)
    began, pace = time.monotonic(), checkpoint._Pace(threading.Event())
    used = time.thread_time()
    while time.thread_time() - used < 0.02:
        pass
    pace()
    assert time.monotonic() - began >= 0.08


NO_DESCRIPTORS = """
import resource, sys
from pathlib import Path
import tests.conftest
from data_pipelines.errors import TransientError
from tests.trainer.training.test_checkpoint import Setup

setup = Setup(Path(sys.argv[1]))
setup.save(1, {})
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
setup.checkpoints.save(2, {})
try:
    setup.checkpoints.wait()
except TransientError as error:
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    print(error)
    print(setup.checkpoints.restore()[0])
"""


def test_too_many_open_files_are_an_error_that_a_restart_may_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_DESCRIPTORS, str(tmp_path)]
    repository = Path(__file__).parents[3]
    done = forked.run(command, cwd=repository, text=True, capture_output=True)
    assert "step 2 cannot be written" in done.stdout, done.stderr
    assert "Too many open files" in done.stdout and done.stdout.endswith("\n1\n")
