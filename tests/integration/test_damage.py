"""Each file of a checkpoint, bundle or store, damaged in each way: is docs/faults.md true?"""

from pathlib import Path

import pytest

from tests.integration import damage
from tests.integration.programs import run


@pytest.fixture(scope="module")
def good(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    damage.make_all(folder, small_store)
    return folder


def test_what_is_not_damaged_is_read(good: Path) -> None:
    for name, (_, read) in damage.ARTIFACTS.items():
        assert read(good) == "not noticed", name


def test_every_damage_is_noticed_and_the_table_is_true(good: Path) -> None:
    results = damage.all_results(good)
    assert len(results) == len(damage.DAMAGES) * (2 + 3 + 3 + 3 + 5 + 3 + 2)
    assert "not noticed" not in results.values()
    assert damage.written_table() == damage.table(results), (
        "run `python -m tests.integration.damage --write`"
    )


@pytest.mark.slow(
    "a trainer for each kind of damage; quick: the readers of every file, in one process"
)
def test_the_program_ends_with_one_line_and_exit_code_2(
    good: Path, small_store: Path, tmp_path: Path
) -> None:
    import shutil

    store = f"--store={small_store}"
    shutil.copytree(good / "encoder", tmp_path / "encoder")
    damage.truncate(tmp_path / "encoder" / "encoder.json")
    (tmp_path / "run" / "checkpoints" / "step-00000005").mkdir(parents=True)
    cases = {
        "encoder.json is damaged": ("--stage=finetune", f"--encoder={tmp_path}/encoder"),
        "no good checkpoint is left": ("--stage=pretrain", "--pretrain_steps=6"),
    }
    for says, flags in cases.items():
        done = run(1, store, f"--run_dir={tmp_path}/run", *flags)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr and "Traceback" not in done.stderr
        assert all(line.startswith("error: ") for line in done.stderr.splitlines())
