import dataclasses
import json
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from trainer.config import Config
from trainer.stages.replay import config_of_run, describe


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Returns the folder of a run of --stage=all with a store of its own."""
    (tmp_path / "run" / "store").mkdir(parents=True)
    (tmp_path / "run" / "store" / "manifest.json").write_text("{}")
    write(tmp_path / "run", Config(stage="all", run_dir="elsewhere", units=7, initial_state="mean"))
    return tmp_path / "run"


def write(folder: Path, config: Config) -> None:
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))


def of(folder: Path, **flags) -> Config:
    return config_of_run(Config(stage="replay", run_dir=str(folder), step=5, **flags))


def test_each_part_of_the_whole_job_is_a_stage_with_its_flags(run: Path) -> None:
    found = {name: of(run / name) for name in ("pretrain", "warm", "scratch")}
    assert [c.stage for c in found.values()] == ["pretrain", "finetune", "finetune"]
    for name, config in found.items():
        assert (config.step, config.units, config.run_dir) == (5, 7, str(run / name))
        assert config.store == str(run / "store")
    assert found["warm"].encoder == str(run / "pretrain" / "encoder")
    assert (found["warm"].initial_state, found["scratch"].initial_state) == ("mean", "zero")
    assert found["scratch"].init_weights == "random" and not found["scratch"].needs_encoder


def test_what_may_differ_is_taken_from_the_command_line(run: Path, tmp_path: Path) -> None:
    write(run, Config(stage="pretrain", store=str(tmp_path / "moved"), units=7))
    with pytest.raises(InputError, match="moved, which the run read, is gone: name its --store"):
        of(run)
    config = of(run, store=str(run / "store"), units=9)
    assert (config.stage, config.units) == ("pretrain", 7)


def test_trackers_and_the_status_port_are_left_to_the_run(run: Path) -> None:
    write(run, Config(stage="pretrain", track="mlflow", status_port=9100, stall_seconds=3.0))
    config = of(run, status_port=9200)
    assert (config.track, config.status_port, config.stall_seconds) == ("", 9200, 3.0)


def test_a_step_that_the_run_does_not_come_to_is_named(run: Path) -> None:
    write(run, Config(stage="finetune", finetune_steps=4))
    with pytest.raises(InputError, match="--step=5 is after the last step .* --finetune_steps=4$"):
        of(run)


@pytest.mark.parametrize(
    ("folder", "text", "says"),
    [
        ("", None, "holds no run"),
        ("", "{", "cannot be read"),
        ("", "[]", "cannot be read"),
        ("", '{"unknown": 1}', "of another version of this program: --unknown"),
        ("", '{"units": "7"}', "of another version of this program: --units"),
        ("", '{"stage": "evaluate"}', "is of --stage=evaluate"),
        ("", '{"stage": "all"}', "name one of .*pretrain, .*warm, .*scratch"),
        ("other", '{"stage": "all"}', "name one of"),
    ],
)
def test_what_is_no_run_is_named(run: Path, folder: str, text: str | None, says: str) -> None:
    (run / "config.json").unlink()
    if text is not None:
        (run / "config.json").write_text(text)
    with pytest.raises(InputError, match=says):
        of(run / folder)


def test_long_documents_do_not_hide_the_figures() -> None:
    replayed = {
        "step": 5,
        "shards_of_the_run": 1,
        "loss": 0.5,
        "global_norm": 2.0,
        "gradient_norms": {"embeddings": 2.0},
        "examples": {7: "short", 9: "x" * 1_200},
    }
    lines = describe(replayed, shards=1)
    assert lines[:3] == [
        "examples of the batch:",
        "  7: short",
        f"  9: {'x' * 100} ... 1,100 more characters",
    ]
    assert lines[3].startswith("step 5 · loss 0.5 ·") and lines[-1].endswith("2  embeddings")
