"""Virtual adversarial training with unlabelled reviews, on several workers, and resumed."""

import signal
from pathlib import Path

import numpy as np
import pytest

from tests.integration.programs import metrics, train, train_until
from tests.integration.test_training import assert_same_bits, final_state
from tests.trainer.stages.test_finetune_batches import half_labelled_store  # noqa: F401

FLAGS = (
    "--stage=finetune",
    "--init_weights=random",
    "--initial_state=zero",
    "--finetune_steps=20",
    "--vocab_size=400",
    "--adversarial_weight=1",
    "--virtual_adversarial_weight=1",
    "--unlabelled_batch_size=5",
)


@pytest.mark.slow("three sizes of a job; quick: test_training.py, and test_finetune_loss.py")
def test_n_workers_are_one_worker(half_labelled_store: Path, tmp_path: Path) -> None:  # noqa: F811
    losses = {}
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        flags = (*FLAGS, "--finetune_dropout=0", f"--run_dir={folder}", "--check_divergence=true")
        train(workers, *flags, f"--store={half_labelled_store}")
        losses[workers] = list(metrics(folder).values())
        assert len(losses[workers]) == 20
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    np.testing.assert_allclose(losses[3], losses[1], rtol=1e-4)


@pytest.mark.slow("three trainings; quick: the resumed fine-tuning of test_training.py")
def test_a_resumed_run_ends_with_the_same_bits(half_labelled_store: Path, tmp_path: Path) -> None:  # noqa: F811
    flags = (*FLAGS, f"--store={half_labelled_store}", "--finetune_ema=0.9")
    train(1, *flags, f"--run_dir={tmp_path}/whole")
    cut = (*flags, "--checkpoint_every_steps=5", f"--run_dir={tmp_path}/cut")
    assert train_until("step 13/20", signal.SIGKILL, 1, *cut) == -signal.SIGKILL
    assert "resumed after step" in train(1, *cut)
    assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    classifiers = [tmp_path / name / "classifier" for name in ("whole", "cut")]
    weights = [(folder / "classifier.safetensors").read_bytes() for folder in classifiers]
    assert weights[0] == weights[1]
