import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import InputError
from trainer import bundle, states
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("<pad>\n<unk>\n<eos>\nthe\n")
    return path


@pytest.fixture
def saved(tmp_path: Path, vocab: Path) -> Path:
    encoder = Encoder(4, 2, 3, seed=0)
    encoder.build()
    tensors = bundle.values(bundle.encoder_variables(encoder))
    tensors |= {"states/mean/h": np.ones(3, np.float32), "states/mean/c": np.zeros(3, np.float32)}
    bundle.save(tmp_path / "encoder", "encoder", tensors, {"model": {"units": 3}}, vocab)
    return tmp_path / "encoder"


def test_what_is_saved_is_loaded(saved: Path, vocab: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [
        "encoder.json",
        "encoder.safetensors",
        "vocab.txt",
    ]
    loaded = bundle.load(saved, "encoder", "--encoder")
    assert loaded.info["model"] == {"units": 3}
    assert loaded.state("mean") == states.LearnedState(*loaded.state("mean"))
    assert loaded.state("mean").h.tolist() == [1, 1, 1]
    assert (saved / "vocab.txt").read_bytes() == vocab.read_bytes()
    other = Encoder(4, 2, 3, seed=5)
    other.build()
    bundle.assign(bundle.encoder_variables(other), loaded.tensors)
    for name, value in bundle.values(bundle.encoder_variables(other)).items():
        np.testing.assert_array_equal(value, loaded.tensors[name])


def test_saving_again_replaces_it(saved: Path, vocab: Path) -> None:
    bundle.save(saved, "encoder", {"a": np.zeros(1, np.float32)}, {}, vocab)
    assert list(bundle.load(saved, "encoder", "--encoder").tensors) == ["a"]
    assert sorted(p.name for p in saved.parent.iterdir()) == ["encoder", "words.txt"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "encoder.safetensors").unlink(), "cannot read"),
        (lambda f: (f / "encoder.json").unlink(), "is no encoder bundle"),
        (lambda f: (f / "encoder.json").write_text("{"), "is damaged"),
        (lambda f: (f / "encoder.json").write_text("[]"), "is damaged"),
        (lambda f: flip(f / "encoder.safetensors", -1), "is damaged"),
        (lambda f: flip(f / "encoder.safetensors", 12), "cannot read"),
        (lambda f: truncate(f / "encoder.safetensors"), "cannot read"),
        (lambda f: change(f / "encoder.json", format_version=99), "version 99"),
        (lambda f: change(f / "encoder.json", format="other"), "'other'"),
    ],
)
def test_damage_is_named_with_its_flag(saved: Path, damage, says: str) -> None:
    damage(saved)
    with pytest.raises(InputError, match=says) as error:
        bundle.load(saved, "encoder", "--encoder")
    assert f"--encoder={saved}" in str(error.value)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_tensors_that_do_not_fit_are_refused(saved: Path) -> None:
    tensors = bundle.load(saved, "encoder", "--encoder").tensors
    larger = Encoder(4, 2, 5, seed=0)
    larger.build()
    with pytest.raises(InputError, match="'lstm/kernel' is"):
        bundle.assign(bundle.encoder_variables(larger), tensors)
    del tensors["lstm/bias"]
    with pytest.raises(InputError, match="no tensor 'lstm/bias'"):
        bundle.assign({"lstm/bias": larger.lstm.cell.bias}, tensors)


def test_digest_covers_names_shapes_dtypes_and_bytes() -> None:
    base = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": np.zeros((2, 3), np.float32)},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
        {"a": np.full((2, 3), 1e-30, np.float32)},
        {},
    ]
    assert bundle.digest(dict(base)) == bundle.digest(base)
    assert len({bundle.digest(tensors) for tensors in [base, *others]}) == 6


def test_a_classifiers_bundle_holds_all_its_variables() -> None:
    encoders = [Encoder(4, 2, 3, seed=s) for s in (0, 1)]
    classifier = Classifier(encoders[0], 2, reader=encoders[1])
    classifier.build()
    named = {id(v) for v in bundle.classifier_variables(classifier).values()}
    assert named == {id(v) for v in classifier.weights}
