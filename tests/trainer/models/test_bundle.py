import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kept_runs import halve
from data_pipelines.errors import InputError
from data_pipelines.store.seal import SEAL
from trainer import safe_files, states
from trainer.distribution.variables import assign, digest, values_of
from trainer.models import bundle
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder

INFO = {
    "model": {"vocab_size": 4, "embedding_dim": 2, "units": 3, "num_layers": 2},
    "vocab_sha256": "that of the tokenizer",
}


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("<pad>\n<unk>\n<eos>\nthe\n")
    return path


@pytest.fixture
def saved(tmp_path: Path, vocab: Path) -> Path:
    encoder = Encoder(4, 2, 3, seed=0, num_layers=2)
    encoder.build()
    assert bundle.encoder_model(encoder) == INFO["model"]
    tensors = values_of(bundle.encoder_variables(encoder))
    mean = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    tensors |= bundle.state_tensors("mean", [states.LearnedState(*state) for state in mean])
    bundle.save(tmp_path / "encoder", "encoder", tensors, INFO, vocab)
    return tmp_path / "encoder"


def test_what_is_saved_is_loaded(saved: Path, vocab: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [
        "encoder.json",
        "encoder.safetensors",
        "vocab.txt",
    ]
    loaded = bundle.load(saved, "encoder", "--encoder")
    assert loaded.info["model"] == INFO["model"]
    assert [state.c.tolist() for state in loaded.state("mean")] == [[3, 4, 5], [9, 10, 11]]
    with pytest.raises(InputError, match="no state 'learned'"):
        loaded.state("learned")
    assert (saved / "vocab.txt").read_bytes() == vocab.read_bytes()
    other = bundle.new_encoder(loaded.info["model"])
    assign(bundle.encoder_variables(other), loaded.tensors)
    for name, value in values_of(bundle.encoder_variables(other)).items():
        np.testing.assert_array_equal(value, loaded.tensors[name])


def test_half_the_bytes_load_as_float32(saved: Path, tmp_path: Path) -> None:
    halve(saved, tmp_path / "half", "encoder")
    loaded = bundle.load(tmp_path / "half", "encoder", "--encoder")
    for name, value in bundle.load(saved, "encoder", "--encoder").tensors.items():
        np.testing.assert_array_equal(loaded.tensors[name], value.astype(np.float16))
        assert loaded.tensors[name].dtype == np.float32
    sizes = [(f / "encoder.safetensors").stat().st_size for f in (tmp_path / "half", saved)]
    numbers = sum(array.size for array in loaded.tensors.values())
    assert sizes[1] - sizes[0] > 1.9 * numbers


def test_a_copy_may_leave_out_of_its_configuration(
    saved: Path, vocab: Path, tmp_path: Path
) -> None:
    loaded = bundle.load(saved, "encoder", "--encoder")
    info = INFO | {"config": {"run_dir": "/home/somebody", "units": 2}}
    bundle.save(saved, "encoder", loaded.tensors, info, vocab)
    halve(saved, tmp_path / "half", "encoder")
    half = bundle.load(tmp_path / "half", "encoder", "--encoder")
    assert half.info["config"] == {"units": 2}


def test_what_float16_cannot_hold_is_not_rounded(saved: Path, vocab: Path, tmp_path: Path) -> None:
    tensors = bundle.load(saved, "encoder", "--encoder").tensors
    tensors["embeddings"] = np.full_like(tensors["embeddings"], 7e4)
    bundle.save(saved, "encoder", tensors, INFO, vocab)
    with pytest.raises(InputError, match="'embeddings' has numbers that float16 cannot hold"):
        halve(saved, tmp_path / "half", "encoder")


def test_saving_again_replaces_it(saved: Path, vocab: Path) -> None:
    tensors = bundle.load(saved, "encoder", "--encoder").tensors
    del tensors["states/mean/0/h"], tensors["states/mean/0/c"]
    bundle.save(saved, "encoder", tensors, INFO, vocab)
    assert bundle.load(saved, "encoder", "--encoder").tensors.keys() == tensors.keys()
    assert sorted(p.name for p in saved.parent.iterdir()) == ["encoder", "words.txt"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"format_version": 3}, "version 3; this program reads warmstate-encoder version 4"),
        ({"format": "other"}, "'other'"),
        ({"model": {"vocab_size": 4, "embedding_dim": 2}}, "'units' is None"),
        ({"model": INFO["model"] | {"units": True}}, "'units' is True"),
        ({"model": INFO["model"] | {"num_layers": 0}}, "'num_layers' is 0"),
        (
            {"model": INFO["model"] | {"units": 2**30}},
            "it describes needs 8589934592 numbers in the tensor 'lstm/0/kernel'; there are 24",
        ),
        (
            {"model": INFO["model"] | {"num_layers": 2**30}},
            "it describes needs 36 numbers in the tensor 'lstm/2/kernel'; there are 0",
        ),
        ({"vocab_sha256": 5}, "'vocab_sha256' is 5"),
        ({"tensors": {}}, "is damaged: tensor 'embeddings' is"),
        ({"tensors_sha256": "0"}, "its SHA-256 is not"),
        ({"vocab_file_sha256": "0"}, "vocab.txt is damaged"),
    ],
)
def test_what_a_stranger_writes_is_named_with_its_flag(saved: Path, values, says: str) -> None:
    path = saved / "encoder.json"
    info = json.loads(path.read_text()) | values
    del info[SEAL]
    path.write_bytes(safe_files.sealed(info))  # its own checksum is right
    with pytest.raises(InputError) as error:
        bundle.load(saved, "encoder", "--encoder")
    assert f"--encoder={saved}" in str(error.value) and says in str(error.value)


def save_classifier(folder: Path, vocab: Path, **facts: object) -> None:
    """Writes a classifier of one direction, without a reader, whose manifest says `facts`."""
    classifier = Classifier(bundle.new_encoder(INFO["model"]), 2, hidden_units=5)
    classifier.build()
    info = {
        "model": bundle.classifier_model(classifier) | facts,
        "vocab_sha256": INFO["vocab_sha256"],
        "max_tokens": 10,
        "context_key": "author",
        "context_names": ["ann", "bob"][: facts.get("num_contexts", 0)],
    }
    tensors = values_of(bundle.classifier_variables(classifier))
    bundle.save(folder, "classifier", tensors, info, vocab)


@pytest.mark.parametrize(
    ("facts", "needs"),
    [
        ({"bidirectional": True}, "15 numbers in the tensor 'backward/hidden/kernel'"),
        ({"reads_first": True}, "8 numbers in the tensor 'reader/embeddings'"),
        ({"hidden_units": 2**30}, f"{3 * 2**30} numbers in the tensor 'hidden/kernel'"),
        ({"num_classes": 2**30}, f"{5 * 2**30} numbers in the tensor 'output/kernel'"),
        ({"normalised": True}, "4 numbers in the tensor 'frequencies'"),
        ({"num_layers": 3}, "36 numbers in the tensor 'lstm/2/kernel'"),
        ({"num_contexts": 2}, "12 numbers in the tensor 'contexts/0/table'"),
    ],
)
def test_each_fact_of_a_classifier_needs_its_tensors(
    tmp_path: Path, vocab: Path, facts: dict, needs: str
) -> None:
    save_classifier(tmp_path / "classifier", vocab, **facts)
    with pytest.raises(InputError, match=needs):
        bundle.load(tmp_path / "classifier", "classifier", "--classifier")


@pytest.mark.parametrize("fact", ["reads_first", "normalised", "bidirectional"])
def test_facts_of_a_classifier_are_true_or_false(tmp_path: Path, vocab: Path, fact: str) -> None:
    save_classifier(tmp_path / "classifier", vocab, **{fact: 1})
    with pytest.raises(InputError, match=f"the model's '{fact}' is 1"):
        bundle.load(tmp_path / "classifier", "classifier", "--classifier")


@pytest.mark.parametrize("tokens", [0, 2**31])
def test_a_classifier_reads_a_number_of_tokens(tmp_path: Path, vocab: Path, tokens: int) -> None:
    save_classifier(tmp_path / "classifier", vocab)
    path = tmp_path / "classifier" / "classifier.json"
    path.write_bytes(safe_files.sealed({**safe_files.read_sealed(path), "max_tokens": tokens}))
    with pytest.raises(InputError, match=f"'max_tokens' is {tokens}"):
        bundle.read_info(path.parent, "classifier", "--classifier")


@pytest.mark.parametrize("found", [[0.5], [0.5, 1.0], [0.5, 1], "ab", None])
def test_sets_of_labels_need_their_thresholds(tmp_path: Path, vocab: Path, found: object) -> None:
    save_classifier(tmp_path / "classifier", vocab, multi_label=True)
    path = tmp_path / "classifier" / "classifier.json"
    info = {**safe_files.read_sealed(path), "thresholds": [0.5, 0.25]}
    path.write_bytes(safe_files.sealed(info))
    assert bundle.read_info(path.parent, "classifier", "--classifier")["thresholds"] == [0.5, 0.25]
    path.write_bytes(safe_files.sealed({**info, "thresholds": found}))
    with pytest.raises(InputError, match="'thresholds' is .*, not 2 probabilities"):
        bundle.read_info(path.parent, "classifier", "--classifier")
    model = info["model"] | {"multi_label": 3}
    path.write_bytes(safe_files.sealed({**info, "model": model}))
    with pytest.raises(InputError, match="'multi_label' is 3"):
        bundle.read_info(path.parent, "classifier", "--classifier")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"context_names": "ab"}, "'context_names' is 'ab', not a list of names"),
        ({"context_names": ["a", 3]}, "not a list of names"),
        ({"context_names": ["ann", "ann"]}, "'num_contexts' is 2, for 2 'context_names'"),
        ({"context_names": ["ann"]}, "'num_contexts' is 2, for 1 'context_names'"),
        ({"context_key": 3}, "'context_key' is 3, not a name"),
    ],
)
def test_contexts_need_their_names(tmp_path: Path, vocab: Path, values: dict, says: str) -> None:
    save_classifier(tmp_path / "classifier", vocab, num_contexts=2)
    path = tmp_path / "classifier" / "classifier.json"
    info = safe_files.read_sealed(path)
    path.write_bytes(safe_files.sealed({**info, **values}))
    with pytest.raises(InputError, match=says):
        bundle.read_info(tmp_path / "classifier", "classifier", "--classifier")
    path.write_bytes(safe_files.sealed({**info, "model": info["model"] | {"num_contexts": 2.0}}))
    with pytest.raises(InputError, match="'num_contexts' is 2.0, for 2 'context_names'"):
        bundle.read_info(tmp_path / "classifier", "classifier", "--classifier")


def test_what_another_kind_of_bundle_says_does_not_loosen_the_bound(
    saved: Path, vocab: Path
) -> None:
    good = bundle.load(saved, "encoder", "--encoder").tensors
    like_a_classifier = INFO | {"model": INFO["model"] | {"hidden_units": 5}}
    bundle.save(saved, "encoder", good, like_a_classifier, vocab)
    assert bundle.load(saved, "encoder", "--encoder")
    tensors = {"softmax/bias": np.zeros(4, np.float32), "softmax/kernel": np.zeros(60, np.float32)}
    like_a_decoder = INFO["model"] | {"embedding_dim": 1, "units": 60, "tied": True}
    bundle.save(saved, "encoder", tensors, INFO | {"model": like_a_decoder}, vocab)
    with pytest.raises(InputError, match="needs 4 numbers in the tensor 'embeddings'; there are 0"):
        bundle.load(saved, "encoder", "--encoder")


def test_a_bundle_that_cannot_be_written_says_what_to_do(
    saved: Path, vocab: Path, tmp_path: Path
) -> None:
    tensors = bundle.load(saved, "encoder", "--encoder").tensors
    (tmp_path / "encoder.new").symlink_to("/dev/full/nowhere")  # is removed, not followed
    bundle.save(saved, "encoder", tensors, INFO, vocab)
    with pytest.raises(InputError, match="cannot be written: Not a directory: make room"):
        bundle.save(vocab / "encoder", "encoder", tensors, INFO, vocab)
    assert bundle.load(saved, "encoder", "--encoder")


def test_tensors_that_do_not_fit_are_refused(saved: Path) -> None:
    tensors = bundle.load(saved, "encoder", "--encoder").tensors
    larger = Encoder(4, 2, 5, seed=0, num_layers=2)
    larger.build()
    with pytest.raises(InputError, match="'lstm/0/kernel' is"):
        assign(bundle.encoder_variables(larger), tensors)
    del tensors["lstm/1/bias"]
    with pytest.raises(InputError, match="no tensor 'lstm/1/bias'"):
        assign({"lstm/1/bias": larger.lstms[1].cell.bias}, tensors)


def test_digest_covers_names_shapes_dtypes_and_bytes() -> None:
    base = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": np.zeros((2, 3), np.float32)},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
        {"a": np.full((2, 3), 1e-30, np.float32)},
        {},
    ]
    assert digest(dict(base)) == digest(base)
    assert len({digest(tensors) for tensors in [base, *others]}) == 6


def test_a_classifiers_bundle_holds_all_its_variables() -> None:
    encoders = [Encoder(4, 2, 3, seed=s, num_layers=3) for s in (0, 1)]
    classifier = Classifier(encoders[0], 2, reader=encoders[1], num_contexts=5)
    classifier.build()
    named = {id(v) for v in bundle.classifier_variables(classifier).values()}
    assert named == {id(v) for v in classifier.weights}


def test_a_bundle_of_before_contexts_and_sets_of_labels_has_neither() -> None:
    model = bundle.classifier_model(Classifier(Encoder(4, 2, 3, seed=0), 2))
    assert not {"num_contexts", "multi_label"} & model.keys()  # as all bundles were once
    made = bundle.new_classifier(model)
    assert (made.num_contexts, made.multi_label) == (0, False)


def test_a_state_has_two_parts() -> None:
    with pytest.raises(ValueError, match="zip"):
        bundle.state_tensors("mean", [(np.zeros(3), np.zeros(3), np.zeros(3))])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(
    saved: Path, vocab: Path, tmp_path: Path, value: float
) -> None:
    loaded = bundle.load(saved, "encoder", "--encoder")
    tensors = dict(loaded.tensors)
    tensors["lstm/0/bias"] = np.full_like(tensors["lstm/0/bias"], value)
    info = {k: v for k, v in loaded.info.items() if k in ("model", "tokenizer", "vocab_sha256")}
    bundle.save(tmp_path / "bad", "encoder", tensors, info, vocab)
    with pytest.raises(InputError, match="its tensor 'lstm/0/bias' has non-finite values"):
        bundle.load(tmp_path / "bad", "encoder", "--encoder")


def test_a_task_of_512_cells_is_16_kilobytes_beside_its_head(tmp_path: Path) -> None:
    classifier = Classifier(Encoder(4, 2, 512, seed=0), 2, hidden_units=0, pooling="concat")
    classifier.build()
    tensors = bundle.task_tensors(classifier, "state+bias")
    info = {
        "model": {"units": 512, "num_layers": 1, "hidden_units": 0, "num_classes": 2},
        "max_tokens": 400,
        "vocab_sha256": "0" * 64,
        "encoder_sha256": "0" * 64,
        "class_names": ["neg", "pos"],
    }
    info["model"]["pooling"] = "concat"
    bundle.save(tmp_path / "task", "task", tensors, info, None)
    assert bundle.load(tmp_path / "task", "task", "--task").tensors.keys() == tensors.keys()
    head = sum(value.nbytes for name, value in tensors.items() if name.startswith("output/"))
    size = sum(file.stat().st_size for file in (tmp_path / "task").iterdir())
    assert 4 * 6 * 512 < size - head < 16 * 1024


def test_the_biases_of_a_task_are_those_of_plain_embeddings() -> None:
    plain, normalised = (Encoder(4, 2, 3, seed=0, normalised=which) for which in (False, True))
    for encoder in (plain, normalised):
        encoder.build()
    normalised.absorb_normalisation()
    for found, expected in zip(normalised.biases(), plain.biases(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(normalised.lstms[0].cell.bias.numpy() - plain.biases()[0]).max() > 1e-4
