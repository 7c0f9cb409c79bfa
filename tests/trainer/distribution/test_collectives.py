"""Collectives between real processes: what arrives, and how many a training step has."""

import json
import sys

import pytest

from tests.integration.equivalence import run_workers

KINDS = {
    "multi_worker": ("CollectiveReduceV2", "CollectiveGatherV2"),
    "horovod": ("HorovodAllreduce", "HorovodAllgather"),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((kind, workers), marks=[*marks, *slow], id=f"{kind}-{workers}")
        for kind, marks in (("multi_worker", ()), ("horovod", (pytest.mark.horovod,)))
        for workers, slow in ((2, (pytest.mark.slow("two workers; quick: three"),)), (3, ()))
    ],
)
def found(request, tmp_path_factory) -> tuple[str, list[dict]]:
    """Returns the distributor's name and what each of its workers found, by rank."""
    kind, workers = request.param
    folder = tmp_path_factory.mktemp("results")
    program = "tests.trainer.distribution.collectives_program"
    command = [sys.executable, "-m", program, kind, str(folder)]
    done = run_workers(command, workers, kind == "horovod")
    assert done.returncode == 0, done.stdout
    return kind, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(workers)]


def test_rows_are_gathered_in_the_order_of_ranks(found: tuple[str, list[dict]]) -> None:
    _, results = found
    for result in results:
        matrix, vector = result["uneven"]
        indices = [0, 1, 200, 201, 202][: 2 if len(results) == 2 else 5]
        assert matrix == [[[float(index // 100)] * 3 for index in indices], indices]
        indices = [100, 200, 201][: 1 if len(results) == 2 else 3]
        assert vector == [[float(index) for index in indices], indices]
        assert result["nothing"] == [[[], []], [[], []]]


def test_40_sums_have_the_same_bits_in_every_process(found: tuple[str, list[dict]]) -> None:
    assert len({digest for result in found[1] for digest in result["sums"]}) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_indices_arrive_bit_by_bit(found: tuple[str, list[dict]], dtype: str) -> None:
    assert all(result[dtype] for result in found[1])


def test_a_step_has_at_most_three_collectives_however_many_tables(
    found: tuple[str, list[dict]],
) -> None:
    kind, results = found
    reduce, gather = KINDS[kind]
    dense = [reduce]
    if len(results) == 2:  # of two, few numbers are gathered and added
        reduce, dense = gather, []
    for result in results:
        assert result["rows"] == [sorted([reduce, *dense, gather])] * 2
        assert result["compressed"] == sorted([reduce, reduce, gather])
        assert result["dense"] == [reduce, reduce]
