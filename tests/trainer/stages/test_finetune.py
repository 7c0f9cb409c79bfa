import pytest

from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.stages.finetune import trained_variables


@pytest.mark.parametrize("state", ["zero", "mean", "learned", "encode"])
def test_the_state_is_trained_only_if_it_is_learned(state: str) -> None:
    reader = Encoder(9, 2, 3, seed=1) if state == "encode" else None
    classifier = Classifier(Encoder(9, 2, 3, seed=0), 2, reader=reader)
    classifier.build()
    names = set(trained_variables(classifier, state))
    assert ("initial_state/0/h" in names) == (state == "learned")
    assert {"embeddings", "lstm/0/kernel", "output/bias"} <= names
    assert not any(name.startswith("reader/") for name in names)
