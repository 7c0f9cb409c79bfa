from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainer.inference import explanation
from trainer.inference.explanation import Contribution, contributions, marked
from trainer.inference.text_classifier import load_classifier


@pytest.mark.parametrize("names", [("neg", "pos"), ("bad", "so-so", "good")])
def test_a_contribution_is_what_leaving_the_word_out_changes(
    make_classifier_bundle: Callable[..., Path], names: tuple[str, ...]
) -> None:
    model = load_classifier(make_classifier_bundle(names))

    def odds(text: str, label: str) -> float:
        probability = model.predict([text])[0].probabilities[label]
        return float(np.log(probability / (1 - probability)))

    text = "this was a very good film"
    label = model.predict([text])[0].label
    (found,) = contributions(model, text).values()
    words = text.split()
    assert [c.piece for c in found] == words
    for place, contribution in enumerate(found):
        without = " ".join(words[:place] + words[place + 1 :])
        expected = odds(text, label) - odds(without, label)
        assert contribution.log_odds == pytest.approx(expected, abs=2e-3)
    assert np.ptp([c.log_odds for c in found]) > 0.1


def test_only_what_is_read_is_explained(make_classifier_bundle: Callable[..., Path]) -> None:
    model = load_classifier(make_classifier_bundle(max_tokens=70))
    assert list(contributions(model, "").values()) == [[]]
    (found,) = contributions(model, "one " * 30 + "two " * 69).values()  # more than a batch
    assert [c.piece for c in found] == ["two"] * 69
    assert len(found) > explanation.BATCH_SIZE


def test_each_label_of_a_set_is_explained(make_classifier_bundle: Callable[..., Path]) -> None:
    names = ("bad", "so-so", "good")
    model = load_classifier(make_classifier_bundle(names, multi_label=True))
    text = "this was a very good film"
    (answer,) = model.predict([text])
    model.thresholds[[names.index(each) for each in answer.labels]] = 0.999
    assert list(contributions(model, text)) == [answer.label]  # of an empty set, the most probable
    model.thresholds[:] = 0.001
    found = contributions(model, text)
    assert list(found) == list(names)
    without = model.predict([text.replace("very ", "")])[0].probabilities
    for name in names:
        odds = [np.log(p[name] / (1 - p[name])) for p in (answer.probabilities, without)]
        assert found[name][3].log_odds == pytest.approx(odds[0] - odds[1], abs=2e-3)


def test_marks() -> None:
    found = [Contribution(*c) for c in (("a", 0.05), ("fine", 2.0), ("##ly", -0.5), ("film", 0.0))]
    assert marked(found, "subword", in_colour=False) == "a fine[+2.0]ly[-0.5] film"
    assert marked(found[:2], "character", in_colour=False) == "afine[+2.0]"
    coloured = marked(found, "word", in_colour=True)
    assert coloured.split(" ")[1] == f"{explanation.FOR[2]}fine{explanation.RESET}"
    assert coloured.split(" ")[2] == f"{explanation.AGAINST[0]}##ly{explanation.RESET}"
    assert marked([], "word", in_colour=True) == ""
    assert marked([Contribution("x", 0.0)], "word", in_colour=True) == "x"


def test_marks_in_colour_escape_what_the_text_holds() -> None:
    found = [Contribution("\x1b[2J", 2.0), Contribution("film", 0.0)]
    assert marked(found, "word", False).startswith("\x1b[2J[+2.0]")
    text = marked(found, "word", True)
    assert r"\x1b[2J" in text and "\x1b[2J" not in text
