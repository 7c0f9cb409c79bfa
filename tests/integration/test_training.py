"""The main job's promises, on real text and real processes."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from benchmarks.kept_runs import halve
from data_pipelines.prepare import PrepareConfig, build_store, ensure_store
from data_pipelines.store.token_store import TokenStore
from tests.conftest import SomeReviews
from tests.integration.jobs import job
from tests.integration.programs import metrics, run, train, train_until
from trainer.inference.reconstruct import reconstructor
from trainer.report_page import run_folder


@pytest.fixture(scope="module")
def encoder(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an encoder bundle, pretrained for 40 steps in one process."""
    folder = tmp_path_factory.mktemp("pretrained")
    flags = (f"--store={small_store}", f"--run_dir={folder}", "--reconstruct_documents=20")
    train(1, "--stage=pretrain", *flags, *STEPS)
    return folder / "encoder"


STEPS = ("--pretrain_steps=40", "--finetune_steps=40")
# What is dropped depends on the number of workers.
WHOLE = (*STEPS, "--pretrain_dropout=0", "--finetune_dropout=0")
# TensorFlow's loops, as a machine without a compiler has them: fewer sizes are known while a step
# of several workers is traced.
IN_TENSORFLOW = {"WARMSTATE_NATIVE": "0"}


@pytest.fixture(scope="module")
def one_process(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the folder of the whole job in one process, and what was printed.

    Its classifiers are trained with 20 labels too.
    """
    folder = tmp_path_factory.mktemp("one")
    flags = (*WHOLE, "--label_counts=20", "--label_draws=1")
    return folder, train(1, *flags, f"--store={small_store}", f"--run_dir={folder}")


@pytest.fixture(scope="module")
def two_workers(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the folder of the whole job on two workers, and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    flags = (*WHOLE, f"--store={small_store}", f"--run_dir={folder}")
    return folder, train(2, *flags, **IN_TENSORFLOW)


@pytest.fixture(scope="module")
def two_of_horovod(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the same of two workers on Horovod, without training from scratch."""
    folder = tmp_path_factory.mktemp("horovod")
    flags = (*WHOLE, "--starts=warm", f"--store={small_store}", f"--run_dir={folder}/run")
    with job("horovod", folder, *flags) as running:
        assert running.finish() == 0, "\n".join(running.lines)
    return folder / "run", "\n".join(running.lines)


@pytest.mark.parametrize(
    "fixture",
    [
        "two_workers",
        pytest.param(
            "two_of_horovod",
            marks=[
                pytest.mark.horovod,
                pytest.mark.slow("quick: a model on two of Horovod in test_distribution.py"),
            ],
        ),
    ],
)
def test_the_whole_job_on_two_workers_is_that_of_one_process(
    one_process: tuple[Path, str], fixture: str, request: pytest.FixtureRequest
) -> None:
    one, (two, printed) = one_process[0], request.getfixturevalue(fixture)
    parts = {"pretrain": 1e-5, "scratch": 1e-4, "warm": 1e-4}
    if fixture == "two_of_horovod":
        del parts["scratch"]
    for part, tolerance in parts.items():
        expected, found = metrics(one / part), metrics(two / part)
        assert list(expected) == list(found) == list(range(1, 41))
        losses = list(expected.values())
        np.testing.assert_allclose(list(found.values()), losses, rtol=tolerance, err_msg=part)
    perplexities = [metrics(folder / "pretrain", "perplexity")[40] for folder in (one, two)]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-4)
    digests = json.loads((two / "report.json").read_text())["broadcast"]["digests"]
    assert len(digests) == 2 and len(set(digests)) == 1
    assert all(word not in printed for word in ("Traceback", "WARNING", "stall"))


def test_it_learns(one_process: tuple[Path, str]) -> None:
    # Single batches differ by more than 40 steps gain, ten of them do not.
    losses = list(metrics(one_process[0] / "pretrain").values())
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.05


@pytest.mark.slow("three workers, two layers; quick: the whole job on two")
def test_n_workers_are_one_worker(small_store: Path, tmp_path: Path) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", *WHOLE, "--num_layers=2")
    for count in (1, 3):
        train(count, *flags, f"--run_dir={tmp_path}/{count}")
    one, three = metrics(tmp_path / "1"), metrics(tmp_path / "3")
    assert list(one) == list(three) == list(range(1, 41))
    np.testing.assert_allclose(list(three.values()), list(one.values()), rtol=1e-5)
    (perplexity,) = metrics(tmp_path / "1", "perplexity").values()
    assert metrics(tmp_path / "3", "perplexity")[40] == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.slow("quick: test_distribution.py")
def test_a_batch_in_parts_is_the_same_batch(small_store: Path, tmp_path: Path) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", *WHOLE, "--pretrain_steps=15")
    train(1, *flags, f"--run_dir={tmp_path}/whole")
    parts = ("--accumulate_steps=5", "--sparse_reduce=rows", "--check_divergence=true")
    train(2, *flags, f"--run_dir={tmp_path}/parts", *parts)
    whole, in_parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert list(in_parts) == list(range(1, 16))
    np.testing.assert_allclose(list(in_parts.values()), list(whole.values()), rtol=1e-5)


BACKWARD = "--pretrain_direction=backward"
LANGUAGE_MODEL = ("--pretrain_objective=language_model", "--pretrain_dropout=0")
BAG = ("--pretrain_objective=bag_autoencoder", "--pretrain_dropout=0", "--tied_softmax=true")
# Rows so long that an epoch ends, and documents begin rows, within the steps of a test.
STREAM = (*LANGUAGE_MODEL, "--pretrain_packing=stream", "--pretrain_max_tokens=250")


@pytest.mark.slow("quick: the carried state's, and every_model")
@pytest.mark.parametrize(
    ("workers", "flags"),
    [
        (3, (*STREAM, "--check_divergence=true")),
        (2, (*BAG, "--pretrain_max_tokens=60", "--pretrain_bag_weight=5")),
        (2, (*STREAM, "--accumulate_steps=3", "--on_nonfinite=skip", BACKWARD)),
        (2, (*LANGUAGE_MODEL, "--tied_softmax=true", "--sampled_softmax=0", BACKWARD)),
    ],
)
def test_next_words_do_not_depend_on_the_workers(
    small_store: Path, tmp_path: Path, workers: int, flags: tuple[str, ...]
) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", "--pretrain_steps=24", *flags)
    train(1, *flags, f"--run_dir={tmp_path}/one")
    train(workers, *flags, f"--run_dir={tmp_path}/several")
    one, several = metrics(tmp_path / "one"), metrics(tmp_path / "several")
    assert list(one) == list(several) == list(range(1, 25))
    np.testing.assert_allclose(list(several.values()), list(one.values()), rtol=1e-5)
    assert np.mean(list(one.values())[-5:]) < np.mean(list(one.values())[:5]) - 0.05
    tensors = [final_state(tmp_path / name) for name in ("one", "several")]
    assert ("carried" in tensors[0]) == ("--pretrain_packing=stream" in flags)
    info = json.loads((tmp_path / "several" / "encoder" / "encoder.json").read_text())
    objective = "bag_autoencoder" if BAG[0] in flags else "language_model"
    assert info["objective"] == objective
    assert ("bag_error" in info["metrics"]) == (objective == "bag_autoencoder")
    assert info["direction"] == ("backward" if BACKWARD in flags else "forward")
    for name in tensors[0]:
        np.testing.assert_allclose(tensors[1][name], tensors[0][name], rtol=1e-3, atol=1e-4)


def test_a_carried_state_resumes_with_the_same_bits_and_on_other_workers(
    small_store: Path, tmp_path: Path
) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", *STREAM, "--pretrain_steps=24")
    flags += ("--checkpoint_every_steps=4",)  # each waits for the one before: some are there
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    train(1, *flags, f"--run_dir={whole}")
    killed = train_until("step 12/24", signal.SIGKILL, 1, *flags, f"--run_dir={cut}")
    assert killed == -signal.SIGKILL
    shutil.copytree(cut, other)
    assert "resumed after step" in train(1, *flags, f"--run_dir={cut}")
    assert_same_bits(final_state(whole), final_state(cut))
    assert np.abs(final_state(cut)["carried"]).min(axis=1).min() > 0
    # Twelve rows, of which each of two workers carries six.
    printed = train(2, *flags, f"--run_dir={other}", "--check_divergence=true")
    assert "resumed after step" in printed
    one, two = metrics(whole), metrics(other)
    assert list(one) == list(two) == list(range(1, 25))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    assert np.mean(list(one.values())[-5:]) < np.mean(list(one.values())[:5]) - 0.05
    expected, found = final_state(whole), final_state(other)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)
    info = json.loads((other / "encoder" / "encoder.json").read_text())
    assert (info["objective"], info["direction"]) == ("language_model", "forward")


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param(
            "--pretrain_tokens_per_batch=240",
            marks=pytest.mark.slow("quick: two workers are one, and test_batch_plan.py"),
        ),
        pytest.param(
            "--pretrain_packing=concat",
            marks=pytest.mark.slow("quick: the same"),
        ),
    ],
)
def test_batches_of_another_kind_train_and_do_not_depend_on_the_workers(
    small_store: Path, tmp_path: Path, flag: str
) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", *WHOLE, "--pretrain_steps=15", flag)
    for workers in (1, 2):
        train(workers, *flags, "--verify=true", f"--run_dir={tmp_path}/{workers}")
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert list(one) == list(range(1, 16))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)


def final_state(folder: Path) -> dict[str, np.ndarray]:
    (newest,) = sorted((folder / "checkpoints").glob("step-*"))[-1:]
    return safetensors.numpy.load_file(newest / "state.safetensors")


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys() and len(first) > 10
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_a_job_that_term_stops_ends_with_the_same_bits(
    small_store: Path, tmp_path: Path, two_workers: tuple[Path, str]
) -> None:
    whole = two_workers[0] / "pretrain"
    flags = ("--stage=pretrain", f"--store={small_store}", *WHOLE, f"--run_dir={tmp_path}")
    assert train_until("step 25/40", signal.SIGTERM, 2, *flags, **IN_TENSORFLOW) == 143
    assert "resumed after step" in train(2, *flags, **IN_TENSORFLOW)
    assert_resumed(whole, tmp_path)


@pytest.mark.slow("quick: the carried state's, and the job that TERM stops")
@pytest.mark.parametrize(("how", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_resumed_pretraining_ends_with_the_same_bits(
    small_store: Path, tmp_path: Path, how: signal.Signals, exit_code: int
) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", *STEPS)
    train(1, *flags, f"--run_dir={tmp_path}/whole")
    cut = (*flags, f"--run_dir={tmp_path}/cut")
    assert train_until("step 25/40", how, 1, *cut) == exit_code
    assert "resumed after step" in train(1, *cut)
    assert_resumed(tmp_path / "whole", tmp_path / "cut")


def assert_resumed(whole: Path, cut: Path) -> None:
    """Checks that two pretrainings ended with the same bits."""
    assert_same_bits(final_state(whole), final_state(cut))
    assert metrics(whole) == metrics(cut)
    encoders = [folder / "encoder" / "encoder.safetensors" for folder in (whole, cut)]
    assert encoders[0].read_bytes() == encoders[1].read_bytes()


def test_a_resumed_fine_tuning_ends_with_the_same_bits(
    small_store: Path, tmp_path: Path, encoder: Path
) -> None:
    flags = ("--stage=finetune", f"--store={small_store}", f"--encoder={encoder}", *STEPS)
    train(1, *flags, f"--run_dir={tmp_path}/whole")
    cut = (*flags, f"--run_dir={tmp_path}/cut")
    # Long before the end, for a busy machine kills late. One evaluation is before it.
    assert train_until("step 21/40", signal.SIGKILL, 1, *cut) == -signal.SIGKILL
    assert "resumed after step" in train(1, *cut)
    # The best weights so far and their step are state too.
    assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert any(name.startswith("+") for name in final_state(tmp_path / "cut"))
    assert metrics(tmp_path / "whole", "loss") == metrics(tmp_path / "cut", "loss")


@pytest.mark.slow("quick: test_logistic_regression.py, and 20 labels in one process")
def test_a_linear_head_starts_alike_on_any_number_of_workers(
    small_store: Path, tmp_path: Path, encoder: Path
) -> None:
    flags = ("--stage=finetune", f"--store={small_store}", f"--encoder={encoder}")
    flags += ("--hidden_units=0", "--pooling=mean", "--finetune_dropout=0", "--finetune_steps=4")
    flags += ("--self_training_documents=20",)
    for workers in (1, 2):
        printed = train(workers, *flags, f"--run_dir={tmp_path}/{workers}")
        assert "the linear head pseudo-labels half of 20 documents too" in printed
        assert "the linear head starts from a logistic regression" in printed
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
    assert next(iter(one.values())) < np.log(2) - 0.005  # nats: it begins better than at random


@pytest.mark.slow("quick: the carried state's")
def test_a_run_resumes_on_another_number_of_workers(small_store: Path, tmp_path: Path) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", *STEPS, "--pretrain_dropout=0")
    train(1, *flags, f"--run_dir={tmp_path}/whole")
    cut = (*flags, f"--run_dir={tmp_path}/cut")
    assert train_until("step 25/40", signal.SIGKILL, 1, *cut) == -signal.SIGKILL
    train(2, *cut)
    whole, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert list(resumed) == list(range(1, 41))
    np.testing.assert_allclose(list(resumed.values()), list(whole.values()), rtol=1e-5)


def test_pretraining_trains_the_learned_state_and_keeps_a_mean_one(encoder: Path) -> None:
    tensors = safetensors.numpy.load_file(encoder / "encoder.safetensors")
    for name in ("learned", "mean"):
        for part in "hc":
            state = tensors[f"states/{name}/0/{part}"]
            assert state.shape == (16,) and np.abs(state).max() > 0.01


def test_pretraining_writes_what_writes_texts_again(encoder: Path) -> None:
    (found,) = reconstructor(encoder, max_tokens=5)(["the film and the plot"])
    assert found.read == "the film and the" and len(found.written.split()) <= 5
    report = json.loads((encoder.parent / "report.json").read_text())["pretrain"]
    assert 0 <= report["exact_match_percent"] <= 100


@pytest.mark.parametrize(
    ("state", "workers"),
    [  # The whole job, below, has zero and learned.
        pytest.param("zero", 1, marks=pytest.mark.slow("quick: the whole job")),
        pytest.param("mean", 1, marks=pytest.mark.slow("quick: encode; and a run from mean below")),
        pytest.param("learned", 2, marks=pytest.mark.slow("quick: the whole job")),
        pytest.param("encode", 2, marks=pytest.mark.slow("quick: one worker")),
        ("encode", 1),
    ],
)
def test_stages_one_by_one_with_every_initial_state(
    small_store: Path, tmp_path: Path, encoder: Path, state: str, workers: int
) -> None:
    store = f"--store={small_store}"
    train(
        workers,
        "--stage=finetune",
        store,
        f"--run_dir={tmp_path}/fine",
        f"--encoder={encoder}",
        f"--initial_state={state}",
        *STEPS,
    )
    report = json.loads((tmp_path / "fine" / "report.json").read_text())["finetune"]
    digests = report["broadcast"]["digests"]
    assert len(digests) == workers and len(set(digests)) == 1
    flags = ("--stage=evaluate", store, "--evaluate_split=validation")
    train(1, *flags, f"--run_dir={tmp_path}/e", f"--classifier={tmp_path}/fine/classifier")
    evaluated = json.loads((tmp_path / "e" / "report.json").read_text())["validation"]
    # What is evaluated from the bundle is what training saw at its best step.
    of_training = report["validation"]
    assert {k: evaluated[k] for k in of_training} == pytest.approx(of_training, rel=1e-4)


@pytest.mark.slow("five trainings; quick: one direction here, both in test_every_model.py")
@pytest.mark.parametrize("state", ["learned", "encode"])
def test_two_directions(small_store: Path, tmp_path: Path, encoder: Path, state: str) -> None:
    store = f"--store={small_store}"
    backward = ("--stage=pretrain", "--pretrain_direction=backward", store, *STEPS)
    train(1, *backward, f"--run_dir={tmp_path}/backward")
    fine = ("--stage=finetune", store, f"--run_dir={tmp_path}/fine", f"--initial_state={state}")
    theirs = tmp_path / "backward" / "encoder"
    done = run(1, *fine, f"--encoder={theirs}", *STEPS)
    assert done.returncode == 2 and "/encoder reads backward: --encoder needs" in done.stderr
    train(2, *fine, f"--encoder={encoder}", f"--backward_encoder={theirs}", *STEPS)
    report = json.loads((tmp_path / "fine" / "report.json").read_text())["finetune"]
    assert len(set(report["broadcast"]["digests"])) == 1
    flags = ("--stage=evaluate", store, "--evaluate_split=validation")
    train(1, *flags, f"--run_dir={tmp_path}/e", f"--classifier={tmp_path}/fine/classifier")
    evaluated = json.loads((tmp_path / "e" / "report.json").read_text())["validation"]
    of_training = report["validation"]
    assert {k: evaluated[k] for k in of_training} == pytest.approx(of_training, rel=1e-4)


def test_the_whole_job_on_two_workers(
    two_workers: tuple[Path, str], small_store: Path, tmp_path: Path
) -> None:
    folder, printed = two_workers
    report = json.loads((folder / "report.json").read_text())
    assert report["world_size"] == 2
    assert report["pretrain"]["tokens_per_second"] > 0
    assert report["wall_seconds"] > 0
    for name in ("scratch", "warm"):
        error = report["test_error_percent"][name]
        assert 0 < error < 100
        assert f"{error:.2f} %" in printed
        kept = run_folder.read(folder).parts[name].predictions
        assert len(kept.label) == 60
        assert round(100 * kept.is_wrong.mean(), 3) == error
    # Each classifier records how it started, not how the whole job was configured.
    for name, start in (("warm", ("encoder", "learned")), ("scratch", ("random", "zero"))):
        info = json.loads((folder / name / "classifier" / "classifier.json").read_text())
        assert (info["config"]["init_weights"], info["config"]["initial_state"]) == start
    page = (folder / "report.html").read_text()
    assert "<h2>Calibration</h2>" in page and "<h2>Missing</h2>" not in page
    for digest in report["broadcast"]["digests"]:
        assert digest in printed
    assert "[worker 0] pretrain step 40/40 · epoch" in printed and "tokens/s · ETA" in printed
    # Run again, with one worker, it finds all done and says the same.
    again = shutil.copytree(folder, tmp_path / "again")
    train(1, *WHOLE, f"--store={small_store}", f"--run_dir={again}")
    found = json.loads((again / "report.json").read_text())
    assert found["test_error_percent"] == report["test_error_percent"]


def test_the_whole_job_with_few_labels_too(one_process: tuple[Path, str]) -> None:
    folder, printed = one_process
    report = json.loads((folder / "report.json").read_text())
    # Beside linear models.
    models = ["lsa", "nbsvm", "scratch", "tfidf", "warm"]
    for labels in (20, 200):
        rows = [row for row in report["labels"] if row["labels"] == labels]
        assert sorted(row["model"] for row in rows) == models
    few = json.loads((folder / "warm-20-0" / "classifier" / "classifier.json").read_text())
    assert (few["config"]["finetune_documents"], few["config"]["hidden_units"]) == (20, 0)
    assert "labels  from scratch  TF-IDF   NBSVM     LSA  warm start" in printed
    page = (folder / "report.html").read_text()
    assert "20 labels" in page and "200 labels" in page and "<h2>Missing</h2>" not in page


def test_bad_input_is_one_line_and_exit_code_2(
    small_store: Path, tmp_path: Path, encoder: Path
) -> None:
    store, folder = f"--store={small_store}", f"--run_dir={tmp_path}/run"
    other = tmp_path / "other"
    (tmp_path / "lines.txt").write_text("".join(f"a line, number {i}\n" for i in range(40)))
    lines = f"--source=text:{tmp_path}/lines.txt"
    fine = ("--stage=finetune", folder)
    cases = {
        "movie_revews": (folder, "--source=movie_revews"),
        "is larger than the data": (folder, "--stage=pretrain", lines, f"--store={other}"),
        "--finetune_documents=201 is more": (folder, store, "--finetune_documents=201"),
        "has 16; set --units=16": (*fine, store, f"--encoder={encoder}", "--units=13"),
    }
    for says, flags in cases.items():
        done = run(1, *flags)
        output = done.stdout + done.stderr
        faults = [line for line in output.splitlines() if says in line]
        assert done.returncode == 2, (says, output)
        assert faults and "Traceback" not in output, (says, output)
        assert not (tmp_path / "run" / "pretrain").exists()


def test_other_text_is_read_with_the_encoder_s_vocabulary_alone(
    tmp_path: Path, encoder: Path
) -> None:
    lines = [f"a line about number {i % 7}\t{i % 2}\n" for i in range(100)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + "".join(lines))
    source = f"tsv:train={tmp_path}/train.tsv,test={tmp_path}/test.tsv"
    ensure_store(PrepareConfig(source, vocab_size=11), tmp_path / "run/store", lambda line: None)
    flags = ("--stage=finetune", f"--encoder={encoder}", f"--run_dir={tmp_path}/run")
    done = run(1, *flags, f"--source={source}", "--vocab_size=11")  # a store that is there stays
    assert done.returncode == 2
    assert "was made with another vocabulary" in done.stderr
    new = (f"--source={source}", f"--store={tmp_path}/new")
    done = run(1, *flags, *new, "--vocab_size=11")
    assert done.returncode == 2
    assert "--vocab_size=11 does not go with --vocab_file" in done.stderr
    said = train(1, *flags, *new, "--finetune_steps=2")
    assert f"prepare: the vocabulary is that of {encoder}/vocab.txt" in said
    assert (tmp_path / "new" / "vocab.txt").read_bytes() == (encoder / "vocab.txt").read_bytes()
    of_run = (f"--classifier={tmp_path}/run/classifier", f"--run_dir={tmp_path}/evaluated")
    said = train(1, "--stage=evaluate", *of_run, f"--source={source}")
    assert f"prepare: the vocabulary is that of {tmp_path}/run/classifier/vocab.txt" in said


def test_a_fine_tuning_goes_on_from_the_encoder_that_it_began_with_alone(
    small_store: Path, tmp_path: Path, encoder: Path
) -> None:
    flags = ("--stage=finetune", f"--store={small_store}", f"--run_dir={tmp_path}/run")
    flags += ("--finetune_steps=2", "--initial_state=mean")
    train(1, *flags, f"--encoder={encoder}")
    shutil.copytree(encoder, tmp_path / "moved")
    halve(encoder, tmp_path / "other", "encoder")
    assert "resumed after step 2" in train(1, *flags, f"--encoder={tmp_path}/moved")
    done = run(1, *flags, f"--encoder={tmp_path}/other")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "began with another --encoder than it has now" in done.stderr
    assert "--resume=never" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow("quick: test_checkpoint.py, and what pretraining hands it in test_pretrain.py")
def test_a_pretraining_does_not_continue_with_another_store(
    small_store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    reviews = SomeReviews({"train": 180, "validation": 40, "test": 60})
    build_store(PrepareConfig("movie_reviews", vocab_size=1000), reviews, other, lambda line: None)
    flags = ("--stage=pretrain", f"--run_dir={tmp_path}/run", "--pretrain_steps=2")
    train(1, *flags, f"--store={small_store}")
    done = run(1, *flags, f"--store={other}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "began with another --store than it has now" in done.stderr
    assert f"its SHA-256 was {TokenStore(small_store).sha256[:12]}" in done.stderr


@pytest.mark.slow("quick: test_trackers.py and test_run_stage.py")
def test_neither_a_tracker_nor_the_page_that_fails_ends_a_training(
    small_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    (tmp_path / "report.html").mkdir()
    flags = ("--stage=pretrain", f"--store={small_store}", "--pretrain_steps=3")
    printed = train(1, *flags, f"--run_dir={tmp_path}", "--track=tensorboard")
    assert printed.count("warning: --track=tensorboard is off from here on") == 1
    assert f"warning: {tmp_path}/report.html cannot be written: Is a directory" in printed
    assert list(metrics(tmp_path)) == [1, 2, 3] and (tmp_path / "encoder").is_dir()
    assert json.loads((tmp_path / "report.json").read_text())["pretrain"]["steps"] == 3


@pytest.mark.slow("quick: test_preflight.py compares settings, test_checkpoint.py forgets")
def test_a_run_folder_of_other_settings_is_not_resumed(small_store: Path, tmp_path: Path) -> None:
    flags = ("--stage=pretrain", f"--store={small_store}", f"--run_dir={tmp_path}")
    train(1, *flags, "--pretrain_steps=3")
    done = run(1, *flags, "--pretrain_steps=3", "--seed=5")
    assert done.returncode == 2 and "--seed was 0 and is now 5" in done.stderr
    train(1, *flags, "--pretrain_steps=2", "--seed=5", "--resume=never")
    assert list(metrics(tmp_path)) == [1, 2]
    # Nothing of the first run is left for this one to resume from.
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
