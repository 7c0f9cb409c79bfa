"""The page of figures is what the last measurement printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import warmstate
from benchmarks import (
    ablation,
    candidates,
    cross_validation,
    distil,
    label_efficiency,
    state_positions,
    state_tuning,
)
from benchmarks import all as benchmarks
from benchmarks.processes import descendants_megabytes, peak_megabytes
from trainer.models import bundle
from trainer.reporting.report_file import errors_by_labels

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_page_is_that_of_the_results() -> None:
    assert benchmarks.PAGE.read_text() == benchmarks.page(), "run python -m benchmarks.all --render"


@pytest.mark.parametrize("scale", ["", "-imdb"])
def test_the_pages_of_states_are_those_of_the_results(scale: str) -> None:
    results = REPOSITORY / "benchmarks/results" / f"learned_states{scale.replace('-', '_')}.json"
    page = REPOSITORY / "docs" / f"learned-states{scale}.md"
    assert page.read_text() == ablation.render(json.loads(results.read_text()))


def test_the_picture_of_states_is_that_of_the_results() -> None:
    assert state_positions.PICTURE.read_text() == state_positions.picture(state_positions.kept())


def test_the_page_of_tuning_has_the_table_of_the_results() -> None:
    held = json.loads((REPOSITORY / "benchmarks/results/state_tuning.json").read_text())
    page = (REPOSITORY / "docs/initialising-lstm-state.md").read_text()
    assert state_tuning.table(held["results"]) in page


def test_the_page_of_results_has_the_table_of_the_folds() -> None:
    path = REPOSITORY / "benchmarks/results/rotten_tomatoes_folds.json"
    page = (REPOSITORY / "docs/reproduction.md").read_text()
    assert cross_validation.table(json.loads(path.read_text())["results"]["rows"]) in page


def test_equal_texts_are_in_one_fold_whatever_their_order() -> None:
    documents = [(f"text {number % 90}", number % 2) for number in range(180)]
    parts = cross_validation.folds(documents, 10)
    assert [len(part) for part in parts] == [18] * 10
    texts = [{text for text, _ in part} for part in parts]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 90
    assert [set(part) for part in cross_validation.folds(documents[::-1], 10)] == [
        set(part) for part in parts
    ]


def test_the_splits_of_a_fold_are_read_and_share_no_document(tmp_path: Path) -> None:
    documents = [(f"text {number}", number % 2) for number in range(40)]
    parts = cross_validation.folds(documents, 4)
    tested = set()
    for fold in range(4):
        spec = cross_validation.write_splits(parts, fold, tmp_path / str(fold))
        found = cross_validation.labelled_documents(spec, None)
        assert sorted(found) == sorted(documents)
        lines = (tmp_path / str(fold) / "test.jsonl").read_text().splitlines()
        tested |= {json.loads(line)["text"] for line in lines}
    assert tested == {text for text, _ in documents}


def test_differences_of_the_folds_are_paired() -> None:
    wrong = np.array([True, False, False, False])
    rows = cross_validation.summary(
        [{"warm": wrong, "tfidf": ~wrong}, {"warm": wrong, "tfidf": wrong}]
    )
    assert [row["errors_percent"] for row in rows] == [[25.0, 25.0], [75.0, 25.0]]
    assert rows[0]["more_than_the_first_percent"] == [0.0, 0.0, 0.0]
    assert rows[1]["more_than_the_first_percent"][0] == 25.0


def test_candidates_are_judged_on_all_labels_but_the_test_splits(tmp_path: Path) -> None:
    splits = {"train": 4, "validation": 3, "test": 2, "unsupervised": 5}
    for split, count in splits.items():
        label = {} if split == "unsupervised" else {"label": 1}
        lines = [json.dumps({"text": f"{split} {number}"} | label) for number in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    spec = "jsonl:" + ",".join(f"{split}={tmp_path}/{split}.jsonl" for split in splits)
    labelled, unlabelled = candidates.read(spec, None)
    assert sorted({text.split()[0] for text, _ in labelled}) == ["train", "validation"]
    assert (len(labelled), len(unlabelled)) == (7, 5)


def test_a_candidate_of_other_flags_has_another_folder(tmp_path: Path) -> None:
    flagfile = tmp_path / "flags.cfg"
    flagfile.write_text("--seed=1\n")
    names = [
        candidates.candidate(text).folder(str(flagfile))
        for text in ("a", "a: --units=2", "a: --units=3", "b")
    ]
    flagfile.write_text("--seed=2\n")
    names.append(candidates.candidate("a").folder(str(flagfile)))
    assert len(set(names)) == 5
    assert candidates.candidate("a: --units=2 --seed=1") == ("a", ["--units=2", "--seed=1"])


@pytest.mark.slow("twelve programs, at their smallest")
def test_candidates_are_compared_on_every_fold(tmp_path: Path, encoder_bundle: Path) -> None:
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    rows = [{"text": f"{'good' if n % 2 else 'bad'} film {n}", "label": n % 2} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = bundle.read_info(encoder_bundle, "encoder", "--encoder")["model"]
    flags = [f"--{name}={sizes[name]}" for name in ("embedding_dim", "units", "num_layers")]
    flags += ["--finetune_steps=2", "--finetune_batch_size=8"]
    (tmp_path / "flags.cfg").write_text("\n".join(flags) + "\n")
    command = [sys.executable, "-m", "benchmarks.candidates", "--flagfile=flags.cfg", "--folds=3"]
    command += [f"--source=jsonl:train={tmp_path}/rows.jsonl", f"--encoder={encoder_bundle}"]
    command += ["--work=work", "--candidate=as it is", "--candidate=more: --finetune_steps=3"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "benchmarks/results/candidates.json").read_text())["results"]
    assert [row["model"] for row in kept["rows"]] == ["as it is", "more"]
    assert kept["documents"] == len(rows)
    assert candidates.table(kept["rows"]) in done.stdout


def test_one_wholly_sure_teacher_does_not_outvote_four_others() -> None:
    sure, others = [[1.0, 0.0]], [[0.01, 0.99]]
    mean = distil.mean_of(np.array([sure, *[others] * 4]))
    assert mean.sum() == pytest.approx(1)
    assert mean[0, 1] > 0.5
    assert distil.mean_of(np.array([others]))[0] == pytest.approx(others[0])


def test_teachers_label_what_they_are_sure_of_and_no_text_that_is_held_out(tmp_path: Path) -> None:
    def write(split: str, texts: list[str]) -> None:
        rows = [{"text": text, "label": "neg" if "bad" in text else "pos"} for text in texts]
        if split == "unsupervised":
            rows = [{"text": row["text"]} for row in rows]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)

    words = ("bad", "good")
    write("train", [f"a {words[n % 2]} film {n}" for n in range(64)])
    write("validation", ["a bad film", "a good film"])
    write("test", ["the bad film", "the good film"])
    write("unsupervised", ["a bad bad film", "a good good film", "good bad", "the good film"])
    splits = ("train", "validation", "test", "unsupervised")
    spec = "jsonl:" + ",".join(f"{split}={tmp_path}/{split}.jsonl" for split in splits)
    store = warmstate.prepare(tmp_path / "store", source=spec)
    flags = {"units": 8, "embedding_dim": 8, "finetune_steps": 60, "finetune_learning_rate": 0.02}
    teacher = warmstate.finetune(tmp_path / "teacher", store, **flags, finetune_batch_size=16)

    out = tmp_path / "student"
    command = [f"--source={spec}", f"--teacher={teacher.folder}", f"--out={out}"]
    assert distil.main(command) == 0
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    taught = [(row["text"], row["label"]) for row in rows[2 * 64 :]]
    assert taught[:2] == [("a bad bad film", "neg"), ("a good good film", "pos")]
    assert "the good film" not in [text for text, _ in taught]
    assert rows[:64] == rows[64:128]
    student = "jsonl:" + ",".join(f"{split}={out}/{split}.jsonl" for split in splits[:3])
    assert len(warmstate.prepare(tmp_path / "taught", source=student).split("train")) == len(rows)


def test_a_teacher_of_other_classes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "validation", "test", "unsupervised"):
        label = {} if split == "unsupervised" else {"label": "x"}
        lines = [json.dumps({"text": f"{split} text", **label}) + "\n"] * 2
        (tmp_path / f"{split}.jsonl").write_text("".join(lines).replace('"x"', '"y"', 1))
    spec = f"jsonl:train={tmp_path}/train.jsonl,test={tmp_path}/test.jsonl"
    command = [f"--teacher={REPOSITORY / 'results/imdb_cpu'}", f"--out={tmp_path / 'out'}"]
    assert distil.main([f"--source={spec}", *command]) == 2
    assert "has no split unsupervised" in capsys.readouterr().err
    splits = ("train", "validation", "test", "unsupervised")
    spec = "jsonl:" + ",".join(f"{split}={tmp_path}/{split}.jsonl" for split in splits)
    assert distil.main([f"--source={spec}", *command]) == 2
    assert "has the classes neg, pos, and --source x, y" in capsys.readouterr().err


def test_the_page_of_labels_is_that_of_the_results() -> None:
    result = json.loads(label_efficiency.RESULT.read_text())
    assert label_efficiency.PAGE.read_text() == label_efficiency.page(result)
    assert label_efficiency.PICTURE.read_text() == label_efficiency.picture(result)


@pytest.mark.parametrize(
    ("init_weights", "model"),
    [("random", "imdb_cpu_scratch"), ("encoder", "imdb_cpu_sequence_autoencoder")],
)
def test_a_finetuning_on_few_labels_is_a_row_of_its_start(
    tmp_path: Path, init_weights: str, model: str
) -> None:
    config = {
        "seed": 2,
        "init_weights": init_weights,
        "pretrain_objective": "sequence_autoencoder",
    }
    for name, report in (
        ("finetune", {"config": config, "finetune": {"labelled_documents": 200}}),
        ("test", {"test": {"error_percent": 20.5}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        (tmp_path / name / "environment.json").write_text("{}")
    row = label_efficiency.finetuned_row(tmp_path)
    assert row == {"model": model, "draw": 2, "labels": 200, "test_error_percent": 20.5}


def test_the_readme_has_the_demos_errors() -> None:
    rows = json.loads((REPOSITORY / "benchmarks/results/demo.json").read_text())["labels"]
    readme = (REPOSITORY / "README.md").read_text()
    for labels, models in errors_by_labels(rows).items():
        means = [f"{sum(errors) / len(errors):.1f}" for errors in models.values()]
        assert f"| {labels:,} | {' | '.join(means)} |" in readme


def test_the_peak_of_memory_is_that_of_the_process_not_of_who_started_it() -> None:
    held = np.ones(40_000_000)
    program = "from benchmarks.processes import peak_megabytes; print(peak_megabytes())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert 1 < float(done.stdout) < 100 < held.nbytes / 2**20 < peak_megabytes()


def test_the_memory_of_descendants_is_counted() -> None:
    program = "import sys; held = b'x' * 200_000_000; print(flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    before = descendants_megabytes(os.getpid())
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], **pipes) as process:
        process.stdout.readline()
        assert 190 < descendants_megabytes(os.getpid()) - before < 300
        process.stdin.close()


@pytest.mark.slow("an ablation, at its smallest")
def test_the_ablation_of_states_runs_to_its_page(tmp_path: Path) -> None:
    out, page = tmp_path / "states.json", tmp_path / "states.md"
    command = [sys.executable, "-m", "benchmarks.ablation"]
    command += ["--flagfile=trainer/configs/ablation.cfg", "--scale=smoke", "--precision=auto"]
    command += ["--objectives=language_model", "--seeds=2", f"--run_dir={tmp_path / 'run'}"]
    command += [f"--out={out}", f"--page={page}"]
    subprocess.run(command, check=True)
    result = json.loads(out.read_text())
    assert all(len(errors) == 2 for errors in result["test_error_percent"].values())
    assert len(result["test_error_percent"]) == 2 * len(ablation.STATES)
    assert page.read_text() == ablation.render(result)
