"""--context_key, from a CSV file to predictions, on one and two workers, and resumed."""

import csv
import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.prepare import PrepareConfig, ensure_store
from tests.integration.programs import metrics, run, train, train_until
from tests.integration.test_training import assert_same_bits, final_state
from trainer.inference.text_classifier import load_classifier

AUTHORS = ("ann", "bob", "cy", "dee", "eve", "flo")
FLAGS = (
    *("--stage=finetune", "--init_weights=random", "--initial_state=zero", "--units=16"),
    *("--finetune_steps=120", "--finetune_learning_rate=0.01", "--finetune_batch_size=32"),
    *("--embedding_dim=8", "--hidden_units=8", "--context_key=author", "--finetune_dropout=0"),
)


def write_reviews(path: Path, count: int, seed: int) -> None:
    """Writes reviews of which only the author tells whether they are meant as they are written."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["author", "text", "label"])
        for number in range(count):
            author, praise = draw.choice(AUTHORS), draw.random() < 0.5
            label = praise != (AUTHORS.index(author) % 2 == 1)
            word = draw.choice(["great", "fine"] if praise else ["awful", "dull"])
            table.writerow([author, f"the film number {number % 7} was {word}", int(label)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contexts")
    for split, count in (("train", 400), ("test", 100)):
        write_reviews(folder / f"{split}.csv", count, seed=count)
    source = f"csv:train={folder}/train.csv,test={folder}/test.csv"
    config = PrepareConfig(source=source, context_key="author", min_count=1)
    ensure_store(config, folder / "store", lambda line: None).verify()
    return folder / "store"


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(1, *FLAGS, f"--store={store}", f"--run_dir={folder}")
    return folder


def test_the_author_decides(store: Path, trained: Path, tmp_path: Path) -> None:
    evaluate = ("--stage=evaluate", f"--store={store}", f"--classifier={trained}/classifier")
    train(1, *evaluate, f"--run_dir={tmp_path}")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["test"]["error_percent"] < 10  # without the author, 50
    model = load_classifier(trained / "classifier")
    assert model.context_key == "author" and model.context_names == AUTHORS
    text = "the film number 3 was great"
    found = model.predict([text] * 3, ["ann", "bob", None])
    assert [prediction.label for prediction in found[:2]] == ["1", "0"]
    assert found[2] == model.predict([text])[0] == model.predict([text], ["nobody"])[0]
    sessions = [model.session(context) for context in ("ann", "bob")]
    for session, whole in zip(sessions, found, strict=False):
        session.feed(text)
        prediction = model.prediction(session.probabilities())
        assert prediction.probabilities == pytest.approx(whole.probabilities, abs=2e-6)


def test_predict_reads_the_column(trained: Path, tmp_path: Path) -> None:
    write_reviews(tmp_path / "in.csv", 30, seed=1)
    flags = (f"--input={tmp_path}/in.csv", f"--output={tmp_path}/out.jsonl")
    run(1, "--stage=predict", f"--classifier={trained}/classifier", *flags)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 30
    assert np.mean([row["predicted"] == row["label"] for row in rows]) > 0.9


@pytest.mark.slow("quick: test_distribution.py, of tables by rows, and test_context_state.py")
def test_two_workers_are_one_worker(store: Path, trained: Path, tmp_path: Path) -> None:
    train(2, *FLAGS, f"--store={store}", f"--run_dir={tmp_path}", "--check_divergence=true")
    one, two = metrics(trained), metrics(tmp_path)
    assert list(one) == list(two) == list(range(1, 121))
    np.testing.assert_allclose(list(two.values())[:40], list(one.values())[:40], rtol=1e-4)


@pytest.mark.slow("quick: the resumed fine-tuning of test_training.py")
def test_a_resumed_run_ends_with_the_same_bits(store: Path, trained: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, f"--store={store}", f"--run_dir={tmp_path}")
    assert train_until("step 65/120", signal.SIGKILL, 1, *flags) == -signal.SIGKILL
    assert "resumed after step" in train(1, *flags)
    assert_same_bits(final_state(trained), final_state(tmp_path))
    bundles = [folder / "classifier" / "classifier.safetensors" for folder in (trained, tmp_path)]
    assert bundles[0].read_bytes() == bundles[1].read_bytes()


def test_a_store_without_the_column_is_refused(small_store: Path, tmp_path: Path) -> None:
    done = run(1, *FLAGS, f"--store={small_store}", f"--run_dir={tmp_path}")
    assert done.returncode == 2
    assert "--context_key=author, but the store's is not set" in done.stderr
