"""Texts through the encoder and decoder bundles that pretraining writes."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.store.token_store import TokenStore
from trainer import safe_files, states
from trainer.config import Config
from trainer.distribution.tf_distribute import one_device
from trainer.inference import predict
from trainer.inference.reconstruct import reconstructor
from trainer.models import bundle
from trainer.models.encoder import Encoder
from trainer.models.sequence_autoencoder import SequenceAutoencoder
from trainer.stages import pretrain
from trainer.training.run import Run

TEXTS = ["the film was great", "", "a plot that is xyzzyx and of the of the of the", "the"]


@pytest.fixture(scope="module")
def write(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns write(tied, seed, flags): the folder of an encoder bundle, its decoder beside it."""
    store = TokenStore(small_store)

    def bundles(tied: bool = False, seed: int = 0, **flags: str | int) -> Path:
        model = SequenceAutoencoder(
            Encoder(store.vocab_size, 8, 12, seed=seed, num_layers=2), tied=tied
        )
        model.build()
        random = np.random.default_rng(seed)
        for variable in pretrain.trained_variables(model).values():
            variable.assign(random.normal(0, 0.5, variable.shape))
        folder = tmp_path_factory.mktemp("run")
        stop = SimpleNamespace(received=False)
        run = Run(Config(**flags), one_device(), store, stop, lambda line: None)
        learned = states.learned(model.encoder)
        digest = pretrain.save_encoder(run, folder / "encoder", model, learned, None, {})
        pretrain.save_decoder(run, folder / "decoder", model, digest)
        return folder / "encoder"

    return bundles


@pytest.mark.parametrize("tied", [False, True])
def test_each_text_is_read_cut_and_written(write: Callable[..., Path], tied: bool) -> None:
    encoder = write(tied)
    found = reconstructor(encoder, 6)(TEXTS)
    assert [r.text for r in found] == TEXTS
    assert [r.read for r in found[1:]] == ["", "a plot that is <unk>", "the"]
    assert all(r.written and len(r.written.split()) <= 6 for r in found)
    assert not any(r.exact for r in found)
    # Texts do not depend on those beside them, nor on how many there are.
    assert reconstructor(encoder, 6)(TEXTS[:1] * 70) == found[:1] * 70
    assert reconstructor(encoder, 6)([]) == []


def test_a_decoder_that_ends_at_once_writes_the_empty_text_exactly(
    write: Callable[..., Path],
) -> None:
    encoder = write()
    folder = encoder.with_name("decoder")
    loaded = bundle.load(folder, "decoder", "")
    loaded.tensors["softmax/bias"][2] += 1e3  # the end token's
    info = {name: loaded.info[name] for name in ("model", "encoder_sha256", "vocab_sha256")}
    bundle.save(folder, "decoder", loaded.tensors, info, encoder / "vocab.txt")
    found = reconstructor(encoder, 6)(TEXTS)
    assert [(r.written, r.exact) for r in found] == [("", not r.text) for r in found]


def test_a_backward_autoencoder_shows_its_texts_forward(write: Callable[..., Path]) -> None:
    (forward,) = reconstructor(write(), 6)(["great was film the"])
    encoder = write(pretrain_direction="backward")
    (backward,) = reconstructor(encoder, 6)(["the film was great"])
    assert backward.read == "the film was great"
    assert backward.written.split() == forward.written.split()[::-1]


def test_bundles_that_do_not_fit_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="=language_model; only a sequence_autoencoder writes"):
        reconstructor(write(pretrain_objective="language_model"), 6)(TEXTS)
    shutil.copytree(write(), tmp_path / "encoder")
    with pytest.raises(InputError, match="is no decoder bundle"):
        reconstructor(tmp_path / "encoder", 6)(TEXTS)
    shutil.copytree(write(seed=1).with_name("decoder"), tmp_path / "decoder")
    with pytest.raises(InputError, match="is not of the run of --encoder="):
        reconstructor(tmp_path / "encoder", 6)(TEXTS)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tied": True}, "needs 96 numbers in the tensor 'softmax/kernel'; there are 12000"),
        ({"tied": 1}, "the model's 'tied' is 1"),
        ({"vocab_size": 2**30}, "needs 1073741824 numbers in the tensor 'softmax/bias'"),
        ({"units": 2**30}, "numbers in the tensor 'softmax/kernel'; there are 12000"),
    ],
)
def test_a_decoder_that_says_another_model_is_refused(
    write: Callable[..., Path], values: dict, says: str
) -> None:
    folder = write().with_name("decoder")
    path = folder / "decoder.json"
    info = safe_files.read_sealed(path)
    path.write_bytes(safe_files.sealed(info | {"model": info["model"] | values}))
    with pytest.raises(InputError, match=says):
        bundle.load(folder, "decoder", "--encoder")


def test_predict_shows_what_is_read_and_written(
    write: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    encoder = write(pretrain_max_tokens=6)
    expected = reconstructor(encoder, 6)(TEXTS[2:])
    config = Config(stage="predict", reconstruct=True, encoder=str(encoder))
    predict.reconstruct(config, TEXTS[2:])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "not the same",
        "\tread\ta plot that is <unk>",
        f"\twrote\t{expected[0].written}",
    ]
    predict.reconstruct(dataclasses.replace(config, output="jsonl:-"), TEXTS[2:])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["text"], r["written"], r["exact"]) for r in found] == [
        (r.text, r.written, r.exact) for r in expected
    ]
