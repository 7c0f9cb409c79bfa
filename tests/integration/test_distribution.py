"""Each distributor, with 1, 2 and 3 workers, computes what one device does."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.integration.equivalence import (
    CASES,
    FEW,
    TOLERANCES,
    Case,
    relative_difference,
    results,
    run_workers,
)

KINDS = {"mirrored": (), "multi_worker": (), "horovod": (pytest.mark.horovod,)}
SLOW = pytest.mark.slow("all cases on 1, 2 and 3 workers; quick: a few on three")
# In processes; test_collectives.py shows that every type arrives there as it was sent.
TWO = (FEW[0], FEW[-1])


def on_one_device(case: Case) -> Case:
    """Returns the case whose results are expected."""
    return Case(case.optimizer, case.dtype, "dense")


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list]:
    """Returns what one device computes."""
    cases = list(dict.fromkeys(map(on_one_device, CASES)))
    return results("one_device", 1, tmp_path_factory.mktemp("one") / "device", cases)


@pytest.mark.parametrize(
    ("kind", "workers", "cases"),
    [
        *(
            pytest.param(kind, 3, TWO if kind != "mirrored" else FEW, id=kind, marks=marks)
            for kind, marks in KINDS.items()
        ),
        *(
            pytest.param(kind, workers, CASES, id=f"{kind}-{workers}", marks=[*marks, SLOW])
            for kind, marks in KINDS.items()
            for workers in (1, 2, 3)
        ),
    ],
)
def test_a_distributor_computes_what_one_device_does(
    one_device: dict[Case, list], tmp_path: Path, kind: str, workers: int, cases: Sequence[Case]
) -> None:
    found = results(kind, workers, tmp_path / "found", cases)
    assert list(found) == list(cases)
    for case, by_worker in found.items():
        expected = one_device[on_one_device(case)][0]
        for arrays in by_worker:
            difference = relative_difference(expected, arrays)
            assert difference < TOLERANCES[case.dtype], (case, difference)
            # Not only near to one device: the same bits in all workers.
            for name, array in arrays.items():
                assert array.tobytes() == by_worker[0][name].tobytes(), (case, name)


def test_the_few_cases_have_every_pair_of_settings() -> None:
    for first, second in itertools.combinations(("optimizer", "dtype", "sparse_reduce"), 2):
        pairs = {(getattr(case, first), getattr(case, second)) for case in CASES}
        assert pairs == {(getattr(case, first), getattr(case, second)) for case in FEW}


def test_the_cases_train(one_device: dict[Case, list]) -> None:
    for case, (arrays,) in one_device.items():
        losses = arrays["losses"]
        assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4]), case
        assert arrays["hidden"].dtype == case.dtype


DIVERGED = """
import os, sys
import numpy as np
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly()
from trainer.distribution import cluster
from trainer.distribution.make import make_distributor
from trainer.distribution.divergence import DivergenceError, check_equal
distributor = make_distributor("auto", cluster.resolve(os.environ), 60.0)
held = {"kernel": np.ones(3), "bias": np.full(3, distributor.rank == 2)}
check_equal(distributor, {"kernel": held["kernel"]}, "at the start")
try:
    check_equal(distributor, held, "after step 7")
except DivergenceError as error:
    print(error)
"""


def test_workers_that_hold_different_weights_are_named_in_every_worker() -> None:
    done = run_workers([sys.executable, "-c", DIVERGED], 3)
    assert done.returncode == 0, done.stdout
    said = "workers hold different values after step 7: bias: workers [2] differ from the others"
    for rank in range(3):
        assert f"[worker {rank}] {said}" in done.stdout
