"""Writes predictions as lines of text, CSV, TSV or JSON Lines."""

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from data_pipelines.durable import replacing
from data_pipelines.errors import InputError
from data_pipelines.printable import write_to
from data_pipelines.sources.rows import Row, kind_and_path
from trainer.inference.text_classifier import SEPARATOR, Prediction

PREDICTED = "predicted"
PROBABILITIES = "probabilities"
CONTRIBUTIONS = "contributions"
Found = dict[str, list[Any]] | None  # contributions by explained label
Write = Callable[[Row, Prediction, Found], None]


@contextlib.contextmanager
def opened(spec: str) -> Iterator[IO[str]]:
    """Opens the output of predictions; a file gets its name only when it is complete.

    Args:
        spec: `[KIND:]PATH`; "-" is standard output.

    Raises:
        InputError: The file cannot be written.
    """
    _, path = kind_and_path(spec)
    if path == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        with replacing(Path(path)) as file:
            yield file
    except OSError as error:
        raise InputError(f"--output={spec} cannot be written: {error.strerror}") from None


def writer(spec: str, file: IO[str], mark: Callable[[list[Any]], str]) -> Write:
    """Returns write(row, prediction, contributions), which writes a line or a record.

    Tables and JSON Lines keep the row's values and add `predicted`, and `probability_NAME` for each
    class in a table, or `probabilities` (and `contributions`, if given) in JSON Lines. A line of
    text is the label, its probability and the text, separated by tabs. With --labels=multi
    `predicted` is a list in JSON Lines and elsewhere "a|b"; a line of text has the probability of
    each label.

    Args:
        mark: Formats contributions for the line below a line of text.
    """
    kind, _ = kind_and_path(spec)
    if kind == "text":
        return _text_writer(file, mark)
    if kind == "jsonl":
        return _json_writer(write_to(file))
    return _table_writer(write_to(file), kind)


def _text_writer(file: IO[str], mark: Callable[[list[Any]], str]) -> Write:
    put = write_to(file)

    def write(row: Row, prediction: Prediction, contributions: Found) -> None:
        labels = [prediction.label] if prediction.labels is None else prediction.labels
        probability = SEPARATOR.join(f"{prediction.probabilities[each]:.4f}" for each in labels)
        put(f"{prediction.answer}\t{probability}\t{' '.join(row.text.split())}\n")
        for label, found in (contributions or {}).items():
            put(f"\t{label if prediction.labels is not None else ''}\t")
            file.write(f"{mark(found)}\n")

    return write


def _json_writer(put: Callable[[str], object]) -> Write:
    def write(row: Row, prediction: Prediction, contributions: Found) -> None:
        added: dict[str, Any] = {
            PREDICTED: prediction.label if prediction.labels is None else prediction.labels,
            PROBABILITIES: prediction.probabilities,
        }
        if contributions is not None:
            is_one = prediction.labels is None
            added[CONTRIBUTIONS] = contributions[prediction.label] if is_one else contributions
        _refuse_clash(row, added)
        put(json.dumps({**row.values, **added}, ensure_ascii=False) + "\n")

    return write


def _table_writer(put: Callable[[str], object], kind: str) -> Write:
    csv_lines = csv.writer(SimpleNamespace(write=put), lineterminator="\n")
    columns: list[str] = []

    def write_line(values: list[str]) -> None:
        if kind == "csv":
            csv_lines.writerow(values)
        else:  # TSV has no quoting
            put("\t".join(" ".join(v.splitlines()).replace("\t", " ") for v in values) + "\n")

    def write(row: Row, prediction: Prediction, contributions: Found) -> None:
        named = prediction.probabilities.items()
        added = {PREDICTED: prediction.answer} | {f"probability_{n}": str(p) for n, p in named}
        if not columns:
            _refuse_clash(row, added)
            columns.extend([*row.values, *added])
            write_line(columns)
        if set(columns) != set(row.values) | set(added):
            raise InputError(
                f"{row.where} has {', '.join(row.values)}, which differ from the first row's: "
                "choose --output=jsonl:PATH, where each record has its own keys"
            )
        values = {**row.values, **added}
        write_line([_as_text(values[name]) for name in columns])

    return write


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse_clash(row: Row, added: Mapping[str, Any]) -> None:
    if both := [name for name in added if name in row.values]:
        raise InputError(
            f"{row.where} has {', '.join(both)} already, a name for predictions: rename it first"
        )
