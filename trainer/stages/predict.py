"""--stage=predict: texts -> labels and probabilities, in the texts' order."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_pipelines.errors import InputError
from data_pipelines.rows import Row, read_rows
from trainer.config import Config
from trainer.explanation import contributions, marked
from trainer.prediction_files import opened, writer
from trainer.text_classifier import load_classifier

# A window of rows is read, sorted by length, classified and written before the next is read.
WINDOW_ROWS = 4096
WINDOW_CHARACTERS = 1 << 24
FAULTS_SHOWN = 20


def predict(config: Config, texts: Sequence[str]) -> None:
    """Classifies `texts`, or else --input, and writes to --output.

    Raises:
      InputError: a file is not as it must be, or rows hold no text; the other rows are written, and
        each of these is named on standard error.
    """
    model = load_classifier(Path(config.classifier))
    rows = _rows_of(texts) if texts else read_rows(config.input or "-", config.text_key or "text")
    # Whoever types lines wants each answered.
    typed = not texts and config.input in ("", "-") and sys.stdin.isatty()
    tokenizer_kind = model.tokenizer.config()["type"]
    total, bad = 0, 0
    with opened(config.output or "-") as file:
        in_colour = file.isatty()
        write = writer(
            config.output or "-", file, lambda found: marked(found, tokenizer_kind, in_colour)
        )
        for window in windows(rows, 1 if typed else WINDOW_ROWS):
            total += len(window)
            good = [row for row in window if not row.fault]
            for row in window:
                if row.fault:
                    bad += 1
                    _name_fault(row, bad)
            for row, prediction in zip(good, model.predict([r.text for r in good]), strict=True):
                write(row, prediction, contributions(model, row.text) if config.explain else None)
            file.flush()
    if bad:
        raise InputError(
            f"{bad:,} of {total:,} rows hold no text that can be classified; they are left out of "
            "the output"
        )


def windows(rows: Iterable[Row], most_rows: int) -> Iterator[list[Row]]:
    """Yields the rows in order, as many together as fit in bounded memory."""
    window: list[Row] = []
    characters = 0
    for row in rows:
        window.append(row)
        characters += len(row.text)
        if len(window) == most_rows or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _rows_of(texts: Sequence[str]) -> Iterator[Row]:
    for number, text in enumerate(texts, 1):
        yield Row(f"argument {number}", text, {"text": text}, "" if text.strip() else "it is empty")


def _name_fault(row: Row, number: int) -> None:
    if number <= FAULTS_SHOWN:
        print(f"error: {row.where}: {row.fault}", file=sys.stderr)
    if number == FAULTS_SHOWN:
        print("error: (further rows of this kind are only counted)", file=sys.stderr)
