"""Workers of one machine do not share a GPU."""

import json
from pathlib import Path

import pytest

from launch.local import gpus, workers


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with four GPUs, and files beside them that are none."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)


def test_workers_get_equal_parts(four: None) -> None:
    found = workers.worker_environments(2, {})
    assert [each[gpus.VARIABLE] for each in found] == ["0,1", "2,3"]
    assert [json.loads(each["TF_CONFIG"])["task"]["index"] for each in found] == [0, 1]
    assert gpus.note(2, {}) == ""


def test_no_gpu_is_in_two_parts(four: None) -> None:
    found = [each[gpus.VARIABLE] for each in workers.worker_environments(3, {})]
    assert found == ["0", "1", "2"]
    assert gpus.note(3, {}).startswith("GPUs: 1 are not used")


def test_a_single_worker_and_horovods_see_all(four: None) -> None:
    assert gpus.VARIABLE not in workers.worker_environments(1, {})[0]
    assert gpus.VARIABLE not in workers.worker_environments(2, {}, rendezvous_port=7)[0]


@pytest.mark.parametrize(
    ("value", "seen"), [("2,0", ["2", "0"]), ("GPU-a, GPU-b,-1,3", ["GPU-a", "GPU-b"]), ("", [])]
)
def test_the_user_s_choice_is_divided(four: None, value: str, seen: list[str]) -> None:
    environ = {gpus.VARIABLE: value}
    assert gpus.visible(environ) == seen
    expected = [{gpus.VARIABLE: name} for name in seen] or [{}, {}]
    assert gpus.shares(2, environ) == expected


def test_more_workers_than_gpus_are_refused(four: None) -> None:
    assert gpus.faults(4, {}) == []
    (fault,) = gpus.faults(5, {})
    assert fault.startswith("--workers=5: each needs a GPU, and this machine shows 4")
    assert gpus.faults(5, {gpus.VARIABLE: "-1"}) == []
