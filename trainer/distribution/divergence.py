"""Checks by digest that all workers hold the same bytes."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from trainer.distribution.distributor import Distributor
from trainer.distribution.variables import digest


class DivergenceError(RuntimeError):
    """Workers hold different values of variables that must be equal."""


def digests(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the SHA-256 of each array's name, type, shape and bytes."""
    return {name: digest({name: array}) for name, array in arrays.items()}


def check_equal(distributor: Distributor, arrays: Mapping[str, np.ndarray], when: str) -> None:
    """Checks that all workers hold the same arrays; a collective.

    Args:
        arrays: This worker's, by name.
        when: For the message, e.g. "after step 200".

    Raises:
        DivergenceError: In every worker. It lists each array that differs, and the workers in the
            minority.
    """
    faults = differences(distributor.gather_objects(digests(arrays)))
    if faults:
        raise DivergenceError(f"workers hold different values {when}: " + "; ".join(faults))


def differences(by_rank: list[dict[str, str]]) -> list[str]:
    """Returns a line for each name with differing digests."""
    faults = []
    for name in sorted(set().union(*by_rank)):
        held = [worker.get(name) for worker in by_rank]
        usual, _ = Counter(held).most_common(1)[0]
        if others := [rank for rank, value in enumerate(held) if value != usual]:
            faults.append(f"{name}: workers {others} differ from the others")
    return faults
