"""--labels=multi on text: a newsgroup's parts, such as rec, sport and hockey, as labels.

    python -m benchmarks.multi_label --newsgroups=20news-bydate.tar.gz

Posts of 20 Newsgroups are read without their headers. Compared are logistic regressions on TF-IDF
of words and pairs, one a label, and a warm-started LSTM. Validation chooses the thresholds of
both, and the strength of the regressions.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer

import warmstate
from benchmarks.context_text import domain_and_text
from benchmarks.machine import facts
from benchmarks.processes import write_results
from data_pipelines.sources import Example, open_source
from data_pipelines.sources.text import text_fault
from trainer.reporting import thresholds
from trainer.reporting.predictions import Predictions

STRENGTHS = (3.0, 30.0)
FEATURES = 40_000  # the most frequent words and pairs
PRETRAINING: dict[str, Any] = {
    "pretrain_objective": "bag_autoencoder",
    "pretrain_steps": 300,
    "pretrain_evaluate_every_steps": 300,
    "pretrain_evaluate_documents": 200,
    "mean_state_documents": 200,
    "pretrain_batch_size": 32,
    "pretrain_max_tokens": 100,
    "pretrain_learning_rate": 5e-3,
    "embedding_dim": 96,
    "units": 128,
}
FINE_TUNING: dict[str, Any] = {
    "embedding_dim": 96,
    "units": 128,
    "pooling": "mean",
    "hidden_units": 0,
    "finetune_steps": 600,
    "finetune_evaluate_every_steps": 200,
    "finetune_batch_size": 32,
    "finetune_learning_rate": 3e-3,
    "finetune_schedule": "triangular",
    "finetune_max_tokens": 120,
}


def write_posts(newsgroups: str, folder: Path) -> dict[str, list[tuple[str, list[str]]]]:
    """Writes SPLIT.jsonl of text and label; returns texts and labels by split."""
    source = open_source(f"newsgroups20:{newsgroups}")
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for split in source.splits:
        posts = (post for part in source.parts(split) for post in source.examples(split, part))
        rows = []
        for post in posts:
            if isinstance(post, Example):
                text = domain_and_text(post.text)[1]
                if not text_fault(text):
                    rows.append((text, sorted(set(source.class_names[post.label].split(".")))))
        lines = [json.dumps({"text": text, "label": labels}) + "\n" for text, labels in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
        found[split] = rows
    return found


def linear(posts: dict[str, list[tuple[str, list[str]]]]) -> dict[str, Any]:
    """Returns the test figures of the regressions that validation chose."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), max_features=FEATURES, sublinear_tf=True)
    binarizer = MultiLabelBinarizer().fit([labels for _, labels in posts["train"]])
    inputs = {"train": vectorizer.fit_transform([text for text, _ in posts["train"]])}
    inputs |= {s: vectorizer.transform([t for t, _ in posts[s]]) for s in ("validation", "test")}
    truth = {s: binarizer.transform([labels for _, labels in posts[s]]) for s in inputs}
    best: tuple[float, Any, list[float], float] | None = None
    for strength in STRENGTHS:
        regression = LogisticRegression(C=strength, solver="liblinear", dual=True, max_iter=300)
        model = OneVsRestClassifier(regression).fit(inputs["train"], truth["train"])
        edges = thresholds.best(model.predict_proba(inputs["validation"]), truth["validation"])
        figures = _figures(model, inputs["validation"], truth["validation"], edges)
        if best is None or figures["f1_micro"] > best[0]:
            best = figures["f1_micro"], model, edges, strength
    assert best is not None
    _, model, edges, strength = best
    return _figures(model, inputs["test"], truth["test"], edges) | {"strength": strength}


def _figures(model: Any, inputs: Any, truth: np.ndarray, edges: list[float]) -> dict[str, Any]:
    probabilities = np.clip(model.predict_proba(inputs), 1e-12, 1 - 1e-12)
    logits = np.log(probabilities / (1 - probabilities))
    losses = -np.where(truth, np.log(probabilities), np.log(1 - probabilities)).sum(axis=1)
    tensors = {"labels": truth.astype(np.uint8), "logits": logits, "loss": losses}
    tensors["label"] = np.zeros(len(truth), np.int32)
    return Predictions(tensors, {"thresholds": edges}).metrics()


def lstm(folder: Path) -> dict[str, Any]:
    """Returns the test figures of the LSTM."""
    splits = ",".join(f"{s}={folder}/{s}.jsonl" for s in ("train", "validation", "test"))
    store = warmstate.prepare(folder / "store", source=f"jsonl:{splits}", labels="multi")
    encoder = warmstate.pretrain(folder / "encoder", store, **PRETRAINING)
    settings = FINE_TUNING | {"labels": "multi"}
    trained = warmstate.finetune(folder / "classifier", store, encoder.folder, **settings)
    return warmstate.evaluate(folder / "test", store, trained.folder, labels="multi")


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    head = [
        "| 20 Newsgroups, parts of the name | micro F1 | macro F1 | mean AUC | all labels right |"
    ]
    head += ["|---|---:|---:|---:|---:|"]
    names = {"linear": "TF-IDF, a logistic regression a label", "lstm": "LSTM, warm start"}
    for name, title in names.items():
        row = results[name]
        cells = [f"{100 * row['f1_micro']:.1f} %", f"{100 * row['f1_macro']:.1f} %"]
        cells += [f"{row['roc_auc']:.3f}", f"{100 - row['error_percent']:.1f} %"]
        head.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(head)


def main() -> None:
    """Writes the figures as JSON, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multi_label", description=__doc__)
    parser.add_argument("--newsgroups", required=True, help="20news-bydate.tar.gz or its folder")
    parser.add_argument("--out", default="multi_label", help="name of the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        posts = write_posts(options.newsgroups, Path(name))
        results: dict[str, Any] = {"linear": linear(posts)}
        print(results["linear"], flush=True)
        results["lstm"] = lstm(Path(name))
    print(table(results))
    write_results(options.out, facts(), results)


if __name__ == "__main__":
    main()
