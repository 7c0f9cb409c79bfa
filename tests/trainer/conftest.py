"""Classifier bundles for the tests of what uses them; weights are random, words are real."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.store.token_store import TokenStore


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
        **settings: object,
    ) -> Path:
        encoders = [Encoder(store.vocab_size, 8, 12, seed=seed) for seed in range(1 + reads_first)]
        reader = encoders[1] if reads_first else None
        classifier = Classifier(encoders[0], len(class_names), reader=reader, **settings)
        classifier.build()
        random = np.random.default_rng(7)
        variables = bundle.classifier_variables(classifier)
        for variable in variables.values():  # large, so that texts differ clearly
            variable.assign(random.normal(0, 0.7, variable.shape))
        some = store.split("test").gather(np.arange(20), max_tokens)
        logits = classifier.logits(*some, training=False)  # and to every class as often
        classifier.output_layer.bias.assign_sub(np.median(logits, axis=0))
        info = {
            "model": bundle.classifier_model(classifier),
            "max_tokens": max_tokens,
            "tokenizer": store.tokenizer_config,
            "vocab_sha256": store.vocab_sha256,
            "class_names": list(class_names),
        }
        folder = tmp_path_factory.mktemp("bundles") / "classifier"
        bundle.save(folder, "classifier", values_of(variables), info, store.vocab_path)
        return folder

    return make


@pytest.fixture(scope="session")
def classifier_bundle(make_classifier_bundle: Callable[..., Path]) -> Path:
    """Returns the folder of a classifier bundle of the classes neg and pos."""
    return make_classifier_bundle()
