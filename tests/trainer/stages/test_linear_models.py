import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.svm import LinearSVC

import warmstate
from data_pipelines.store.token_store import TokenStore
from trainer.stages import linear_models
from trainer.stages.linear_models import LinearModels


@pytest.fixture(scope="module")
def store(small_store: Path) -> TokenStore:
    return TokenStore(small_store)


@pytest.fixture(scope="module")
def models(store: TokenStore) -> LinearModels:
    return LinearModels(store)


def test_words_and_pairs_are_counted_as_one_would_by_hand(
    store: TokenStore, models: LinearModels
) -> None:
    view = store.split("train")
    documents = [view.gather(np.array([i]), 10_000)[0][0].tolist() for i in range(len(view))]
    pairs = [{p for p in itertools.pairwise(d) if min(p) > 2} for d in documents]
    frequent = sorted({p for d in pairs for p in d if sum(p in other for other in pairs) >= 2})
    counts = models.counts(view).toarray()
    assert counts.shape == (len(view), store.vocab_size + len(frequent))
    for number in (0, 1, len(view) - 1):
        words = np.bincount(documents[number], minlength=store.vocab_size)
        words[:3] = 0
        np.testing.assert_array_equal(counts[number, : store.vocab_size], words)
        each = list(zip(documents[number], documents[number][1:], strict=False))
        assert counts[number, store.vocab_size :].tolist() == [each.count(p) for p in frequent]


def test_models_learn_and_test_labels_choose_nothing(
    store: TokenStore, models: LinearModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models.names == ("tfidf", "nbsvm", "lsa")
    train = store.split("train")
    found = {name: models.errors(name, train) for name in models.names}
    for errors in found.values():
        assert 0 < errors.validation < 45 and 0 < errors.test < 45
    test = models._held_out["test"]
    monkeypatch.setattr(test, "labels", 1 - test.labels)
    again = models.errors("tfidf", train)
    assert again.choice == found["tfidf"].choice
    assert again.test == pytest.approx(100 - found["tfidf"].test)


def test_the_table_has_each_sample_of_few_labels_and_all_labels_once(store: TokenStore) -> None:
    rows = linear_models.table(store, [20, 0], draws=2, seed=3)
    kinds = [(row["labels"], row["draw"]) for row in rows if row["model"] == "lsa"]
    assert kinds == [(20, 0), (20, 1), (200, 0)]
    few = [r["test_error_percent"] for r in rows if r["labels"] == 20 and r["model"] == "tfidf"]
    assert few[0] != few[1]


def test_labels_of_one_class_predict_that_class(store: TokenStore, models: LinearModels) -> None:
    train = store.split("train")
    seed = next(s for s in range(50) if np.ptp(train.sample(2, s).labels_of(np.arange(2))) == 0)
    same = train.sample(2, seed)
    share = 100 * np.mean(models._held_out["test"].labels != same.labels_of(np.arange(1))[0])
    assert [models.errors(name, same).test for name in models.names] == [pytest.approx(share)] * 3


def test_of_three_classes_one_is_a_linear_svm(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    for path in files.values():
        rows = []
        for label in random.integers(3, size=90):
            own, others = random.integers(9, size=2), random.integers(27, size=4)
            words = [*(f"w{9 * label + n}" for n in own), *(f"w{n}" for n in others)]
            rows.append({"text": " ".join(words), "label": f"class {label}"})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = ",".join(f"{split}={path}" for split, path in files.items())
    store = warmstate.prepare(tmp_path / "store", source=f"jsonl:{splits}")
    models = LinearModels(store)
    assert models.names == ("tfidf", "svm", "lsa")
    found = models.errors("svm", store.split("train"))
    assert found.test < 50  # of 67 by chance
    of_what, strength = found.choice.split(", strength ")
    train, test = models._labelled(store.split("train")), models._held_out["test"]
    x, new = (d.words if of_what == "words" else d.tfidf for d in (train, test))
    svm = LinearSVC(C=float(strength), max_iter=20_000, random_state=0).fit(x, train.labels)
    np.testing.assert_array_equal(found.wrong, svm.predict(new) != test.labels)
