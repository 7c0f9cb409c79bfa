"""Word vectors of a store's own texts, for the baseline that starts from nothing else.

  python -m benchmarks.word_vectors --store=DIR --out=vectors.txt --dim=128

Needs scipy (the extra `baselines`). The matrix that skip-gram with negative sampling factorises
without writing it down is written down here, and factorised (Levy & Goldberg 2014, sections 3.2 and
5.2): mutual information of the words of a window, less the log of the number of negative samples.
It reads what pretraining reads: the training and the unlabelled texts, not validation or test.
"""

import time

import numpy as np
from absl import app, flags
from scipy import sparse
from scipy.sparse.linalg import svds

from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers.vocabulary import FIRST_ID, vocabulary_lines
from trainer.stages.pretrain import pretraining_splits

FLAGS = flags.FLAGS
WINDOW, NEGATIVE = 5, 5
CHUNK = 2048  # documents counted at a time
LONGEST = 10_000  # words of a document


def counts_of_pairs(view: SplitView, vocab_size: int) -> sparse.csr_matrix:
    """Returns how often each word stands within WINDOW of each other: [vocab, vocab]."""
    shape = (vocab_size, vocab_size)
    counts = sparse.csr_matrix(shape, dtype=np.float32)
    for start in range(0, len(view), CHUNK):
        tokens, _ = view.gather(np.arange(start, min(start + CHUNK, len(view))), LONGEST)
        for distance in range(1, WINDOW + 1):
            left, right = tokens[:, :-distance].ravel(), tokens[:, distance:].ravel()
            known = (left >= FIRST_ID) & (right >= FIRST_ID)
            ones = np.ones(known.sum(), np.float32)
            counts += sparse.coo_matrix((ones, (left[known], right[known])), shape).tocsr()
    return counts + counts.T


def shifted_information(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Returns the positive part of log P(a, b) / (P(a) P(b)) - log NEGATIVE."""
    found = counts.tocoo()
    of_word = np.asarray(counts.sum(axis=1)).ravel().astype(np.float64)
    expected = of_word[found.row] * of_word[found.col] / of_word.sum()
    found.data = np.maximum(np.log(found.data / expected / NEGATIVE), 0).astype(np.float32)
    matrix = found.tocsr()
    matrix.eliminate_zeros()
    return matrix


def main(argv: list[str]) -> None:
    """Makes the vectors and writes them."""
    began = time.perf_counter()
    store = TokenStore(FLAGS.store)
    view = store.split(*pretraining_splits(store))
    matrix = shifted_information(counts_of_pairs(view, store.vocab_size))
    # Levy & Goldberg: both sides get the root of the singular values.
    left, values, _ = svds(matrix, k=FLAGS.dim, rng=np.random.default_rng(0))
    vectors = (left * np.sqrt(values))[FIRST_ID:]
    with open(FLAGS.out, "w", encoding="utf-8") as file:
        for word, vector in zip(vocabulary_lines(store.vocab_path), vectors, strict=True):
            print(word, *(f"{number:.5g}" for number in vector), file=file)
    seconds = time.perf_counter() - began
    print(f"wrote {len(vectors):,} vectors of {FLAGS.dim} to {FLAGS.out}, {seconds:.0f} s")


if __name__ == "__main__":
    flags.DEFINE_string("store", None, "Folder of the token store.", required=True)
    flags.DEFINE_string("out", "vectors.txt", "File that is written.")
    flags.DEFINE_integer("dim", 128, "Numbers of a vector.", lower_bound=1)
    app.run(main)
