"""Parameters for tests that need each value of two lists, but not every pair of them."""

from collections.abc import Sequence
from typing import Any

import pytest


def each_value(first: Sequence[Any], second: Sequence[Any], slow: pytest.MarkDecorator) -> list:
    """Returns all pairs as parameters; `slow` marks all but a few that have each value."""
    quick = {(n % len(first), n % len(second)) for n in range(max(len(first), len(second)))}
    return [
        pytest.param(one, other, marks=() if (i, j) in quick else slow)
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]
