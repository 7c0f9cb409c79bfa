import dataclasses
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from absl import flags
from hypothesis import given

from data_pipelines import flag_fields
from tests.fuzzing import FUZZ
from trainer import config as configuration
from trainer import preflight
from trainer.config import Config
from trainer.distribution.cluster import Cluster

ONE = Cluster(rank=0, size=1)


def faults(*argv: str, cluster: Cluster = ONE) -> list[str]:
    values = flags.FlagValues()
    flag_fields.define([Config], values)
    found, _ = configuration.parse(["program", *argv], values)
    return found + preflight.faults_of(configuration.from_flags(values), cluster)


def test_defaults_need_only_a_run_folder(tmp_path: Path) -> None:
    assert faults(f"--run_dir={tmp_path}") == []
    assert [fault.split()[0] for fault in faults()] == ["--run_dir"]


@pytest.mark.parametrize(("saved", "is_refused"), [("finetune", True), ("evaluate", False)])
def test_an_evaluation_does_not_replace_the_report_of_a_training(
    tmp_path: Path, saved: str, is_refused: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"stage": saved}))
    for resume, expected in (("auto", is_refused), ("never", False)):
        found = preflight.resume_faults(Config(stage="evaluate", resume=resume), tmp_path)
        assert [line.partition("; ")[2] for line in found] == ["name another --run_dir"] * expected
    assert preflight.resume_faults(Config(stage="finetune"), tmp_path) == []


def test_a_clipped_gradient_is_not_one_that_a_loss_scale_multiplies(tmp_path: Path) -> None:
    flags_of_run = [f"--run_dir={tmp_path}", "--finetune_recurrent_clip_norm=1"]
    (fault,) = faults(*flags_of_run, "--precision=mixed_float16")
    assert "--finetune_recurrent_clip_norm=1.0" in fault and "use mixed_bfloat16" in fault
    assert faults(*flags_of_run, "--precision=mixed_bfloat16") == []


def test_a_refit_has_nothing_to_choose_by(tmp_path: Path) -> None:
    refit = [f"--run_dir={tmp_path}", "--finetune_refit=true"]
    found = faults(*refit, "--labels=multi", "--finetune_early_stopping=2", "--keep_best=1")
    assert len(found) == 4 and all("--finetune_refit=True with --" in fault for fault in found)
    assert faults(*refit, "--stage=finetune", "--encoder=e") == []


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    found = faults(
        "--stage=pretrian",
        "--seed=one",
        "--units=0",
        "--pretrain_dropout=1.0",
        "--finetune_learning_rate=nan",
        "--unitz=3",
        "stray",
    )
    text = "\n".join(found)
    assert len(found) == 8
    assert "--stage=pretrian is not one of" in text and "did you mean pretrain?" in text
    assert "--seed=one is not an integer" in text
    assert "--units=0 must be at least 1" in text
    assert "--pretrain_dropout=1.0 must be below 1" in text
    assert "--finetune_learning_rate=nan is not a finite number" in text
    assert "--unitz is not a flag of this program; did you mean --units" in text
    assert "'stray' is not a flag" in text
    assert "--run_dir is not set" in text


def test_faults_between_flags(tmp_path: Path) -> None:
    folder = f"--run_dir={tmp_path}"
    (found,) = faults(folder, "--pretrain_batch_size=2", cluster=Cluster(0, 3))
    assert "--pretrain_batch_size=2 is smaller than the number of workers, 3" in found
    (found,) = faults(folder, "--sampled_softmax=20000", "--vocab_size=20000")
    assert "--sampled_softmax=20000 must be below --vocab_size" in found
    # Fine-tuning reads neither, but for the softmax of joint training.
    fine = (folder, "--stage=finetune", "--encoder=e")
    small = (*fine, "--pretrain_batch_size=2", "--vocab_size=1000")
    assert faults(*small, cluster=Cluster(0, 3)) == []
    joint = (*small, "--joint_weight=1")
    (found,) = faults(*joint, "--sampled_softmax=1025", cluster=Cluster(0, 3))
    assert "--sampled_softmax=1025 must be below --vocab_size" in found
    assert faults(*joint, cluster=Cluster(0, 3)) == []  # the default becomes exact
    (found,) = faults(*fine, "--finetune_batch_size=2", cluster=Cluster(0, 3))
    assert "--finetune_batch_size=2 is smaller than the number of workers, 3" in found
    (found,) = faults(folder, "--distributor=one_device", cluster=Cluster(0, 2))
    assert "--distributor=multi_worker" in found
    (found,) = faults(folder, "--optimizer=adamw", "--encoder_frozen_steps=5")
    assert "would move the frozen weights" in found
    (found,) = faults(folder, "--finetune_steps=0")
    assert "set --hidden_units=0 and --init_weights=encoder" in found
    assert faults(folder, "--finetune_steps=0", "--hidden_units=0") == []
    itself = "--self_training_documents=9"
    (found,) = faults(folder, itself)
    assert found.startswith(f"{itself} is for a warm start's linear head: set --hidden_units=0 ")
    assert faults(folder, itself, "--hidden_units=0") == []
    (found,) = faults(folder, "--label_counts=200,0")
    assert found == "--label_counts=200,0 must be numbers above 0, such as 200,1000"
    (found,) = faults(folder, "--source=movie_reviews", "--unlabelled=text:a", "--labelled=csv:b")
    assert "give either --source, or both" in found
    (found,) = faults(folder, "--labelled=csv:b")
    assert "give either --source, or both" in found
    budget = "--pretrain_tokens_per_batch=500"
    (found,) = faults(folder, budget, "--pretrain_max_tokens=501")
    assert "must be at least --pretrain_max_tokens=501" in found
    (found,) = faults(folder, budget, "--pretrain_packing=concat")
    assert "set --pretrain_batch_size instead" in found
    (found,) = faults(folder, "--label_gain=linear", "--pooling=concat")
    assert found.startswith("--label_gain=linear with --pooling=concat: ")
    (found,) = faults(folder, "--pretrain_packing=stream")
    assert "only a language model carries its state" in found
    stream = ["--pretrain_packing=stream", "--pretrain_objective=language_model"]
    assert faults(folder, *stream) == []
    (found,) = faults(folder, *stream, budget)
    assert "with --pretrain_packing=stream: its rows have one length" in found
    bag = "--pretrain_objective=bag_autoencoder"
    assert faults(folder, bag) == []
    found = faults(folder, bag, "--pretrain_packing=concat", "--pretrain_subsampling=1e-3")
    assert [fault.split(" with ")[0] for fault in found] == [
        "--pretrain_packing=concat",
        "--pretrain_subsampling=0.001",
    ]
    (found,) = faults(folder, "--unlabelled_batch_size=8")
    assert "needs --virtual_adversarial_weight" in found
    (found,) = faults(folder, "--init_embeddings=no.txt")
    assert found == "--init_embeddings=no.txt is not a file"
    vectors = f"--init_embeddings={__file__}"
    (found,) = faults(folder, "--stage=finetune", "--encoder=a", vectors)
    assert "with --init_weights=encoder: the encoder has embeddings" in found
    backward = ("--stage=finetune", "--encoder=a", "--backward_encoder=b")
    assert faults(folder, *backward) == []
    (found,) = faults(folder, *backward, "--init_weights=random", "--initial_state=zero")
    assert found.startswith("--backward_encoder=b is not read with --init_weights=random ")
    (found,) = faults(folder, "--pretrain_direction=backward")
    assert found.startswith("--pretrain_direction=backward with --stage=all, ")
    (found,) = faults(folder, *backward[:2], "--backward_encoder=gs://b")
    assert found.startswith("--backward_encoder=gs://b is an address")
    (found,) = faults(folder, "--backward_encoder=b")
    assert "leave --backward_encoder out" in found
    (found,) = faults(folder, "--optimizer=adamw", "--unfreeze_every_steps=5")
    assert found.startswith("--unfreeze_every_steps=5 with --optimizer=adamw: ")
    (found,) = faults(folder, "--tied_softmax=perhaps")
    assert found == "--tied_softmax=perhaps is not true or false"
    (found,) = faults(folder, "--stage=evaluate")
    assert "--classifier" in found
    for other in ("--train=head", "--label_counts=200"):
        (found,) = faults(folder, "--labels=multi", other)
        assert found.startswith(f"--labels=multi with {other}: ")
    (found,) = faults(folder, "--labels=multi", itself, "--hidden_units=0")
    assert found.startswith(f"--labels=multi with {itself}: ")


@pytest.mark.parametrize(
    "other",
    [
        *("--init_weights=random", "--initial_state=encode"),
        *("--joint_weight=1.0", "--context_key=author"),
    ],
)
def test_what_does_not_go_with_a_frozen_encoder(tmp_path: Path, other: str) -> None:
    tuned = (f"--run_dir={tmp_path}", "--stage=finetune", "--encoder=a", "--train=state")
    assert faults(*tuned) == []
    (found,) = faults(*tuned, other)
    assert found.startswith(f"--train=state with {other}: ")
    assert faults(*tuned[:-1], other) == []
    (found,) = faults(*tuned, "--backward_encoder=b")
    assert found.startswith("--train=state with --backward_encoder=b: ")


@pytest.mark.parametrize("state", ["mean", "learned", "encode"])
def test_a_state_from_an_encoder_needs_an_encoder(tmp_path: Path, state: str) -> None:
    scratch = [f"--run_dir={tmp_path}", "--stage=finetune", "--init_weights=random"]
    (found,) = faults(*scratch, f"--initial_state={state}")
    assert f"--initial_state={state} needs an encoder: set --encoder" in found
    assert faults(*scratch, "--initial_state=zero") == []


def test_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in faults(f"--run_dir={tmp_path}/file")[0]
    assert "cannot be written" in faults(f"--run_dir={tmp_path}/file/below")[0]
    assert "cannot be written" in faults("--run_dir=/proc/warmstate")[0]


def test_addresses_are_no_folders() -> None:
    found = faults("--run_dir=gs://bucket/run", "--classifier=s3://bucket/classifier")
    assert len(found) == 2
    assert all("is an address: it must be a folder" in line for line in found)


def test_addresses_have_a_form_and_a_driver(tmp_path: Path) -> None:
    run = f"--run_dir={tmp_path}"
    assert faults(run, "--mirror=file:///a", "--store=file:///b") == []
    assert any(
        "--store_cache_bytes=9 needs a --store at an address" in line
        for line in faults(run, "--store=a", "--store_cache_bytes=9")
    )
    found = faults(run, "--mirror=/a", "--store=nonsense://b")
    assert "--mirror=/a must be an address such as s3://bucket/path" in found
    assert any("--store=nonsense://b needs a driver for nonsense://" in line for line in found)


def test_every_shipped_flagfile_is_without_faults() -> None:
    files = list((Path(configuration.__file__).parent / "configs").rglob("*.cfg"))
    assert files
    for file in files:
        assert faults(f"--flagfile={file}") == [], file
        assert faults(f"--flagfile={file}", "--scale=smoke") == [], file


def test_smoke_cuts_sizes_down_and_raises_none(tmp_path: Path) -> None:
    values = flags.FlagValues()
    flag_fields.define([Config], values)
    small = ("--sampled_softmax=0", "--units=5", "--num_layers=3", "--finetune_steps=9999")
    configuration.parse(["program", "--scale=smoke", *small], values)
    config = configuration.from_flags(values)
    assert (config.sampled_softmax, config.units, config.num_layers) == (0, 5, 3)
    assert config.finetune_steps == configuration.SMOKE_LIMITS["finetune_steps"] < 10
    assert config.embedding_dim == configuration.SMOKE_LIMITS["embedding_dim"]
    assert set(configuration.SMOKE_LIMITS) <= {item.name for item in dataclasses.fields(Config)}
    (found,) = faults(f"--run_dir={tmp_path}", "--scale=smoke", "--units=many")
    assert found == "--units=many is not an integer"


NAMES = st.sampled_from([item.name for item in dataclasses.fields(Config)]) | st.text(max_size=8)
VALUES = (
    st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(repr)
    | st.sampled_from(["true", "all", "gs://a/b", "csv:a", "1:2", "-1", "9" * 400, ""])
)
WORDS = st.builds("--{}={}".format, NAMES, VALUES) | NAMES.map("--{}".format) | st.text(max_size=8)


@FUZZ
@given(
    st.lists(WORDS, max_size=6), st.none() | st.binary(max_size=60) | st.lists(WORDS, max_size=3)
)
def test_any_words_and_flagfiles_give_only_the_named_errors(
    tmp_path: Path, words: list[str], flagfile: bytes | list[str] | None
) -> None:
    # What a command line cannot hold.
    argv = [word for word in words if "\0" not in word and _is_encodable(word)]
    argv = [word for word in argv if not word.startswith(("--run_dir", "--flagfile"))]
    if flagfile is not None:
        path = tmp_path / "a.cfg"
        text = (
            flagfile
            if isinstance(flagfile, bytes)
            else "\n".join(flagfile).encode("utf-8", "surrogatepass")
        )
        path.write_bytes(text)
        argv.append(f"--flagfile={path}")
    for fault in faults(*argv, f"--run_dir={tmp_path}"):
        assert isinstance(fault, str) and fault


def _is_encodable(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def test_a_resumed_run_may_not_change_what_shapes_it() -> None:
    saved = dataclasses.asdict(Config(run_dir="a", units=8))
    assert preflight.differences(Config(run_dir="b", units=8, log_every_steps=3), saved) == []
    (line,) = preflight.differences(Config(run_dir="a", units=9), saved)
    assert line == "--units was 8 and is now 9"


def test_faults_of_stages_that_use_a_model() -> None:
    model = "--classifier=a"
    assert faults("--stage=predict", model, "a text", "--explain") == []
    (found,) = faults("--stage=predict", "a text")
    assert "--stage=predict needs --classifier" in found
    (found,) = faults("--stage=predict", model, "--explain", "--output=a.csv")
    assert "--explain with --output=a.csv: choose text or jsonl" in found
    (found,) = faults("--stage=predict", model, "--output=a.csv.gz")
    assert "--output=a.csv.gz: what is written is not compressed" in found
    (found,) = faults("--stage=export", model)
    assert "needs --output" in found
    (found,) = faults("--stage=predict", "--reconstruct")
    assert "--reconstruct needs --stage=predict and --encoder" in found
    assert faults("--stage=predict", "--reconstruct", "--encoder=a") == []
    assert faults("--stage=predict", model, "--stream") == []
    (found,) = faults("--stage=predict", model, "--stream", "--explain")
    assert found == "--stream and --explain: choose one"
    (found,) = faults("--stage=predict", model, cluster=Cluster(0, 2))
    assert "is for one process; the environment names 2" in found
