"""--train: a frozen encoder, and a task of a few KB, on real text and real processes."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import SomeReviews
from tests.integration.equivalence import run_workers
from tests.integration.jobs import job
from tests.integration.programs import metrics, train, train_until
from tests.integration.test_training import final_state
from trainer.inference.export import export
from trainer.inference.task_bank import load_task
from trainer.models import bundle

SIZES = ("--embedding_dim=4", "--units=5", "--num_layers=2", "--hidden_units=0")
TUNE = ("--stage=finetune", "--finetune_steps=40", "--pooling=concat", *SIZES)
BOTH = "--train=state+bias"
WHOLE = "--finetune_dropout=0"  # what is dropped depends on the number of workers


def task_of(run_dir: Path) -> dict[str, np.ndarray]:
    return bundle.load(run_dir / "task", "task", "--task").tensors


@pytest.fixture(scope="module")
def tuned(
    small_store: Path, encoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Returns the folder of a run that trained states, biases and head in one process."""
    folder = tmp_path_factory.mktemp("tuned")
    data = (f"--store={small_store}", f"--encoder={encoder_bundle}")
    train(1, *TUNE, BOTH, WHOLE, *data, f"--run_dir={folder}")
    return folder


def test_what_is_frozen_stays_and_what_is_trained_is_the_task(
    tuned: Path, encoder_bundle: Path
) -> None:
    encoder = bundle.load(encoder_bundle, "encoder", "--encoder")
    classifier = bundle.load(tuned / "classifier", "classifier", "--classifier")
    task = bundle.load(tuned / "task", "task", "--task")
    assert task.info["encoder_sha256"] == encoder.info["tensors_sha256"]
    for name, value in classifier.tensors.items():
        if name in task.tensors:
            np.testing.assert_array_equal(value, task.tensors[name])
            of_encoder = encoder.tensors.get(name.replace("initial_state", "states/learned"))
            assert of_encoder is None or (of_encoder != value).any(), name
        else:
            np.testing.assert_array_equal(value, encoder.tensors[name])
    kinds = {name.split("/")[0] for name in task.tensors}
    assert kinds == {"lstm", "initial_state", "output"}
    assert sum(file.stat().st_size for file in (tuned / "task").iterdir()) < 8_000
    losses = list(metrics(tuned).values())
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_its_classifier_is_exported_and_answers_as_the_task_does(
    tuned: Path, encoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In another process, which starts TensorFlow anew, it is compared in test_export.py.
    monkeypatch.setattr("trainer.inference.export.largest_difference", lambda *_: 0.0)
    export(tuned / "classifier", tmp_path / "1")
    texts = [example.text for example in SomeReviews({"test": 60}).examples("test", "all")]
    signature = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    found = signature(texts=tf.constant(texts))["probabilities"]
    expected = load_task(encoder_bundle, tuned / "task").probabilities(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected[:, 0]) > 0.1


def test_only_the_task_is_broadcast_and_all_of_it_is_in_the_checkpoint(tuned: Path) -> None:
    task = task_of(tuned)
    report = json.loads((tuned / "report.json").read_text())["finetune"]
    assert report["broadcast"]["bytes"] == sum(array.nbytes for array in task.values())
    state = final_state(tuned)
    for name, value in task.items():  # the best of all evaluations, and the newest
        np.testing.assert_array_equal(state[f"+{name}"], value)
        assert state[name].shape == value.shape
    assert not {"embedding", "lstm/0/kernel", "lstm/0/recurrent_kernel"} & state.keys()


@pytest.mark.slow("quick: the bytes of one worker above, and the whole job on two workers")
@pytest.mark.parametrize(
    "kind", ["multi_worker", pytest.param("horovod", marks=pytest.mark.horovod)]
)
def test_on_two_workers_only_the_task_travels(
    kind: str, tuned: Path, small_store: Path, encoder_bundle: Path, tmp_path: Path
) -> None:
    flags = (*TUNE, BOTH, WHOLE, f"--store={small_store}", f"--encoder={encoder_bundle}")
    run_dir = tmp_path / "run"
    if kind == "horovod":
        with job("horovod", tmp_path, *flags, f"--run_dir={run_dir}") as running:
            assert running.finish() == 0, "\n".join(running.lines)
    else:
        train(2, *flags, f"--run_dir={run_dir}")
    one, two = task_of(tuned), task_of(run_dir)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-4, err_msg=name)
    report = json.loads((run_dir / "report.json").read_text())["finetune"]
    assert report["broadcast"]["bytes"] == sum(array.nbytes for array in two.values())
    assert len(report["broadcast"]["digests"]) == 2
    assert len(set(report["broadcast"]["digests"])) == 1


@pytest.mark.slow("quick: what the checkpoint holds, above; and test_training.py's fine-tuning")
@pytest.mark.parametrize(
    "options",
    [
        ("--train=state", "--finetune_ema=0.9", "--adversarial_weight=1", "--initial_state=zero"),
        ("--train=head", "--initial_state=mean", "--accumulate_steps=2"),
        (BOTH, "--recompute=true"),
    ],
    ids=lambda options: options[0],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    options: tuple[str, ...], small_store: Path, encoder_bundle: Path, tmp_path: Path
) -> None:
    flags = (*TUNE, *options, f"--store={small_store}", f"--encoder={encoder_bundle}")
    train(1, *flags, f"--run_dir={tmp_path}/whole")
    cut = (*flags, f"--run_dir={tmp_path}/cut")
    assert train_until("step 25/40", signal.SIGKILL, 1, *cut) == -signal.SIGKILL
    assert "resumed after step" in train(1, *cut)
    whole, again = (tmp_path / name / "task" / "task.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == again.read_bytes()
    head = "initial_state/0/h" in task_of(tmp_path / "whole")
    assert head and ("lstm/0/bias" in task_of(tmp_path / "whole")) == (BOTH in options)


EACH_ITS_OWN = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly()
from data_pipelines.errors import InputError
from trainer.distribution import cluster
from trainer.distribution.make import make_distributor
from trainer.stages import warm_start
distributor = make_distributor("auto", cluster.resolve(os.environ), 60.0)
run = SimpleNamespace(distributor=distributor)
try:
    warm_start._read_by_all(run, Path(sys.argv[1 + distributor.rank]), "--encoder")
except InputError as error:
    print(error)
"""


def test_workers_with_another_encoder_are_named(encoder_bundle: Path, tmp_path: Path) -> None:
    loaded = bundle.load(encoder_bundle, "encoder", "--encoder")
    loaded.tensors["lstm/0/bias"] += 1
    other = tmp_path / "other"
    bundle.save(other, "encoder", loaded.tensors, loaded.info, encoder_bundle / "vocab.txt")
    done = run_workers([sys.executable, "-c", EACH_ITS_OWN, str(encoder_bundle), str(other)], 2)
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        assert f"[worker {rank}] --encoder=" in done.stdout
    assert done.stdout.count("is another bundle for workers [1] (SHA-256") == 2
