"""Linear models of words and word pairs on the same documents: what an LSTM has to beat.

  tfidf   TF-IDF, into logistic regression
  nbsvm   naive Bayes log-count ratios, into a linear SVM (Wang & Manning 2012, section 2.3); of two
          classes
  svm     TF-IDF, into a linear SVM; of more classes
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
SVM_STRENGTHS = (0.3, 1.0, 3.0, 10.0)
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
        names: The models that suit the data.
        vocab_size: The number of words: the first columns of `counts`.
        tfidf: From `counts` to TF-IDF.
    """

    def __init__(self, store: TokenStore):
        """Reads all training text of `store`, which has a train, a validation and a test split."""
        self.vocab_size = store.vocab_size
        views = [store.split(name) for name in ("train", "unsupervised") if name in store.splits]
        self._pairs = _frequent_pairs(views, self.vocab_size)
        self._all = sparse.vstack([self.counts(view) for view in views]).tocsr()
        self.tfidf = TfidfTransformer(sublinear_tf=True).fit(self._all)
        self._held_out = {s: _Documents(self, store.split(s)) for s in ("validation", "test")}
        self._labelled = functools.lru_cache(maxsize=1)(functools.partial(_Documents, self))
        self.names = ("tfidf", "nbsvm" if store.num_classes == 2 else "svm", "lsa")

    def errors(self, name: str, labelled: SplitView) -> Errors:
        """Returns the errors of a model fitted to the `labelled` documents."""
        documents, validation = self._labelled(labelled), self._held_out["validation"]
        fit, strengths = FITS.get(name, (_logistic, STRENGTHS))
        if np.ptp(documents.labels) == 0:  # a small sample may have one class alone
            fit = _constant
        found = []
        for features, of_what in _features(name):
            inputs, held_out = features(documents), features(validation)
            for strength in strengths:
                predict = fit(inputs, documents.labels, strength)
                error = 100 * float(np.mean(predict(held_out) != validation.labels))
                found.append((error, features, predict, f"{of_what}, strength {strength:g}"))
        error, features, predict, choice = min(found, key=lambda each: each[0])
        test = self._held_out["test"]
        wrong = predict(features(test)) != test.labels
        return Errors(error, 100 * float(np.mean(wrong)), choice, wrong)

    @functools.cached_property
    def lsa(self) -> Callable[[Matrix], np.ndarray]:
        """From TF-IDF to the largest of LSA_DIMENSIONS: float64 [documents, dimensions]."""
        frequency = np.bincount(self._all.indices, minlength=self._all.shape[1])
        read = np.flatnonzero(frequency >= LSA_MIN_DOCUMENTS)
        svd = TruncatedSVD(max(LSA_DIMENSIONS), random_state=0)
        svd.fit(self.tfidf.transform(self._all)[:, read])
        return lambda tfidf: svd.transform(tfidf[:, read])

    def counts(self, view: SplitView) -> sparse.csr_matrix:
        """Returns each document's counts of words and frequent pairs: float64 [documents, both]."""
        rows, columns = [], []
        for first, document, words, pairs in _words_and_pairs(view, self.vocab_size):
            place = np.searchsorted(self._pairs, pairs)
            known = self._pairs[np.minimum(place, len(self._pairs) - 1)] == pairs
            rows += [first + document, first + document[known]]
            columns += [words, self.vocab_size + place[known]]
        row, column = np.concatenate(rows), np.concatenate(columns)
        keep = column >= len(RESERVED)
        shape = (len(view), self.vocab_size + len(self._pairs))
        return sparse.csr_matrix((np.ones(keep.sum()), (row[keep], column[keep])), shape)


class _Documents:
    """Some documents as the models read them; each way is computed once, when it is asked for."""

    def __init__(self, models: LinearModels, view: SplitView):
        self._models = models
        self.counts = models.counts(view)
        self.labels = labels_of(view)

    @functools.cached_property
    def tfidf(self) -> sparse.csr_matrix:
        """Of words and pairs: float64 [documents, both]."""
        return self._models.tfidf.transform(self.counts)

    @functools.cached_property
    def words(self) -> sparse.csr_matrix:
        """TF-IDF of words alone, of length 1: float64 [documents, words]."""
        return normalize(self.tfidf[:, : self._models.vocab_size])

    @functools.cached_property
    def places(self) -> np.ndarray:
        """In the space of the SVD: float64 [documents, dimensions]."""
        return self._models.lsa(self.tfidf)


def _features(name: str) -> Iterator[tuple[Callable[[_Documents], Matrix], str]]:
    """Yields functions from documents to the inputs of a model, and what they read."""
    if name == "nbsvm":
        yield (lambda documents: documents.counts), "words and pairs"
    elif name in ("tfidf", "svm"):
        yield (lambda documents: documents.tfidf), "words and pairs"
        yield (lambda documents: documents.words), "words"
    else:
        for size in LSA_DIMENSIONS:
            yield functools.partial(_unit_vectors, size), f"{size} dimensions"


def _unit_vectors(size: int, documents: _Documents) -> np.ndarray:
    """Returns the first `size` dimensions, of length 1: [documents, size]."""
    return normalize(documents.places[:, :size])


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
    found = [np.zeros(0, np.int64)]  # each pair as often as documents have it
    for view in views:
        for _, document, _, pairs in _words_and_pairs(view, vocab_size):
            real = pairs >= 0
            numbers = np.sort(document[real] * vocab_size**2 + pairs[real])
            first = np.diff(numbers, prepend=-1) > 0
            found.append(numbers[first] % vocab_size**2)
    every = np.sort(np.concatenate(found))
    starts = np.flatnonzero(np.diff(every, prepend=-1))
    return every[starts[np.diff(starts, append=len(every)) >= MIN_DOCUMENTS]]


def labels_of(view: SplitView) -> np.ndarray:
    """Returns the label of every document: int32 [documents]."""
    return view.labels_of(np.arange(len(view)))


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
    model = _linear_svm(inputs @ ratio, labels, strength)
    # Section 2.3: the SVM's weights, drawn towards their mean size.
    weights = model.coef_.ravel()
    model.coef_ = (0.75 * np.abs(weights).mean() + 0.25 * weights)[None]
    return lambda others: model.decision_function((others > 0).astype(np.float64) @ ratio)


def _nbsvm(counts: Matrix, labels: np.ndarray, strength: float) -> Predict:
    margins = nbsvm(counts, labels, strength)
    return lambda others: (margins(others) > 0).astype(labels.dtype)


def _svm(inputs: Matrix, labels: np.ndarray, strength: float) -> Predict:
    return _linear_svm(inputs, labels, strength).predict


def _linear_svm(inputs: Matrix, labels: np.ndarray, strength: float) -> LinearSVC:
    return LinearSVC(C=strength, max_iter=20_000, random_state=0).fit(inputs, labels)


# Of models that are no logistic regressions: how they are fitted, and with which strengths.
FITS = {"nbsvm": (_nbsvm, NBSVM_STRENGTHS), "svm": (_svm, SVM_STRENGTHS)}


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
