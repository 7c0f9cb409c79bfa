import numpy as np

from trainer.distribution.divergence import differences, digests


def test_digests_tell_bytes_types_and_shapes_apart() -> None:
    values = [
        np.zeros(4, np.float32),
        np.zeros((2, 2), np.float32),
        np.zeros(2, np.float64),
        np.array([0, 0, 0, -0.0], np.float32),
    ]
    assert len({digests({"x": value})["x"] for value in values}) == len(values)


def test_a_difference_names_the_variable_and_the_workers() -> None:
    same = {"kernel": "a", "bias": "b"}
    assert differences([same, same, same]) == []
    lines = differences([same, same | {"kernel": "c"}, same, {"bias": "b"}])
    assert lines == ["kernel: workers [1, 3] differ from the others"]
