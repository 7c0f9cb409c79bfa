import json
from pathlib import Path

import pytest

from benchmarks import kept_runs as results
from data_pipelines.errors import InputError
from tests.conftest import REPOSITORY
from tests.trainer import conftest as fixtures

classifier_bundle = fixtures.classifier_bundle
make_classifier_bundle = fixtures.make_classifier_bundle


def write_run(folder: Path, warm: float = 7.5, stage: str = "all") -> Path:
    """Writes what a run leaves that a result is made of."""
    part = folder / "warm"
    part.mkdir(parents=True)
    report = {
        "stage": stage,
        "test_error_percent": {"warm": warm, "scratch": 9.0},
        "wall_seconds": 600.0,
        "data_note": f"csv:{folder}/a.csv: split by a hash",
        "config": {"run_dir": str(folder), "data_dir": "/data", "source": f"csv:{folder}/a.csv"},
    }
    environment = {"cores": 2, "command": ["main.py", f"--run_dir={folder}"]}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [{"stage": "finetune", "step": step, "loss": 1 / step} for step in range(1, 1001)]
    (part / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_result_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    out = tmp_path / "imdb-seed0.json"
    result = results.record(write_run(tmp_path / "run"), out)
    assert json.loads(out.read_text()) == result
    assert str(tmp_path) not in out.read_text() and "/data" not in out.read_text()
    assert result["data_note"] == "csv:a.csv: split by a hash"
    assert results.without_folders("csv:s3://bucket/a.csv") == "csv:s3://bucket/a.csv"
    splits = "csv:train=/data/a.csv,test=/data/b.csv"
    assert results.without_folders(splits) == "csv:train=a.csv,test=b.csv"
    assert result["config"] == {"source": "csv:a.csv"} and result["environment"] == {"cores": 2}
    curve = result["curves"]["warm"]["loss"]
    assert len(curve) == results.CURVE_POINTS and curve[-1] == [1000, 0.001]


def test_runs_of_one_recipe_are_one_row_and_the_best_is_first(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for seed, error in enumerate((7.0, 8.0)):
        run = write_run(tmp_path / f"run-{seed}", error)
        results.record(run, folder / f"imdb-seed{seed}.json")
    results.record(write_run(tmp_path / "other", 5.0), folder / "other.json")
    rows = results.table(folder).splitlines()
    assert rows[2].startswith("| other, warm start | 5.00 % | run here, 1 run | 10 min on 2 cores")
    (both,) = [row for row in rows if row.startswith("| imdb, warm start |")]
    assert "| 7.50 % (7.00-8.00) | run here, 2 runs |" in both


def test_what_the_kept_bundle_gave_goes_with_the_result(tmp_path: Path) -> None:
    run, evaluation = write_run(tmp_path / "run"), write_run(tmp_path / "evaluated")
    out = tmp_path / "imdb-seed0.json"
    with pytest.raises(InputError, match="is no run of --stage=evaluate"):
        results.record(run, out, evaluation)
    found = {"stage": "evaluate", "test": {"error_percent": 7.51, "documents": 25000}}
    (evaluation / "report.json").write_text(json.dumps(found))
    assert results.record(run, out, evaluation)["kept_bundle"]["test"] == found["test"]


def write_finetuning(folder: Path, error: float, refit: bool = False) -> Path:
    """Writes what another fine-tuning and its test leave."""
    tuned = {"broadcast": {"digests": ["abc", "abc"]}, "encoder_sha256": "e16", "seconds": 100.0}
    if not refit:
        tuned["validation"] = {"error_percent": 6.0}
    report = {
        "stage": "finetune",
        "world_size": 1,
        "data_note": "made up",
        "wall_seconds": 120.0,
        "config": {"seed": 1, "finetune_refit": refit},
        "finetune": tuned,
    }
    for name, values in (("finetune", report), ("test", {"test": {"error_percent": error}})):
        (folder / name).mkdir(parents=True)
        (folder / name / "report.json").write_text(json.dumps(values))
        (folder / name / "environment.json").write_text(json.dumps({"cores": 2}))
    (folder / "finetune/metrics.jsonl").write_text(json.dumps({"step": 5, "loss": 0.5}) + "\n")
    return folder


def test_other_finetunings_are_in_the_row_and_refits_have_their_own(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", 7.0), tmp_path / "results/imdb.json"
    report = json.loads((run / "report.json").read_text())
    report["broadcast"] = {"digests": ["abc"]}
    (run / "report.json").write_text(json.dumps(report))
    out.parent.mkdir()
    results.record(run, out)
    again = write_finetuning(tmp_path / "again", 8.0)
    refit = write_finetuning(tmp_path / "refit", 6.0, refit=True)
    assert results.main(["again", str(out), str(again), str(refit)]) == 0
    rows = results.table(out.parent).splitlines()
    assert any("7.50 % (7.00-8.00) | run here, 1 run, 2 fine-tunings |" in row for row in rows)
    start = "| imdb, refitted on validation too | 6.00 % | run here, 1 refit |"
    assert any(row.startswith(start) for row in rows)
    results.record(run, out)
    assert results.table(out.parent).splitlines() == rows
    report["broadcast"] = {"digests": ["another"]}
    (run / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="fine-tunings from another encoder: choose another"):
        results.record(run, out)


def test_a_finetuning_from_another_encoder_is_refused(tmp_path: Path) -> None:
    out, again = tmp_path / "imdb.json", write_finetuning(tmp_path / "again", 8.0)
    out.write_text(json.dumps({"broadcast": {"digests": ["another"]}}))
    with pytest.raises(InputError, match="starts from another encoder"):
        results.add_finetunings(out, [again])
    kept = tmp_path / "imdb/encoder/encoder.json"  # the one in float16
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"tensors_sha256": "e16"}))
    assert results.add_finetunings(out, [again])["finetuned_again"][0]["seed"] == 1
    with pytest.raises(InputError, match="again is in .*imdb.json already"):
        results.add_finetunings(out, [again])


def test_a_finetuning_of_a_results_encoder_can_be_a_result_itself(tmp_path: Path) -> None:
    base, out = tmp_path / "base.json", tmp_path / "of/other.json"
    out.parent.mkdir()
    folder = write_finetuning(tmp_path / "run", 6.4)
    digests, pretraining = ["another"], {"steps": 9, "seconds": 500.0}
    curve = {"pretrain": {"loss": [[1, 2.0]]}}
    parts = {"pretrain": pretraining, "curves": curve, "broadcast": {"digests": digests}}
    base.write_text(json.dumps(parts))
    command = ["record", str(folder), f"--encoder_of={base}", f"--out={out}"]
    assert results.main(command) == 2 and not out.exists()
    digests[:] = ["abc"]
    base.write_text(json.dumps(parts))
    assert results.main(command) == 0
    result = json.loads(out.read_text())
    assert result["pretrain"] == pretraining and result["name"] == "other"
    assert result["curves"]["warm"]["loss"] == [[5, 0.5]]
    assert result["curves"]["pretrain"] == curve["pretrain"]
    (row,) = [row for row in results.table(tmp_path / "of").splitlines() if "other" in row]
    assert row == "| other, warm start | 6.40 % | run here, 1 run | 10 min on 2 cores |"
    assert results.main([*command, "--time=its parts'"]) == 0
    (row,) = [row for row in results.table(tmp_path / "of").splitlines() if "other" in row]
    assert row == "| other, warm start | 6.40 % | run here, 1 run | its parts' |"
    whole = ["record", str(folder), f"--out={tmp_path / 'whole.json'}", "--time=its parts'"]
    assert results.main(whole) == 2


def test_the_time_is_that_of_all_sittings() -> None:
    parts = {"pretrain": {"seconds": 500.0}, "warm": {"seconds": 300.0}}
    assert results.seconds_of({"wall_seconds": 90.0, **parts}) == 800
    assert results.seconds_of({"wall_seconds": 900.0, **parts}) == 900


def test_a_run_of_one_start_is_one_row(tmp_path: Path) -> None:
    folder, run = tmp_path / "results", write_run(tmp_path / "run")
    folder.mkdir()
    report = json.loads((run / "report.json").read_text())
    del report["test_error_percent"]["warm"]
    (run / "report.json").write_text(json.dumps(report))
    results.record(run, folder / "tuned-seed0.json")
    (row,) = [row for row in results.table(folder).splitlines() if row.startswith("| tuned")]
    assert row == "| tuned, from scratch | 9.00 % | run here, 1 run | 10 min on 2 cores |"


def test_the_results_that_are_kept_make_a_table() -> None:
    kept = list((REPOSITORY / "results").glob("*.json"))
    rows = results.table(REPOSITORY / "results").splitlines()
    assert kept and sum("run here" in row for row in rows) >= 2


@pytest.mark.parametrize(
    ("page", "names"), [("README.md", results.HEADLINE), ("docs/reproduction.md", ())]
)
def test_the_pages_show_the_kept_results(page: str, names: tuple[str, ...]) -> None:
    text = (REPOSITORY / page).read_text()
    shown = text.partition(results.BEGIN)[2].partition(results.END)[0].strip()
    assert shown == results.table(REPOSITORY / "results", names)
    assert len(shown.splitlines()) >= 2 + len(names)


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        results.record(tmp_path, tmp_path / "a.json")
    with pytest.raises(InputError, match="is of --stage=pretrain"):
        results.record(write_run(tmp_path / "run", stage="pretrain"), tmp_path / "a.json")
    readme = tmp_path / "README.md"
    readme.write_text(results.BEGIN)
    with pytest.raises(InputError, match="needs the lines"):
        results.write_table(readme, tmp_path)


def test_what_lies_in_the_place_of_a_kept_classifier_stays(
    classifier_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "other.json").write_text("{}")
    command = ["halve", str(classifier_bundle), f"--out={tmp_path}/results"]
    assert results.main(command) == 2
    assert "results is there already: name a new folder" in capsys.readouterr().err
    assert (tmp_path / "results" / "other.json").read_text() == "{}"
    assert results.main([*command[:2], f"--out={tmp_path}/results/kept"]) == 0


def test_a_table_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert results.main(["table", f"--results={tmp_path}", f"--readme={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"
