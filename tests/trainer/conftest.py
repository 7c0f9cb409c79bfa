"""Classifier bundles for the tests of what uses them; weights are random, words are real."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.store.token_store import TokenStore
from tests.conftest import save_encoder


@pytest.fixture(scope="session")
def make_classifier_bundle(
    small_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Returns make(...), which returns the folder of a new classifier bundle."""
    from trainer.distribution.variables import values_of
    from trainer.models import bundle
    from trainer.models.classifier import Classifier
    from trainer.models.encoder import Encoder

    store = TokenStore(small_store)

    def make(
        class_names: tuple[str, ...] = ("neg", "pos"),
        reads_first: bool = False,
        max_tokens: int = 60,
        normalised: bool = False,
        **settings: object,
    ) -> Path:
        encoders = [
            Encoder(store.vocab_size, 8, 12, seed=seed, normalised=normalised and not seed)
            for seed in range(1 + reads_first)
        ]
        reader = encoders[1] if reads_first else None
        classifier = Classifier(encoders[0], len(class_names), reader=reader, **settings)
        classifier.build()
        random = np.random.default_rng(7)
        contexts = ["ann", "bob", "cy"][: classifier.num_contexts]
        variables = bundle.classifier_variables(classifier)
        for variable in variables.values():  # large, so that texts differ clearly
            variable.assign(random.normal(0, 0.7, variable.shape))
        if normalised:
            encoders[0].frequencies.assign(random.dirichlet(np.ones(store.vocab_size)))
        some = store.split("test").gather(np.arange(20), max_tokens)
        logits = classifier.logits(*some, training=False)  # and to every class as often
        classifier.output_layer.bias.assign_sub(np.median(logits, axis=0))
        info = {
            "model": bundle.classifier_model(classifier),
            "max_tokens": max_tokens,
            "tokenizer": store.tokenizer_config,
            "vocab_sha256": store.vocab_sha256,
            "class_names": list(class_names),
            **({"context_key": "author", "context_names": contexts} if contexts else {}),
            **(
                {"thresholds": [0.3, 0.5, 0.6][: len(class_names)]}
                if classifier.multi_label
                else {}
            ),
        }
        folder = tmp_path_factory.mktemp("bundles") / "classifier"
        bundle.save(folder, "classifier", values_of(variables), info, store.vocab_path)
        return folder

    return make


@pytest.fixture(scope="session")
def classifier_bundle(make_classifier_bundle: Callable[..., Path]) -> Path:
    """Returns the folder of a classifier bundle of the classes neg and pos."""
    return make_classifier_bundle()


@pytest.fixture(scope="session")
def tuned_encoder(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an encoder bundle of two layers of 16 units, for `make_task`."""
    from trainer.distribution.variables import values_of
    from trainer.models import bundle
    from trainer.models.encoder import Encoder, Initial

    store = TokenStore(small_store)
    encoder = Encoder(store.vocab_size, 8, 16, seed=5, num_layers=2, initial=Initial(100, 2.0))
    encoder.build()
    tensors = values_of(
        bundle.encoder_variables(encoder)
        | bundle.initial_state_variables(encoder, "states/learned")
    )
    folder = tmp_path_factory.mktemp("bundles") / "encoder"
    save_encoder(folder, store, encoder, tensors)
    return folder


@pytest.fixture(scope="session")
def make_task(tuned_encoder: Path) -> Callable[..., Path]:
    """Returns make(folder, ...), which writes a task of random values for `tuned_encoder`."""
    from trainer.distribution.variables import assign
    from trainer.models import bundle

    encoder = bundle.load(tuned_encoder, "encoder", "--encoder")

    def make(
        folder: Path,
        class_names: tuple[str, ...] = ("neg", "pos"),
        train: str = "state",
        max_tokens: int = 60,
        **sizes: object,
    ) -> Path:
        facts = {"reads_first": False, "normalised": False, "bidirectional": False}
        head = {"hidden_units": 0, "pooling": "concat", "num_classes": len(class_names), **sizes}
        classifier = bundle.new_classifier({**encoder.info["model"], **facts, **head})
        variables = bundle.classifier_variables(classifier)
        assign(bundle.encoder_variables(classifier.encoder), encoder.tensors)
        names = bundle.task_tensors(classifier, train)
        random = np.random.default_rng(sum(map(ord, folder.name)))
        for name in names:  # large, so that tasks differ clearly
            variables[name].assign(random.normal(0, 0.7, variables[name].shape))
        info = {
            "model": {"units": 16, "num_layers": 2, **head},
            "max_tokens": max_tokens,
            "vocab_sha256": encoder.info["vocab_sha256"],
            "class_names": list(class_names),
            "encoder_sha256": encoder.info["tensors_sha256"],
        }
        bundle.save(folder, "task", bundle.task_tensors(classifier, train), info, None)
        return folder

    return make


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Keras and our layer take the path of a GPU."""
    import tensorflow as tf

    for name in ("list_logical_devices", "get_visible_devices"):
        devices = getattr(tf.config, name)
        monkeypatch.setattr(
            tf.config, name, lambda kind=None, d=devices: ["GPU:0"] if kind == "GPU" else d(kind)
        )
