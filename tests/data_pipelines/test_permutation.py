import math
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from data_pipelines.permutation import Permutation

DRAWS = 3000


def chi_square_limit(freedom: int) -> float:
    """Returns about the 99.99th percentile (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: np.ndarray) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def drawn(size: int) -> np.ndarray:
    return np.array([Permutation(size, (7, seed))(np.arange(size)) for seed in range(DRAWS)])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**70), st.integers(0, 9))
def test_it_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    values = Permutation(size, (seed, epoch))(np.arange(size))
    assert values.dtype == np.int64
    assert np.bincount(values, minlength=size).tolist() == [1] * size


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**62 - 1), st.data())
def test_any_size_is_permuted_inside_itself(size: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=50))
    values = Permutation(size, (1,))(np.array(positions, np.int64))
    assert len(set(values.tolist())) == len(positions)
    assert all(0 <= value < size for value in values.tolist())


@pytest.mark.seconds
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_elements_are_as_likely(size: int) -> None:
    orders = Counter(map(tuple, drawn(size).tolist()))
    counts = np.array([*orders.values(), *[0] * (math.factorial(size) - len(orders))])
    assert chi_square(counts) < chi_square_limit(len(counts) - 1)


@pytest.mark.seconds
@pytest.mark.parametrize("size", [7, 10, 16, 37])
def test_positions_and_neighbours_are_uniform(size: int) -> None:
    values = drawn(size)
    for left, right in ((np.broadcast_to(np.arange(size), values.shape), values),
                        (values[:, :-1], values[:, 1:])):  # fmt: skip
        table = np.zeros((size, size))
        np.add.at(table, (left, right), 1)
        cells = table if left.shape[1] == size else table[~np.eye(size, dtype=bool)]
        assert chi_square(cells) < chi_square_limit((size - 1) ** 2)


def test_large_orders_look_random() -> None:
    values = Permutation(10**12, (3,))(np.arange(100_000)) / 1e12
    counts = np.histogram(values, 1000, (0, 1))[0]
    assert chi_square(counts) < chi_square_limit(999)
    # With the position, with the next value, and with the value of the neighbouring key.
    other = Permutation(10**12, (4,))(np.arange(100_000)) / 1e12
    for left, right in ((values, np.arange(100_000)), (values[1:], values[:-1]), (values, other)):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.015


def test_the_order_is_pinned() -> None:
    # A change here changes what every resumed run sees.
    assert Permutation(10, (7, 2, 0))(np.arange(10)).tolist() == [8, 4, 9, 3, 0, 1, 7, 2, 5, 6]
    assert Permutation(10**15, (1,))(np.array([0, 1, 10**15 - 1])).tolist() == [
        957765409145751,
        577543562987854,
        263585267311847,
    ]


def test_positions_keep_their_order_and_may_repeat() -> None:
    order = Permutation(100, (5,))
    whole = order(np.arange(100))
    wanted = np.array([3, 99, 3, 0])
    np.testing.assert_array_equal(order(wanted), whole[wanted])
    assert order(np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize("size", [0, -1, 2**62])
def test_sizes_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match="elements"):
        Permutation(size, (0,))
