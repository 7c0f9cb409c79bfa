r"""Test errors of what --train tunes on a frozen encoder, by the number of labels.

    python -m benchmarks.state_tuning --encoder=runs/pre/encoder --store=runs/store \
        --run_dir=runs/tuning --out=state_tuning

Beside full fine-tuning, and logistic regression on TF-IDF. Every method has the same steps and the
same trials: the learning rates, of which the validation split chooses. Intervals are paired: of
the difference to the linear head on frozen pooling, over the same test documents and seeds. To
resume an interrupted run, repeat its command.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

import warmstate
from benchmarks.machine import facts
from benchmarks.processes import write_results
from data_pipelines.store.token_store import TokenStore
from trainer.config import TRAINED
from trainer.models import bundle
from trainer.reporting import predictions
from trainer.stages.linear_models import LinearModels

METHODS = (*TRAINED[1:], TRAINED[0])  # full fine-tuning last
RATES = (1e-3, 1e-2)
DRAWS = 10_000


def trial(
    args: argparse.Namespace, train: str, labels: int, seed: int, rate: float
) -> dict[str, Any]:
    """Fine-tunes and tests once; returns the errors, in percent, and 1 for each wrong document."""
    folder = Path(args.run_dir) / f"{labels}-{train}-{seed}-{rate:g}"
    kept = folder / "trial.json"
    if kept.exists():
        return json.loads(kept.read_text())
    quiet: dict[str, Any] = {"log": lambda line: None, "verify": False}
    trained = warmstate.finetune(
        folder, args.store, args.encoder, train=train, finetune_documents=labels,
        finetune_learning_rate=rate, finetune_steps=args.steps, finetune_batch_size=32,
        finetune_evaluate_every_steps=args.steps, finetune_max_tokens=args.max_tokens,
        pooling="mean", hidden_units=0, seed=seed, **quiet,
    )  # fmt: skip
    test = warmstate.evaluate(folder / "test", args.store, trained.folder, "test", **quiet)
    found = {
        "validation_error_percent": trained.report["validation"]["error_percent"],
        "test_error_percent": test["error_percent"],
        "wrong": predictions.read(folder / "test" / "predictions").is_wrong.astype(int).tolist(),
    }
    kept.write_text(json.dumps(found))
    return found


def interval(wrong: list[int], than: list[int]) -> list[float]:
    """Returns the 95 % interval of the difference of two errors, in points, paired by document."""
    difference = np.array(wrong) - np.array(than)
    draws = np.random.default_rng(0).multinomial(
        len(difference), [np.mean(difference == value) for value in (-1, 0, 1)], DRAWS
    )
    points = 100 * (draws[:, 2] - draws[:, 0]) / len(difference)
    return [round(float(x), 2) for x in np.percentile(points, [2.5, 97.5])]


@functools.cache
def linear_models(store: str) -> LinearModels:
    """Returns the linear models of a store."""
    return LinearModels(TokenStore(store))


def row(args: argparse.Namespace, labels: int) -> dict[str, Any]:
    """Returns the errors of all methods with so many labels, over the seeds."""
    seeds = range(args.seeds if labels else 1)
    chosen = {
        train: [
            min(
                (trial(args, train, labels, seed, rate) for rate in RATES),
                key=lambda found: found["validation_error_percent"],
            )
            for seed in seeds
        ]
        for train in METHODS
    }
    wrong = {
        train: [wrong for f in found for wrong in f["wrong"]] for train, found in chosen.items()
    }
    methods = {
        train: {
            "test_error_percent": [round(f["test_error_percent"], 2) for f in found],
            "points_to_head": interval(wrong[train], wrong["head"]),
        }
        for train, found in chosen.items()
    }
    view, models = TokenStore(args.store).split("train"), linear_models(args.store)
    documents = [view.sample(labels, seed) if labels else view for seed in seeds]
    tfidf = [round(models.errors("tfidf", some).test, 2) for some in documents]
    return {"labels": labels, "methods": methods, "tfidf_percent": tfidf}


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    names = {"head": "linear head", "all": "all weights"}
    head = " | ".join(names.get(train, train) for train in METHODS)
    lines = [f"| labels | {head} | TF-IDF |", "|---" * (len(METHODS) + 2) + "|"]
    for found in sorted(results["rows"], key=lambda row: row["labels"] or float("inf")):
        cells = []
        for train in METHODS:
            method = found["methods"][train]
            low, high = method["points_to_head"]
            near = "" if train == "head" else f" ({low:+.1f} to {high:+.1f})"
            cells.append(f"{np.mean(method['test_error_percent']):.1f}{near}")
        labels = f"{found['labels']:,}" if found["labels"] else "all"
        lines.append(f"| {labels} | {' | '.join(cells)} | {np.mean(found['tfidf_percent']):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--run_dir", required=True, help="folder of the trials, which are kept")
    parser.add_argument("--labels", default="10,50,200,1000,0", help="0: all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max_tokens", type=int, default=400)
    parser.add_argument(
        "--seeds", type=int, default=3, help="samples of labels; one for all labels"
    )
    parser.add_argument("--out", default="state_tuning", help="name of the JSON")
    args = parser.parse_args()
    info = bundle.read_info(Path(args.encoder), "encoder", "--encoder")
    settings = ("pretrain_objective", "pretrain_steps", "unlabelled", "source", "seed")
    results: dict[str, Any] = {
        "data": TokenStore(args.store).note,
        "encoder": info["model"] | {name: info["config"][name] for name in settings},
        "steps": args.steps,
        "rows": [],
    }
    for labels in map(int, args.labels.split(",")):
        results["rows"].append(row(args, labels))
        print(table(results), flush=True)
        write_results(args.out, facts(), results)


if __name__ == "__main__":
    main()
