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
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import warmstate
from benchmarks.cross_validation import examples, write_json_lines
from data_pipelines.errors import InputError, raise_if
from data_pipelines.sources import SPLITS, Source, open_source
from trainer.inference.text_classifier import TextClassifier

LABELLED_COPIES = 2  # so that the labels are read about as often as without other documents
LEAST_PROBABILITY = 0.8
FLOOR = 1e-6  # no teacher is so sure that all the others cannot outvote it


def mean_of(probabilities: np.ndarray) -> np.ndarray:
    """Returns the teachers' normalised geometric mean: float64 [texts, classes].

    Args:
        probabilities: Of each teacher: [teachers, texts, classes].
    """
    log_mean = np.log(np.maximum(probabilities, FLOOR, dtype=np.float64)).mean(axis=0)
    mean = np.exp(log_mean)
    return mean / mean.sum(axis=1, keepdims=True)


def teachers_of(folders: Sequence[str], class_names: tuple[str, ...]) -> list[TextClassifier]:
    """Returns the classifiers in the folders.

    Raises:
        InputError: A classifier has other classes, or its bundle cannot be read.
    """
    teachers = [warmstate.load_classifier(folder) for folder in folders]
    raise_if(
        [
            f"--teacher={folder} has the classes {', '.join(teacher.class_names)}, "
            f"and --source {', '.join(class_names)}"
            for folder, teacher in zip(folders, teachers, strict=True)
            if tuple(teacher.class_names) != class_names
        ]
    )
    return teachers


def taught(texts: Sequence[str], teachers: Sequence[TextClassifier]) -> list[tuple[str, str]]:
    """Returns the texts that the teachers are sure of, each with the name of its class."""
    mean = mean_of(np.stack([teacher.probabilities(texts) for teacher in teachers]))
    sure = np.flatnonzero(mean.max(axis=1) >= LEAST_PROBABILITY)
    return [(texts[row], teachers[0].class_names[mean[row].argmax()]) for row in sure]


def write_splits(source: Source, teachers: Sequence[TextClassifier], folder: Path) -> str:
    """Writes the splits; returns the source that reads them."""
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
    others = taught(texts, teachers)
    print(
        f"train: {len(rows['train']):,} labelled documents, {LABELLED_COPIES} times each, and "
        f"{len(others):,} of {len(texts):,} unlabelled ones"
    )
    rows["train"] = rows["train"] * LABELLED_COPIES + others
    return write_json_lines(rows, folder)


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
        if missing := [split for split in SPLITS if split not in source.splits]:
            raise InputError(f"--source={options.source} has no split {', '.join(missing)}")
        written = write_splits(
            source, teachers_of(options.teacher, source.class_names), options.out
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote --source={written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
