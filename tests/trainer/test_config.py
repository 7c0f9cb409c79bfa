import dataclasses
from pathlib import Path

import pytest
from absl import flags

from data_pipelines import flag_fields
from trainer import config as configuration
from trainer.config import Config


def test_flagfile_values_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text("# a comment\n--units=7\n--seed=3\n")
    values = flags.FlagValues()
    flag_fields.define([Config], values)
    argv = ["program", f"--flagfile={tmp_path}/a.cfg", "--units=9"]
    assert configuration.parse(argv, values) == ([], [])
    config = configuration.from_flags(values)
    assert (config.units, config.seed) == (9, 3)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--units=9", "--flagfile=FILE"], "--units=9 is before --flagfile=FILE, which has --un"),
        (["--units=9", "--flagfile", "FILE"], "--units=9 is before --flagfile=FILE, which has --u"),
        (["--notied_softmax", "--flagfile=FILE"], "which has --tied_softmax: write it after"),
        (["--units=7", "--flagfile=FILE"], None),
        (["--seed=3", "--flagfile=FILE", "--units=9"], None),
        (["--units=8", "--flagfile=FILE", "--units=9"], None),
    ],
)
def test_a_flag_that_a_flagfile_after_it_undoes_is_a_fault(
    tmp_path: Path, words: list[str], fault: str | None
) -> None:
    (tmp_path / "inner.cfg").write_text("--units=7\n")
    (tmp_path / "a.cfg").write_text(f"--flagfile={tmp_path}/inner.cfg\n--tied_softmax\n")
    file = f"{tmp_path}/a.cfg"
    values = flags.FlagValues()
    flag_fields.define([Config], values)
    argv = ["program", *(word.replace("FILE", file) for word in words)]
    found, _ = configuration.parse(argv, values)
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1 and fault.replace("FILE", file) in found[0], found


def test_a_runs_flagfile_gives_its_configuration_again(tmp_path: Path) -> None:
    config = Config(
        run_dir="runs/a b$(c)'#", units=7, tied_softmax=True, finetune_learning_rate=1 / 3, seed=0
    )
    (tmp_path / "config.cfg").write_text(config.as_flagfile())
    values = flags.FlagValues()
    flag_fields.define([Config], values)
    argv = ["program", f"--flagfile={tmp_path}/config.cfg"]
    assert configuration.parse(argv, values) == ([], [])
    assert configuration.from_flags(values) == config
    assert "\n# --input has a line break" in Config(input="a\nb").as_flagfile()


def test_help_names_every_flag_under_its_group() -> None:
    text = flag_fields.program_help("", [Config])
    for item in dataclasses.fields(Config):
        assert f"--{item.name}=" in text
        assert item.metadata["help"] in " ".join(text.split())
    assert text.index("Run:") < text.index("Data:") < text.index("Pretraining:")


def test_texts_may_stand_anywhere_and_start_with_a_dash() -> None:
    values = flags.FlagValues()
    flag_fields.define([Config], values)
    words = ["one", "--stage=predict", "two", "--explain", "--", "--three"]
    assert configuration.parse(["program", *words], values) == ([], ["one", "two", "--three"])
    assert configuration.from_flags(values).explain is True


def test_a_stage_reads_its_own_flags() -> None:
    config = Config(
        pretrain_steps=3, finetune_steps=4, finetune_ema=0.5, pretrain_schedule="cosine"
    )
    pretrain, finetune = config.of_stage("pretrain"), config.of_stage("finetune")
    assert (pretrain.steps, pretrain.schedule, pretrain.ema) == (3, "cosine", 0.0)
    assert (finetune.steps, finetune.schedule, finetune.ema) == (4, "exponential", 0.5)
    assert finetune.learning_rate_decay == config.finetune_learning_rate_decay


def test_each_part_of_the_whole_job_has_its_own_configuration() -> None:
    whole = Config(run_dir="a", initial_state="mean", units=7)
    parts = whole.parts()
    assert parts["pretrain"] == whole
    assert (parts["warm"].encoder, parts["warm"].initial_state) == ("a/pretrain/encoder", "mean")
    assert (parts["scratch"].init_weights, parts["scratch"].initial_state) == ("random", "zero")
    assert [part.reads_encoder for part in parts.values()] == [False, True, False]
    assert all(part.units == 7 for part in parts.values())
    assert parts["scratch"].perturbation_norm == whole.perturbation_norm
    gentle = Config(scratch_perturbation_norm=0.5).parts()
    assert (gentle["scratch"].perturbation_norm, gentle["warm"].perturbation_norm) == (0.5, 5.0)
