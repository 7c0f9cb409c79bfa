"""--stage=predict and --stage=reconstruct: reads texts, writes predictions or reconstructions.

Rows are written in the order in which they are read.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_pipelines.errors import InputError
from data_pipelines.printable import printable, write_to
from data_pipelines.sources.rows import Row, kind_and_path, read_rows
from data_pipelines.sources.windows import windows
from trainer.config import Config
from trainer.inference.explanation import contributions, marked
from trainer.inference.prediction_files import opened, writer
from trainer.inference.reconstruct import reconstructor
from trainer.inference.sessions import Session
from trainer.inference.task_bank import load_task
from trainer.inference.text_classifier import Prediction, TextClassifier, load_classifier
from trainer.models import bundle

# Rows are read, sorted by length, classified and written one window after the other.
WINDOW_ROWS = 4096
WINDOW_CHARACTERS = 1 << 24
FAULTS_SHOWN = 20


def predict(config: Config, texts: Sequence[str]) -> None:
    """Classifies `texts`, or else --input, and writes to --output.

    Raises:
        InputError: A file is malformed, or rows have no usable text. The other rows are written,
            and the unusable ones are listed on standard error.
    """
    if config.task:
        model = load_task(config.encoder, config.task)
    else:
        model = load_classifier(Path(config.classifier))
    answers = _stream(model) if config.stream else _classify(model)
    tokenizer_kind = model.tokenizer.config()["type"]
    rows = Rows(config, texts, model.context_key)
    output = config.output or "-"
    with opened(output) as file:
        in_colour = file.isatty()
        write = writer(output, file, lambda found: marked(found, tokenizer_kind, in_colour))
        for window in rows.usable():
            for row, prediction in zip(window, answers(window), strict=True):
                context = _context(model, row)
                found = contributions(model, row.text, context) if config.explain else None
                write(row, prediction, found)
            file.flush()
    rows.raise_if_bad()


def _classify(model: TextClassifier) -> Callable[[list[Row]], list[Prediction]]:
    """Returns a function that classifies rows, each as a text."""

    def answers(rows: list[Row]) -> list[Prediction]:
        contexts = [_context(model, row) for row in rows]
        return model.predict([row.text for row in rows], contexts)

    return answers


def _context(model: TextClassifier, row: Row) -> str | None:
    """Returns what a row's text belongs to; None for an unknown context, as of a line of text."""
    value = row.values.get(model.context_key) if model.context_key else None
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _stream(model: TextClassifier) -> Callable[[list[Row]], list[Prediction]]:
    """Returns a function that classifies rows, each as the end of all rows so far.

    All must have one context.
    """
    by_context: dict[str | None, Session] = {}

    def after(row: Row) -> Prediction:
        context = _context(model, row)
        if by_context and context not in by_context:
            raise InputError(
                f"{row.where}: its {model.context_key!r} is {context!r}, but --stream reads one "
                f"text, and its first row has {next(iter(by_context))!r}"
            )
        if not by_context:
            by_context[context] = model.session(context)
        session = by_context[context]
        session.feed(row.text + "\n")
        return model.prediction(session.probabilities())

    return lambda rows: [after(row) for row in rows]


def reconstruct(config: Config, texts: Sequence[str]) -> None:
    """Writes `texts`, or else --input, as the autoencoder of --encoder reconstructs them.

    A line of text becomes three: whether the reconstruction is exact, the text as read, and as
    written. Raises as `predict`.
    """
    folder, output = Path(config.encoder), config.output or "-"
    trained = bundle.read_info(folder, "encoder", "--encoder").get("config", {})
    max_tokens = trained.get("pretrain_max_tokens", config.pretrain_max_tokens)
    read_and_write = reconstructor(folder, max_tokens)
    rows = Rows(config, texts)
    with opened(output) as file:
        for window in rows.usable():
            found = read_and_write([row.text for row in window])
            for row, made in zip(window, found, strict=True):
                if kind_and_path(output)[0] == "jsonl":
                    added = {"read": made.read, "written": made.written, "exact": made.exact}
                    line = json.dumps({**row.values, **added}, ensure_ascii=False)
                else:
                    same = "the same" if made.exact else "not the same"
                    line = f"{same}\n\tread\t{made.read}\n\twrote\t{made.written}"
                write_to(file)(line + "\n")
            file.flush()
    rows.raise_if_bad()


class Rows:
    """Reads the rows of the command line or of --input in windows, and lists unusable ones."""

    def __init__(self, config: Config, texts: Sequence[str], context_key: str = ""):
        source, text_key = config.input or "-", config.text_key or "text"
        self._rows = _rows_of(texts) if texts else read_rows(source, text_key, context_key)
        # Lines that are typed, or may arrive any time, are answered one by one.
        typed = not texts and source == "-" and sys.stdin.isatty()
        self._most_rows = 1 if typed or config.stream else WINDOW_ROWS
        self._total = self._bad = 0

    def usable(self) -> Iterator[list[Row]]:
        """Yields the usable rows of each window, in order."""
        for window in windows(self._rows, self._most_rows, WINDOW_CHARACTERS):
            self._total += len(window)
            for row in window:
                if row.fault:
                    self._bad += 1
                    _name_fault(row, self._bad)
            yield [row for row in window if not row.fault]

    def raise_if_bad(self) -> None:
        """Raises InputError if there were unusable rows."""
        if self._bad:
            raise InputError(
                f"{self._bad:,} of {self._total:,} rows have no usable text; the output leaves "
                "them out"
            )


def _rows_of(texts: Sequence[str]) -> Iterator[Row]:
    for number, text in enumerate(texts, 1):
        yield Row(f"argument {number}", text, {"text": text}, "" if text.strip() else "it is empty")


def _name_fault(row: Row, number: int) -> None:
    if number <= FAULTS_SHOWN:
        print(printable(f"error: {row.where}: {row.fault}"), file=sys.stderr)
    if number == FAULTS_SHOWN:
        print("error: (further unusable rows are counted, not listed)", file=sys.stderr)
