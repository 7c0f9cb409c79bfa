r"""Labels that classifiers gave to unlabelled texts, as documents for another classifier to learn.

    python -m benchmarks.distil --source=tfds:imdb_reviews --data_dir=DIR --out=FOLDER \
        --teacher=runs/a/warm/classifier --teacher=runs/b/classifier

FOLDER gets the splits train, validation and test as JSON Lines, which `prepare` reads. Train has
each labelled document LABELLED_COPIES times, then each unlabelled text with the class that its
teachers' mean (of log-probabilities) prefers (hard labels: Lee 2013). A text that the mean is less
than LEAST_PROBABILITY sure of is left out, and so is one that validation or test has too. Teachers
must not have learned from validation or test.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import warmstate
from benchmarks.cross_validation import examples
from data_pipelines.errors import InputError
from data_pipelines.sources import Source, open_source
from trainer.safe_files import replace_text

LABELLED_COPIES = 2  # so that the labels are read about as often as without other documents
LEAST_PROBABILITY = 0.8
FLOOR = 1e-6  # no teacher is so sure that all the others cannot outvote it


def mean_of(probabilities: np.ndarray) -> np.ndarray:
    """Returns the teachers' normalised geometric mean: float64 [texts, classes].

    Args:
        probabilities: Of each teacher: [teachers, texts, classes].
    """
    log_mean = np.log(np.clip(probabilities.astype(np.float64), FLOOR, 1 - FLOOR)).mean(axis=0)
    mean = np.exp(log_mean)
    return mean / mean.sum(axis=1, keepdims=True)


def taught(
    texts: Sequence[str], teachers: Sequence[str], class_names: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Returns the texts that the teachers are sure of, each with the name of its class.

    Raises:
        InputError: A teacher has other classes, or its bundle cannot be read.
    """
    found = []
    for folder in teachers:
        classifier = warmstate.load_classifier(folder)
        if tuple(classifier.class_names) != class_names:
            raise InputError(
                f"--teacher={folder} has the classes {', '.join(classifier.class_names)}, "
                f"and --source {', '.join(class_names)}"
            )
        found.append(classifier.probabilities(texts))
    mean = mean_of(np.stack(found))
    sure = np.flatnonzero(mean.max(axis=1) >= LEAST_PROBABILITY)
    return [(texts[row], class_names[mean[row].argmax()]) for row in sure]


def write_splits(source: Source, teachers: Sequence[str], folder: Path) -> dict[str, int]:
    """Writes the splits; returns how many documents train has of each kind.

    Raises:
        InputError: As for `taught`; or the source lacks a split.
    """
    if missing := {"train", "validation", "test", "unsupervised"} - set(source.splits):
        raise InputError(f"--source={source.name} has no split {', '.join(sorted(missing))}")
    rows = {
        split: [
            (each.text, source.class_names[each.label])
            for each in examples(source, [split])
            if each.label is not None
        ]
        for split in ("train", "validation", "test")
    }
    held_out = {text for split in ("validation", "test") for text, _ in rows[split]}
    texts = [each.text for each in examples(source, ["unsupervised"])]
    texts = [text for text in texts if text not in held_out]
    others = taught(texts, teachers, source.class_names)
    counts = {"labelled": len(rows["train"]), "unlabelled": len(texts), "taught": len(others)}
    rows["train"] = rows["train"] * LABELLED_COPIES + others
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in rows.items():
        replace_text(folder / f"{split}.jsonl", json_lines(documents))
    return counts


def json_lines(documents: Iterable[tuple[str, str]]) -> str:
    """Returns a line for each text and label."""
    lines = (json.dumps({"text": text, "label": label}) for text, label in documents)
    return "".join(f"{line}\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distil")
    parser.add_argument("--source", required=True, help="has labelled and unlabelled documents")
    parser.add_argument("--data_dir", help="folder of prepared TFDS data sets")
    parser.add_argument(
        "--teacher", action="append", required=True, help="a classifier bundle; can be repeated"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits")
    options = parser.parse_args(argv)
    try:
        source = open_source(options.source, options.data_dir)
        counts = write_splits(source, options.teacher, options.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.out}: {counts['labelled']:,} labelled documents, {LABELLED_COPIES} times each, "
        f"and {counts['taught']:,} of {counts['unlabelled']:,} unlabelled ones"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
