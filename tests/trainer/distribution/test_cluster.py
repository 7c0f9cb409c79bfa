import json

import pytest

from data_pipelines.errors import InputError
from trainer.distribution.cluster import Cluster, resolve


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
    ],
)
def test_an_environment_that_is_half_there(environ: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve(environ)
