"""Linear models of words and word pairs on the same documents: what an LSTM has to beat.

  tfidf   TF-IDF, into logistic regression
  nbsvm   naive Bayes log-count ratios, into a linear SVM (Wang & Manning 2012, section 2.3)
  lsa     TF-IDF, a truncated SVD (latent semantic analysis, Deerwester et al. 1990), into logistic
          regression

Document frequencies and the SVD come from all training text, labelled or not. The validation split
chooses the strength of regularisation, whether pairs are read, and the number of dimensions.

  python -m trainer.stages.linear_models --store=runs/store --labels=200,0 --out=linear.json
"""

import argparse
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from data_pipelines.reserved_ids import RESERVED
from data_pipelines.store.split_view import SplitView, chunks
from data_pipelines.store.token_store import TokenStore
from trainer.safe_files import replace_text

STRENGTHS = (3.0, 10.0, 30.0, 100.0)
NBSVM_STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3)
LSA_DIMENSIONS = (10, 20, 30, 50)
MIN_DOCUMENTS = 2  # that have a pair of words, or it is left out
LSA_MIN_DOCUMENTS = 20

Matrix = Any  # SciPy's sparse matrix or an array: [documents, features]
Predict = Callable[[Matrix], np.ndarray]


class Errors(NamedTuple):
    """Errors of the model that validation chose, in percent of the documents."""

    validation: float  # on the validation split
    test: float  # on the test split
    choice: str  # what was chosen, in words
    wrong: np.ndarray  # of each test document, bool [documents]

    def in_record(self) -> dict[str, Any]:
        """Returns them as report.json has them."""
        return {
            "validation_error_percent": round(self.validation, 3),
            "test_error_percent": round(self.test, 3),
            "choice": self.choice,
        }


class LinearModels:
    """The words and pairs of a store's documents, and models fitted to some of them.

    Attributes:
        names: The models that suit the data; nbsvm is for two classes.
    """

    def __init__(self, store: TokenStore):
        """Reads all training text of `store`, which has a train, a validation and a test split."""
        self._vocab_size = store.vocab_size
        views = [store.split(name) for name in ("train", "unsupervised") if name in store.splits]
        self._pairs = _frequent_pairs(views, self._vocab_size)
        counts = sparse.vstack([self.counts(view) for view in views]).tocsr()
        self._tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        documents = np.bincount(counts.indices, minlength=counts.shape[1])
        self._in_lsa = np.flatnonzero(documents >= LSA_MIN_DOCUMENTS)
        self._svd = TruncatedSVD(max(LSA_DIMENSIONS), random_state=0)
        self._svd.fit(self._tfidf.transform(counts)[:, self._in_lsa])
        self._held_out = {
            split: (self.counts(store.split(split)), labels_of(store.split(split)))
            for split in ("validation", "test")
        }
        self.names = ("tfidf", "nbsvm", "lsa") if store.num_classes == 2 else ("tfidf", "lsa")

    def errors(self, name: str, labelled: SplitView) -> Errors:
        """Returns the errors of a model fitted to the `labelled` documents."""
        counts, labels = self.counts(labelled), labels_of(labelled)
        fit, strengths = (_nbsvm, NBSVM_STRENGTHS) if name == "nbsvm" else (_logistic, STRENGTHS)
        if np.ptp(labels) == 0:  # a small sample may have one class alone
            fit = _constant
        found = []
        for features, of_what in self._features(name):
            inputs, held_out = features(counts), features(self._held_out["validation"][0])
            for strength in strengths:
                predict = fit(inputs, labels, strength)
                error = _error(predict(held_out), self._held_out["validation"][1])
                found.append((error, features, predict, f"{of_what}, strength {strength:g}"))
        error, features, predict, choice = min(found, key=lambda each: each[0])
        test, truth = self._held_out["test"]
        wrong = predict(features(test)) != truth
        return Errors(error, 100 * float(np.mean(wrong)), choice, wrong)

    def _features(self, name: str) -> Iterator[tuple[Callable[[Matrix], Matrix], str]]:
        """Yields functions from counts to the inputs of a model, and what they read."""
        if name == "nbsvm":
            yield (lambda counts: counts), "words and pairs"
        elif name == "tfidf":
            yield self._tfidf.transform, "words and pairs"
            words = slice(self._vocab_size)
            yield (lambda counts: normalize(self._tfidf.transform(counts)[:, words])), "words"
        else:
            for size in LSA_DIMENSIONS:
                yield functools.partial(self._lsa, size), f"{size} dimensions"

    def _lsa(self, size: int, counts: Matrix) -> np.ndarray:
        """Returns unit vectors: [documents, size]."""
        places = self._svd.transform(self._tfidf.transform(counts)[:, self._in_lsa])
        return normalize(places[:, :size])

    def counts(self, view: SplitView) -> sparse.csr_matrix:
        """Returns each document's counts of words and frequent pairs: float64 [documents, both]."""
        rows, columns = [], []
        for first, document, words, pairs in _words_and_pairs(view, self._vocab_size):
            place = np.searchsorted(self._pairs, pairs)
            known = self._pairs[np.minimum(place, len(self._pairs) - 1)] == pairs
            rows += [first + document, first + document[known]]
            columns += [words, self._vocab_size + place[known]]
        row, column = np.concatenate(rows), np.concatenate(columns)
        keep = column >= len(RESERVED)
        shape = (len(view), self._vocab_size + len(self._pairs))
        return sparse.csr_matrix((np.ones(keep.sum()), (row[keep], column[keep])), shape)


def _words_and_pairs(
    view: SplitView, vocab_size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields, by chunk: its first document, and of each token the document, the word and the pair.

    The pair is that of the token and the next one, as one number; -1 if one of them is reserved.
    """
    for chunk in chunks(len(view)):
        lengths = view.lengths_of(chunk)
        words = view.gather_parts(chunk, np.zeros_like(lengths), lengths).astype(np.int64)
        after = np.append(words[1:], 0)
        real = (words >= len(RESERVED)) & (after >= len(RESERVED))
        pairs = np.where(real, words * vocab_size + after, -1)
        yield int(chunk[0]), np.repeat(np.arange(len(chunk)), lengths), words, pairs


def _frequent_pairs(views: list[SplitView], vocab_size: int) -> np.ndarray:
    """Returns the numbers of the pairs that MIN_DOCUMENTS documents have, sorted."""
    found, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for view in views:
        for _, document, _, pairs in _words_and_pairs(view, vocab_size):
            real = pairs >= 0
            distinct = np.unique(document[real] * vocab_size**2 + pairs[real]) % vocab_size**2
            joined, place = np.unique(np.concatenate([found, distinct]), return_inverse=True)
            weights = np.concatenate([counts, np.ones(len(distinct), np.int64)])
            found, counts = joined, np.bincount(place, weights).astype(np.int64)
    return found[counts >= MIN_DOCUMENTS]


def labels_of(view: SplitView) -> np.ndarray:
    """Returns the label of every document: int32 [documents]."""
    return view.labels_of(np.arange(len(view)))


def _error(predicted: np.ndarray, truth: np.ndarray) -> float:
    return 100 * float(np.mean(predicted != truth))


def _constant(inputs: Matrix, labels: np.ndarray, strength: float) -> Predict:
    return lambda others: np.full(others.shape[0], labels[0])


def _logistic(inputs: Matrix, labels: np.ndarray, strength: float) -> Predict:
    is_sparse = sparse.issparse(inputs)  # more features than documents: the dual form is quicker
    solver = "liblinear" if is_sparse else "lbfgs"
    model = LogisticRegression(C=strength, solver=solver, dual=is_sparse, max_iter=300)
    return OneVsRestClassifier(model).fit(inputs, labels).predict


def nbsvm(counts: Matrix, labels: np.ndarray, strength: float) -> Predict:
    """Returns the margins of an SVM on binary counts times naive Bayes log-count ratios.

    Args:
        counts: How often a document has a word or pair: [documents, features].
        labels: 0 or 1 [documents].
        strength: Inverse of the regularisation.

    Returns:
        A function from counts to margins, float64 [documents]: above 0 for class 1.
    """
    inputs = (counts > 0).astype(np.float64)
    positive, negative = (1 + np.asarray(inputs[labels == k].sum(axis=0)).ravel() for k in (1, 0))
    ratio = sparse.diags(np.log((positive / positive.sum()) / (negative / negative.sum())))
    model = LinearSVC(C=strength, max_iter=20_000, random_state=0).fit(inputs @ ratio, labels)
    # Section 2.3: the SVM's weights, drawn towards their mean size.
    weights = model.coef_.ravel()
    model.coef_ = (0.75 * np.abs(weights).mean() + 0.25 * weights)[None]
    return lambda others: model.decision_function((others > 0).astype(np.float64) @ ratio)


def _nbsvm(counts: Matrix, labels: np.ndarray, strength: float) -> Predict:
    margins = nbsvm(counts, labels, strength)
    return lambda others: (margins(others) > 0).astype(labels.dtype)


def table(store: TokenStore, counts: Sequence[int], draws: int, seed: int) -> list[dict[str, Any]]:
    """Returns the errors of every model for `counts` of labelled documents.

    Args:
        counts: 0 is all of the train split.
        draws: Samples of each count below all.
        seed: Seed of the first sample; the next ones have the next seeds.
    """
    models, train, rows = LinearModels(store), store.split("train"), []
    for count in counts:
        for draw in range(draws if count else 1):
            view = train.sample(count, seed + draw) if count else train
            for name in models.names:
                rows.append({"model": name, "labels": len(view), "draw": draw})
                rows[-1] |= models.errors(name, view).in_record()
    return rows


def main() -> None:
    """Writes the table as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trainer.stages.linear_models")
    parser.add_argument("--store", required=True, help="token store with labels")
    parser.add_argument("--url", default="", help="where shards are that the store's folder lacks")
    parser.add_argument("--labels", default="0", help="numbers of labelled documents; 0: all")
    parser.add_argument("--draws", type=int, default=3, help="samples of each number below all")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    # A model that has not converged may still be the best on validation data.
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    counts = [int(count) for count in options.labels.split(",")]
    rows = table(TokenStore(options.store, options.url), counts, options.draws, options.seed)
    replace_text(options.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
