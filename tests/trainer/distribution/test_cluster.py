import json

import pytest

from data_pipelines.errors import InputError
from trainer.distribution import cluster as clusters
from trainer.distribution.cluster import Cluster, distributor_faults, resolve


def tf_config(cluster: dict, kind: str, index: int) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def test_no_environment_is_a_single_process() -> None:
    assert resolve({}) == Cluster(0, 1)
    assert resolve({"TF_CONFIG": " "}) == Cluster(0, 1)


def test_workers() -> None:
    cluster = {"worker": ["a:1", "b:2", "c:3"]}
    assert resolve(tf_config(cluster, "worker", 2)) == Cluster(2, 3, ("a:1", "b:2", "c:3"))


def test_a_chief_comes_before_the_workers() -> None:
    cluster = {"chief": ["a:1"], "worker": ["b:2"]}
    assert resolve(tf_config(cluster, "chief", 0)).rank == 0
    assert resolve(tf_config(cluster, "worker", 0)).rank == 1


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"TF_CONFIG": "{"}, "cannot be used"),
        ({"TF_CONFIG": "[]"}, "cannot be used"),
        ({"TF_CONFIG": '{"task": {"type": "worker", "index": 0}}'}, "cannot be used"),
        (tf_config({"worker": ["a:1"]}, "worker", 1), "only 1 workers"),
        (tf_config({"worker": ["a:1"]}, "worker", -1), "only 1 workers"),
        (tf_config({"worker": ["a:1"]}, "ps", 0), "'ps'"),
        ({"HOROVOD_RANK": "0"}, "HOROVOD_RANK='0'"),
        ({"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2"}, "0 <= rank < size"),
        ({"HOROVOD_RANK": "one", "HOROVOD_SIZE": "2"}, "HOROVOD_RANK='one'"),
        (
            {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}
            | tf_config({"worker": ["a:1"]}, "worker", 0),
            "TF_CONFIG and HOROVOD_RANK, HOROVOD_SIZE are both set",
        ),
    ],
)
def test_an_environment_that_is_half_there(environ: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve(environ)


def test_horovod() -> None:
    environ = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "3", "TF_CONFIG": ""}
    assert resolve(environ) == Cluster(1, 3, horovod=True)


ALONE, BY_TF_CONFIG, BY_HOROVOD = (
    Cluster(0, 1),
    Cluster(0, 2, ("a:1", "b:2")),
    Cluster(0, 2, (), True),
)


@pytest.mark.parametrize(
    ("kind", "cluster", "says"),
    [
        ("multi_worker", BY_HOROVOD, "use --distributor=horovod or unset HOROVOD_SIZE"),
        ("mirrored", BY_HOROVOD, "runs in one process, but HOROVOD_SIZE names 2 workers"),
        ("one_device", BY_TF_CONFIG, "use --distributor=multi_worker or unset TF_CONFIG"),
        ("horovod", BY_TF_CONFIG, "launch.main --distributor=horovod (before the --)"),
    ],
)
def test_a_distributor_that_does_not_fit(
    kind: str, cluster: Cluster, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "has_horovod", lambda: True)
    (fault,) = distributor_faults(kind, cluster)
    assert says in fault


def test_distributors_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "has_horovod", lambda: True)
    fitting = [
        *((kind, ALONE) for kind in ("auto", "one_device", "mirrored", "multi_worker", "horovod")),
        *((kind, BY_TF_CONFIG) for kind in ("auto", "multi_worker")),
        *((kind, BY_HOROVOD) for kind in ("auto", "horovod")),
    ]
    assert not [each for each in fitting if distributor_faults(*each)]


@pytest.mark.parametrize(("kind", "cluster"), [("horovod", ALONE), ("auto", BY_HOROVOD)])
def test_without_horovod_one_line_says_how_to_get_it(
    kind: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "has_horovod", lambda: False)
    assert distributor_faults(kind, cluster) == [
        "--distributor=horovod: Horovod is not installed; `make horovod` builds it"
    ]
