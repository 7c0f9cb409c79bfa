"""`warmstate sweep`: what it searches, and a sweep of real runs that is stopped and continued."""

import json
import shutil
import signal
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import REPOSITORY
from tests.integration.programs import SMALL
from warmstate import sweep
from warmstate.sweep import Range, parse_space

optuna = pytest.importorskip("optuna")
RUN = (
    *(flag for flag in SMALL if not flag.startswith("--finetune_learning_rate")),
    *("--stage=finetune", "--init_weights=random", "--initial_state=zero"),
    "--finetune_evaluate_every_steps=4",
)


def test_what_is_searched() -> None:
    text = (
        "finetune_learning_rate=1e-4:1e-2:log,units=8:32,--pooling=last|mean,label_smoothing=0:.5"
    )
    assert parse_space(text) == {
        "finetune_learning_rate": Range(1e-4, 1e-2, True),
        "units": Range(8, 32, False),
        "pooling": ["last", "mean"],
        "label_smoothing": Range(0, 0.5, False),
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = sweep.suggested(study.ask(), parse_space(text))
    assert 8 <= int(found["units"]) <= 32 and found["pooling"] in ("last", "mean")
    assert 1e-4 <= float(found["finetune_learning_rate"]) <= 1e-2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "--search names no flag"),
        ("unit=8:32", "'unit' is no flag of a run; did you mean units?"),
        ("units=8", "is not NAME=LOW:HIGH"),
        ("units=32:8", "LOW must be below HIGH"),
        ("finetune_learning_rate=0:1:log", "for log above 0"),
        ("units=a:b", "is not LOW:HIGH, two numbers"),
        ("pooling=last:mean", "is not NAME=LOW:HIGH"),
    ],
)
def test_faults_of_what_is_searched(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="--search") as fault:
        parse_space(text)
    assert says in str(fault.value)


def command(folder: Path, trials: int, *run: str) -> list[str]:
    search = "--search=finetune_learning_rate=1e-4:1e-1:log,hidden_units=0|4"
    words = [f"--out={folder}", f"--trials={trials}", search, "--seed=3", "--", *run]
    return [sys.executable, "-m", "warmstate", "sweep", *words]


def run(folder: Path, trials: int, *flags: str) -> "forked.subprocess.CompletedProcess":
    return forked.run(
        command(folder, trials, *flags), cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


def trials(folder: Path) -> list[tuple]:
    """Returns number, value and parameters of each trial in the database."""
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'sweep.db'}")
    return [(t.number, t.value, sorted(t.params.items())) for t in study.trials]


def test_a_sweep_of_runs_is_stopped_and_continued(small_store: Path, tmp_path: Path) -> None:
    flags = [*RUN, "--finetune_steps=8", f"--store={small_store}"]
    whole = run(tmp_path / "whole", 2, *flags)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    # As a kill leaves it: the second trial was asked for and has no result.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "trial-0001")
    with sqlite3.connect(tmp_path / "parts" / "sweep.db") as database:
        database.execute("DELETE FROM trial_values WHERE trial_id >= 2")
        database.execute("UPDATE trials SET state = 'RUNNING' WHERE trial_id = 2")
    continued = run(tmp_path / "parts", 2, *flags)
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert trials(tmp_path / "parts") == trials(tmp_path / "whole")
    assert continued.stdout.splitlines()[-3:-1] == whole.stdout.splitlines()[-3:-1]
    best = min(trials(tmp_path / "whole"), key=lambda trial: trial[1])
    last = whole.stdout.splitlines()[-1]
    assert last == f"best: --flagfile={tmp_path}/whole/trial-{best[0]:04d}/config.cfg"
    report = json.loads((tmp_path / "whole" / "trial-0001" / "report.json").read_text())
    assert report["finetune"]["validation"]["error_percent"] == trials(tmp_path / "whole")[1][1]


def test_trials_that_fail_are_told(small_store: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "a", 2, "--stage=finetune", f"--store={small_store}", "--units=8")
    assert done.returncode == 1  # without an encoder
    assert done.stdout.count("failed with exit code 2: see") == 2
    assert "needs an encoder" in (tmp_path / "a" / "trial-0000" / "log.txt").read_text()


def test_faults_are_all_told_before_anything_runs(tmp_path: Path) -> None:
    flags = ("--stage=evaluate", "--hidden_units=3", "--run_dir=x", "--finetune_refit")
    done = run(tmp_path / "a", 0, *flags)
    assert done.returncode == 2 and not (tmp_path / "a").exists()
    for says in (
        "--trials=0 must be at least 1",
        "--run_dir is given behind -- and by the sweep",
        "--hidden_units is given behind -- and by the sweep",
        "--stage=evaluate cannot be swept",
        "--finetune_refit has no validation error to compare",
    ):
        assert says in done.stderr


def test_term_stops_the_sweep_and_its_trial(small_store: Path, tmp_path: Path) -> None:
    flags = [*RUN, "--finetune_steps=100000", f"--store={small_store}"]
    process = forked.Popen(
        command(tmp_path / "a", 2, *flags), cwd=REPOSITORY, stdout=-1, stderr=-2, text=True
    )
    try:
        assert "trial 1 of 2" in process.stdout.readline()
        log = tmp_path / "a" / "trial-0000" / "log.txt"
        while process.poll() is None and not (log.exists() and "step 2/" in log.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, said
    assert "stopped by TERM" in log.read_text() and "the same command continues" in said
