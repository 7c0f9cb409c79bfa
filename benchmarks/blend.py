r"""Kept classifiers and NBSVM-bi, their margins added with weights that validation chose.

  python -m benchmarks.blend --classifier=imdb_cpu=results/imdb_cpu --store=DIR \
      --run_dir=runs/blend --out=results/imdb_cpu_blend.json

Each classifier reads validation and test by --stage=evaluate, in a folder under --run_dir; what is
there already is used again. NBSVM reads the words and pairs of the same store (Mesnil et al. 2014
add such a model to their networks). A logistic regression on the margins of the validation
documents weighs them, and the test split is read once.

The result is a row for two classes: the blend's test error, each part's own, and the exact
McNemar test of the blend against the best part.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn.linear_model import LogisticRegression

from benchmarks import machine
from data_pipelines.errors import InputError
from data_pipelines.store.token_store import TokenStore
from trainer.reporting import predictions
from trainer.reporting.environment import commit
from trainer.safe_files import replace_text
from trainer.stages import linear_models

SPLITS = ("validation", "test")
NBSVM = "NBSVM-bi"


def margins_of(name: str, bundle: str, split: str, options: argparse.Namespace) -> np.ndarray:
    """Returns the classifier's logit of every document of the split: float64 [documents]."""
    folder = options.run_dir / f"{name}-{split}"
    if not (folder / "report.json").exists():
        flags = {
            "stage": "evaluate",
            "classifier": bundle,
            "evaluate_split": split,
            "run_dir": folder,
            "store": options.store,
            **({"data_dir": options.data_dir} if options.data_dir else {}),
        }
        command = [sys.executable, "-m", "trainer.main"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        subprocess.run([*command, f"--source={options.source}"], check=True)
    found = predictions.read(folder / "predictions").tensors
    if found["logits"].shape[1] != 1:
        raise InputError(f"--classifier={name}={bundle} has more than two classes")
    return found["logits"][np.argsort(found["document"]), 0].astype(np.float64)


def nbsvm_margins(store: TokenStore) -> dict[str, np.ndarray]:
    """Returns, by split, the margins of the NBSVM that is best on validation."""
    models = linear_models.LinearModels(store)
    train = store.split("train")
    counts, labels = models.counts(train), linear_models.labels_of(train)
    held_out = {split: models.counts(store.split(split)) for split in SPLITS}
    truth = linear_models.labels_of(store.split("validation"))
    found = []
    for strength in linear_models.NBSVM_STRENGTHS:
        margins = linear_models.nbsvm(counts, labels, strength)
        of_validation = margins(held_out["validation"])
        found.append((np.mean((of_validation > 0) != truth), strength, of_validation, margins))
    _, _, of_validation, margins = min(found, key=lambda each: each[:2])
    return {"validation": of_validation, "test": margins(held_out["test"])}


def blend(
    margins: dict[str, dict[str, np.ndarray]], labels: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the errors of the blend and of its parts.

    Args:
        margins: By part and split: float64 [documents], above 0 for class 1.
        labels: By split: 0 or 1 [documents].
    """
    columns = {split: np.stack([part[split] for part in margins.values()], 1) for split in SPLITS}
    scale = columns["validation"].std(axis=0)
    model = LogisticRegression(C=1e3).fit(columns["validation"] / scale, labels["validation"])
    wrong = {split: model.predict(columns[split] / scale) != labels[split] for split in SPLITS}
    parts = [
        {
            "name": name,
            "weight": round(float(weight), 3),
            **{
                f"{split}_error_percent": percent((part[split] > 0) != labels[split])
                for split in SPLITS
            },
        }
        for (name, part), weight in zip(margins.items(), model.coef_[0], strict=True)
    ]
    best = min(parts, key=lambda part: part["validation_error_percent"])
    of_best = (margins[best["name"]]["test"] > 0) != labels["test"]
    mended, broken = np.sum(of_best & ~wrong["test"]), np.sum(~of_best & wrong["test"])
    return {
        "test_error_percent": percent(wrong["test"]),
        "validation_error_percent": percent(wrong["validation"]),
        "test_documents": len(labels["test"]),
        "parts": parts,
        "best_part": best["name"],
        "mended_documents": int(mended),
        "broken_documents": int(broken),
        "mcnemar_p": float(stats.binomtest(int(mended), int(mended + broken) or 1).pvalue),
    }


def percent(wrong: np.ndarray) -> float:
    """Returns the share of True in percent."""
    return round(100 * float(np.mean(wrong)), 3)


def main() -> None:
    """Writes the result as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blend")
    parser.add_argument(
        "--classifier",
        action="append",
        required=True,
        help="NAME=FOLDER of a classifier bundle; can be repeated",
    )
    parser.add_argument("--store", required=True, help="token store that they were trained on")
    parser.add_argument("--source", default="tfds:imdb_reviews", help="what the store was made of")
    parser.add_argument("--data_dir", help="folder of prepared TFDS data sets")
    parser.add_argument("--run_dir", type=Path, required=True, help="for the evaluations")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    bundles = dict(each.partition("=")[::2] for each in options.classifier)
    margins = {
        name: {split: margins_of(name, bundle, split, options) for split in SPLITS}
        for name, bundle in bundles.items()
    }
    store = TokenStore(options.store)
    margins[NBSVM] = nbsvm_margins(store)
    labels = {split: linear_models.labels_of(store.split(split)) for split in SPLITS}
    result = {
        "kind": "baseline",
        "name": options.out.stem,
        "title": f"{', '.join(bundles)} and {NBSVM}, blended",
        "time": "its parts', and minutes",
        **blend(margins, labels),
        "commit": commit(),
        "machine": machine.facts(),
    }
    replace_text(options.out, json.dumps(result, indent=2) + "\n")
    print(f"{result['title']}: test error {result['test_error_percent']:.2f} %")


if __name__ == "__main__":
    main()
