"""Linear models of words on the same splits: what an LSTM has to beat.

  python -m benchmarks.baselines --source=tfds:imdb_reviews --data_dir=DIR --out=results

Two models:

  nbsvm_bi   naive Bayes log-count ratios of words and pairs of words, into a linear SVM
             (Wang & Manning 2012, section 2.3)
  tfidf_lr   TF-IDF of words and pairs of words, into logistic regression

Their strength of regularisation is chosen on the validation split; the model is then fitted to
the train split as before, and reads the test split once.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from benchmarks import machine
from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample, open_source
from trainer.reporting.environment import commit
from trainer.stages import linear_models

FLAGS = flags.FLAGS
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Words and single punctuation marks, as the product's own tokenizer splits them.
TOKEN = r"\w+(?:'\w+)?|[^\w\s]"

# Fitted counts and labels, strength -> a function from counts to predicted labels.
Fit = Callable[[sparse.csr_matrix, np.ndarray, float], Callable[[sparse.csr_matrix], np.ndarray]]


def nbsvm(counts: sparse.csr_matrix, labels: np.ndarray, strength: float) -> Any:
    """Returns the predictor of the product's NBSVM on counts."""
    margins = linear_models.nbsvm(counts, labels, strength)
    return lambda new: (margins(new) > 0).astype(labels.dtype)


def tfidf_lr(counts: sparse.csr_matrix, labels: np.ndarray, strength: float) -> Any:
    """Returns the predictor of logistic regression on sublinear TF-IDF."""
    weighted = TfidfTransformer(sublinear_tf=True).fit(counts)
    model = LogisticRegression(C=strength, max_iter=200, solver="liblinear", random_state=0)
    model.fit(weighted.transform(counts), labels)
    return lambda new: model.predict(weighted.transform(new))


def read(source: Any, split: str) -> tuple[list[str], np.ndarray]:
    """Returns the texts and labels of a split."""
    texts, labels = [], []
    for part in source.parts(split):
        for example in source.examples(split, part):
            if isinstance(example, BadExample):
                raise InputError(f"{example.where}: {example.why}")
            texts.append(example.text.replace("<br />", " ").lower())
            labels.append(example.label)
    return texts, np.array(labels)


def run(
    name: str, title: str, fit: Fit, splits: dict[str, tuple[Any, np.ndarray]]
) -> dict[str, Any]:
    """Returns a model's validation errors by strength and its test error at the best one."""
    began = time.perf_counter()
    (train, labels), (validation, truth) = splits["train"], splits["validation"]
    errors = {
        strength: 100 * float(np.mean(fit(train, labels, strength)(validation) != truth))
        for strength in STRENGTHS
    }
    best = min(errors, key=lambda strength: (errors[strength], strength))
    test, test_truth = splits["test"]
    test_error = 100 * float(np.mean(fit(train, labels, best)(test) != test_truth))
    return {
        "kind": "baseline",
        "name": name,
        "title": title,
        "test_error_percent": round(test_error, 3),
        "test_documents": len(test_truth),
        "validation_error_percent": round(errors[best], 3),
        "validation_error_percent_by_strength": {k: round(v, 3) for k, v in errors.items()},
        "strength": best,
        "train_documents": len(labels),
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


MODELS = (
    ("nbsvm_bi", "NBSVM-bi", nbsvm),
    ("tfidf_lr", "TF-IDF of words and pairs, logistic regression", tfidf_lr),
)


def main(argv: list[str]) -> None:
    """Fits both models and writes one JSON each."""
    source = open_source(FLAGS.source, FLAGS.data_dir)
    texts = {split: read(source, split) for split in ("train", "validation", "test")}
    vectorizer = CountVectorizer(
        ngram_range=(1, 2), min_df=2, token_pattern=TOKEN, lowercase=False, dtype=np.float64
    )
    vectorizer.fit(texts["train"][0])
    splits = {k: (vectorizer.transform(v), labels) for k, (v, labels) in texts.items()}
    for name, title, fit in MODELS:
        result = run(name, title, fit, splits)
        result |= {"data_note": source.note, "commit": commit(), "machine": machine.facts()}
        path = Path(FLAGS.out) / f"{name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: test error {result['test_error_percent']:.2f} %, wrote {path}")
    sys.stdout.flush()


if __name__ == "__main__":
    flags.DEFINE_string("source", "tfds:imdb_reviews", "Where the labelled text is from.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data sets.")
    flags.DEFINE_string("out", "results", "Folder that the JSON files go to.")
    app.run(main)
