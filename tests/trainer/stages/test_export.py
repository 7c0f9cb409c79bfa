from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources import open_source
from trainer.stages.export import TOLERANCE, export, largest_difference
from trainer.text_classifier import load_classifier


def test_a_model_of_three_classes_that_reads_first(
    make_classifier_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    names = ("bad", "so-so", "très bon")
    bundle = make_classifier_bundle(names, reads_first=True)
    said = export(bundle, tmp_path / "exported" / "1")
    assert "loaded by TensorFlow alone" in said
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == ["1"]
    classes = tmp_path / "exported" / "1" / "assets.extra" / "classes.txt"
    assert tuple(classes.read_text(encoding="utf-8").splitlines()) == names
    with pytest.raises(InputError, match="is there already"):
        export(bundle, tmp_path / "exported" / "1")


@pytest.mark.slow
def test_a_thousand_reviews_have_the_trainer_s_probabilities(
    classifier_bundle: Path, tmp_path: Path
) -> None:
    export(classifier_bundle, tmp_path / "1")
    source = open_source("movie_reviews")
    examples = (e for part in source.parts("test") for e in source.examples("test", part))
    texts = [example.text for example in islice(examples, 1000)]
    assert len(texts) == 1000
    model = load_classifier(classifier_bundle)
    assert largest_difference(model, tmp_path / "1", texts) <= TOLERANCE


def test_a_model_that_answers_otherwise_is_noticed(
    make_classifier_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    export(make_classifier_bundle(), tmp_path / "1")
    other = load_classifier(make_classifier_bundle(max_tokens=3))
    texts = [f"this is a rather long review, number {i}" for i in range(20)]
    assert not largest_difference(other, tmp_path / "1", texts) <= TOLERANCE
