"""--labels=multi, from JSON Lines to sets of labels, on one and two workers, and resumed."""

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
from trainer.reporting import predictions

WORDS = {
    "food": ("bread", "soup"),
    "music": ("drum", "song"),
    "rare": ("lion", "zebra"),
    "sport": ("goal", "match"),
}
FLAGS = (
    *("--stage=finetune", "--init_weights=random", "--initial_state=zero", "--units=16"),
    *("--finetune_steps=150", "--finetune_learning_rate=0.03", "--finetune_batch_size=32"),
    *("--embedding_dim=8", "--hidden_units=8", "--finetune_dropout=0", "--labels=multi"),
    *("--finetune_evaluate_every_steps=50", "--pooling=mean", "--class_weights=balanced"),
    *("--adversarial_weight=0.1", "--virtual_adversarial_weight=0.1", "--perturbation_norm=0.5"),
)


def write_texts(path: Path, count: int, seed: int) -> None:
    """Writes texts that have two words of each of their labels."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            labels = [name for name in WORDS if draw.random() < (0.1 if name == "rare" else 0.4)]
            words = [draw.choice(WORDS[name]) for name in labels for _ in range(2)]
            words += draw.choices(["the", "a", "of", "in"], k=4)
            draw.shuffle(words)
            file.write(json.dumps({"text": " ".join(words), "label": labels}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the texts and of their store."""
    folder = tmp_path_factory.mktemp("sets")
    for split, count in (("train", 500), ("validation", 100), ("test", 100)):
        write_texts(folder / f"{split}.jsonl", count, seed=count)
    files = ",".join(f"{name}={folder}/{name}.jsonl" for name in ("train", "validation", "test"))
    config = PrepareConfig(source=f"jsonl:{files}", labels="multi", min_count=1)
    store = ensure_store(config, folder / "store", lambda line: None)
    store.verify()
    assert store.class_names == tuple(WORDS) and store.label_sets.shape[1] == 4
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trained = tmp_path_factory.mktemp("trained")
    train(1, *FLAGS, f"--store={folder}/store", f"--run_dir={trained}")
    return trained


def test_the_labels_are_found(folder: Path, trained: Path, tmp_path: Path) -> None:
    flags = (f"--store={folder}/store", f"--classifier={trained}/classifier")
    train(1, "--stage=evaluate", *flags, f"--run_dir={tmp_path}")
    report = json.loads((tmp_path / "report.json").read_text())["test"]
    assert report["f1_micro"] > 0.9 and report["f1_macro"] > 0.8 and report["roc_auc"] > 0.9
    found = predictions.read(tmp_path / "predictions")
    tuned = json.loads((trained / "report.json").read_text())["finetune"]
    assert found.thresholds.tolist() == tuned["thresholds"]
    assert found.metrics() == {**report, "documents": 100}
    validation = tuned["validation"]
    assert validation["f1_micro"] >= 1 - validation["f1_error_percent"] / 100 - 1e-9
    page = (tmp_path / "report.html").read_text()
    assert "all labels, micro" in page and "ROC AUC" in page and "shaded for" in page


def test_predict_answers_sets(folder: Path, trained: Path, tmp_path: Path) -> None:
    model = load_classifier(trained / "classifier")
    texts = ["the song of the drum in a match goal", "a goal a match the goal", "the a of in"]
    found = model.predict(texts)
    assert [each.labels for each in found] == [["music", "sport"], ["sport"], []]
    assert [each.answer for each in found] == ["music|sport", "sport", ""]
    flags = ("--stage=predict", f"--classifier={trained}/classifier")
    run(1, *flags, f"--input={folder}/test.jsonl", f"--output={tmp_path}/out.jsonl", "--explain")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert np.mean([set(row["predicted"]) == set(row["label"]) for row in rows]) > 0.7
    for row in rows:
        assert set(row["contributions"]) >= set(row["predicted"]) and row["contributions"]
    (tmp_path / "in.csv").write_text("text,labels\n" + "".join(f"{t},x\n" for t in texts))
    run(1, *flags, f"--input={tmp_path}/in.csv", f"--output={tmp_path}/out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["predicted"] for row in csv.DictReader(file)] == [e.answer for e in found]
    done = run(1, *flags, texts[0], "--explain")
    first, *explained = done.stdout.splitlines()
    values = "|".join(f"{found[0].probabilities[name]:.4f}" for name in found[0].labels)
    assert first == f"music|sport\t{values}\t{texts[0]}"
    assert [line.split("\t")[1] for line in explained] == ["music", "sport"]


@pytest.mark.slow("quick: test_finetune_loss.py, and the whole job of test_training.py")
def test_two_workers_are_one_worker(folder: Path, trained: Path, tmp_path: Path) -> None:
    flags = (f"--store={folder}/store", f"--run_dir={tmp_path}", "--check_divergence=true")
    train(2, *FLAGS, *flags)
    one, two = metrics(trained), metrics(tmp_path)
    assert list(one) == list(two) == list(range(1, 151))
    np.testing.assert_allclose(list(two.values())[:40], list(one.values())[:40], rtol=1e-4)


@pytest.mark.slow("quick: the resumed fine-tuning of test_training.py, and test_thresholds.py")
def test_a_resumed_run_ends_with_the_same_bits(folder: Path, trained: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, f"--store={folder}/store", f"--run_dir={tmp_path}")
    assert train_until("step 85/150", signal.SIGKILL, 1, *flags) == -signal.SIGKILL
    assert "resumed after step" in train(1, *flags)
    assert_same_bits(final_state(trained), final_state(tmp_path))
    for name in ("classifier.safetensors", "classifier.json"):
        bundles = [each / "classifier" / name for each in (trained, tmp_path)]
        if name.endswith("json"):
            infos = [json.loads(bundle.read_text()) for bundle in bundles]
            assert infos[0]["thresholds"] == infos[1]["thresholds"]
        else:
            assert bundles[0].read_bytes() == bundles[1].read_bytes()


def test_what_does_not_fit_is_refused(
    folder: Path, trained: Path, small_store: Path, tmp_path: Path
) -> None:
    where = f"--run_dir={tmp_path}"
    done = run(1, *FLAGS, f"--store={small_store}", where)
    assert done.returncode == 2
    assert "the store was prepared with --labels=single: set it" in done.stderr
    flags = ("--stage=evaluate", f"--store={small_store}", f"--classifier={trained}/classifier")
    done = run(1, *flags, where)
    assert done.returncode == 2
    assert "--labels=multi, but the store was prepared with --labels=single" in done.stderr
