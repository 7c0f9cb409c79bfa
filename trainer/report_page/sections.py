"""The sections of report.html, each made from the runs; empty where there is nothing to show."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.config import Config
from trainer.report_page import charts
from trainer.report_page.charts import LEVELS, Series
from trainer.report_page.markup import Markup, join, tag
from trainer.report_page.run_folder import Part, RunFolder
from trainer.report_page.statistics import Interval, calibration, confusion, principal_plane
from trainer.report_page.verdict import TITLES, Outcome, aligned, differing_flags
from trainer.reporting.metrics_file import format_seconds
from trainer.reporting.predictions import Predictions

LINES = ("", "dashed", "dotted")
CLASSIFIERS = ("scratch", "warm", "classifier")


def status(runs: Sequence[RunFolder]) -> Markup:
    """Returns what has to be known about the data, and whether a run has ended."""
    lines = []
    for run in runs:
        if not run.report:
            last = (
                "last line written "
                + time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.last_written))
                if run.last_written
                else "no line written yet"
            )
            lines.append(f"{run.name} has not ended: it goes on, or it died; {last}.")
    notes = {str(run.report["data_note"]) for run in runs if run.report.get("data_note")}
    lines += [f"Data: {note}." for note in sorted(notes)]
    return join(tag("p", line, class_="status") for line in lines)


def verdict_picture(outcomes: Sequence[Outcome]) -> Markup:
    """Returns the errors with their intervals, and the figures in large."""
    several = len(outcomes) > 1
    rows = [
        (f"{TITLES.get(name, name)}{f', {each.run}' if several else ''}", error, name)
        for each in outcomes
        for name, error in each.errors.items()
    ]
    if not rows:
        return Markup("")
    tiles = []
    if not several:
        (only,) = outcomes
        tiles = [_tile(TITLES.get(name, name), e, " %", name) for name, e in only.errors.items()]
        if only.difference:
            how = "over the same documents" if only.is_paired else "of two samples"
            change = Interval(*(-only.difference[i] for i in (0, 2, 1)))  # of the error
            tiles.append(_tile("Warm start against scratch", change, " points", "", how, "+"))
    split = outcomes[0].split
    chart = charts.interval_chart(
        f"Errors on the {split} split", rows, "% of documents wrong, with 95 % intervals"
    )
    return tag(
        "section",
        tag("h2", "Verdict", class_="spoken"),
        tag("dl", tiles, class_="tiles") if tiles else None,
        chart,
        class_="verdict",
        aria_label="Verdict",
    )


def _tile(
    name: str, value: Interval, unit: str, colour: str, note: str = "", sign: str = ""
) -> Markup:
    """Returns a figure in large; `sign` is "+" where a plus is to be written."""
    middle, low, high = (f"{each:{sign}.1f}".replace("-", "\u2212") for each in value)
    return tag(
        "div",
        tag("dt", name),
        tag(
            "dd",
            tag("span", middle, tag("small", unit), class_="large"),
            tag("span", f"{low} to {high}", class_="range"),
            tag("span", note, class_="range") if note else None,
        ),
        class_=f"tile {colour}".strip(),
    )


def runs_table(runs: Sequence[RunFolder], outcomes: Sequence[Outcome]) -> Markup:
    """Returns one row a run, where there are several."""
    if len(runs) < 2:
        return Markup("")
    differing = [name for name in differing_flags(runs) if name != "seed"]

    def cell(value: Interval | None, unit: str) -> str:
        return f"{value.value:.2f}{unit} ({value.low:.1f} to {value.high:.1f})" if value else "-"

    rows = []
    for run, each in zip(runs, outcomes, strict=True):
        pretrained = run.report.get("pretrain")
        perplexity = pretrained.get("perplexity") if isinstance(pretrained, dict) else None
        rows.append(
            [
                run.name,
                "-" if each.seed is None else str(each.seed),
                cell(each.errors.get("scratch"), " %"),
                cell(each.errors.get("warm") or each.errors.get("classifier"), " %"),
                cell(each.difference, ""),
                f"{perplexity:.0f}" if isinstance(perplexity, int | float) else "-",
                *(str(run.config.get(name, "-")) for name in differing),
            ]
        )
    head = ["Run", "Seed", "From scratch", "Warm start", "Difference, points", "Perplexity"]
    return charts.plain_table(
        [*head, *(f"--{name}" for name in differing)], rows, "Errors with 95 % intervals"
    )


def learning(runs: Sequence[RunFolder]) -> Markup:
    """Returns the loss curves of pretraining and of fine-tuning."""
    pretraining = [
        *_curves(runs, ("pretrain",), "loss", "training"),
        *_curves(runs, ("pretrain",), "nats_per_token", "validation", dots=True),
    ]
    tuning = ("scratch", "warm")
    figures = [
        ("Pretraining loss", pretraining, "nats a token",
         "The training loss may be a sampled softmax, with dropout; validation is exact."),
        ("Fine-tuning: error on the validation split",
         _curves(runs, tuning, "error_percent", "", dots=True), "% wrong",
         "The weights of the lowest point are kept."),
        ("Fine-tuning: training loss",
         _curves(runs, tuning, "loss", "", training=True), "nats a document", ""),
        ("Fine-tuning: validation loss",
         _curves(runs, tuning, "loss", "", dots=True, training=False), "nats a document",
         "It rises where a classifier becomes too sure of itself, even while its error falls."),
    ]  # fmt: skip
    return join(
        charts.line_chart(title, lines, "step", unit, note) for title, lines, unit, note in figures
        if lines
    )  # fmt: skip


def _curves(
    runs: Sequence[RunFolder],
    parts: Sequence[str],
    value: str,
    kind: str,
    dots: bool = False,
    training: bool | None = None,
) -> list[Series]:
    """Returns one line a part and run of what metrics.jsonl calls `value`.

    Args:
      kind: for the legend.
      training: whether lines of training steps count, or of evaluations, or None: both.
    """
    found = []
    for run, name, part, look in _parts(runs, parts):
        lines = [
            line
            for line in part.metrics
            if value in line and training in (None, "tokens_per_second" in line)
        ]
        if lines:
            title = f"{TITLES[name]}{f', {kind}' if kind else ''}"
            title += f", {run.name}" if len(runs) > 1 else ""
            x, y = [line["step"] for line in lines], [line[value] for line in lines]
            colour = "validation" if kind == "validation" and len(runs) == 1 else name
            found.append(Series(title, x, y, colour, look, dots))
    return found


def _parts(
    runs: Sequence[RunFolder], names: Sequence[str]
) -> Iterator[tuple[RunFolder, str, Part, str]]:
    """Yields run, name, part, and the kind of line that the run has in charts."""
    for index, run in enumerate(runs):
        for name in names:
            if name in run.parts:
                yield run, name, run.parts[name], LINES[index % len(LINES)]


def throughput(runs: Sequence[RunFolder]) -> Markup:
    """Returns tokens a second over the time since the part's first line."""
    found = []
    for run, name, part, look in _parts(runs, ("pretrain", "scratch", "warm")):
        lines = [each for each in part.metrics if {"tokens_per_second", "unix_time"} <= each.keys()]
        if not lines:
            continue
        start = lines[0]["unix_time"]
        title = TITLES[name] + (f", {run.name}" if len(runs) > 1 else "")
        minutes = [(each["unix_time"] - start) / 60 for each in lines]
        found.append(Series(title, minutes, [e["tokens_per_second"] for e in lines], name, look))
    if not found:
        return Markup("")
    return charts.line_chart(
        "Tokens a second",
        found,
        "minutes since the first line of each part",
        "tokens/s, all workers",
        "In training steps only: evaluations and checkpoints do not count.",
        from_zero=True,
    )


def learned_states(runs: Sequence[RunFolder]) -> Markup:
    """Returns the encoder's learned and mean states as pictures."""
    blocks = []
    for run in runs:
        states = next((part.states for part in run.parts.values() if part.states), {})
        if not states:
            continue
        rows = []
        pictures = []
        for name, values in sorted(states.items(), key=lambda pair: _state_order(pair[0])):
            largest = float(np.abs(values).max())
            pictures.append(charts.heat_map(_state_title(name), values, largest))
            rows.append(
                [
                    _state_title(name),
                    str(len(values)),
                    f"{values.min():.4f}",
                    f"{values.max():.4f}",
                    f"{np.abs(values).mean():.4f}",
                    f"{np.linalg.norm(values):.4f}",
                ]
            )
        head = ["State", "Units", "Lowest", "Highest", "Mean size", "Norm"]
        blocks.append(
            tag(
                "div",
                tag("h3", run.name) if len(runs) > 1 else None,
                tag("div", pictures, class_="row four"),
                _scale("below zero", "above zero"),
                charts.table(head, rows),
            )
        )
    if not blocks:
        return Markup("")
    text = (
        "What the LSTM can start from: the state (h, c) trained as parameters during pretraining, "
        "and the final state averaged over the corpus. One cell a unit, the same place in each "
        "picture; each picture has a scale of its own."
    )
    return join([tag("p", text), blocks])


def _state_order(name: str) -> tuple[str, bool]:
    """Returns a key that puts h before c, as everybody says them."""
    return name[:-1], name.endswith("c")


def _state_title(name: str) -> str:
    parts = name.split("/")
    layer = f", layer {parts[1]}" if len(parts) == 3 else ""
    return f"{parts[0]} {parts[-1]}{layer}"


def _scale(low: str, high: str) -> Markup:
    cells = [
        tag("rect", class_=f"cell {charts.level_class(level)}", x=12 * i, width=12, height=12)
        for i, level in enumerate(range(-LEVELS, LEVELS + 1))
    ]
    picture = tag("svg", cells, width=12 * (2 * LEVELS + 1), height=12, aria_hidden="true")
    return tag("p", low, picture, high, class_="scale")


def final_states(runs: Sequence[RunFolder]) -> Markup:
    """Returns the states in which documents end, on the plane in which they spread most."""
    blocks = []
    for title, found in _predictions(runs):
        labels = found.tensors["state/label"]
        if len(labels) < 3:
            continue
        names = class_names(found)
        pictures, rows = [], []
        for part, word in (("h", "hidden state h"), ("c", "cell state c")):
            states = found.tensors[f"state/{part}"]
            plane = principal_plane(states)
            axes = [
                f"component {i + 1} ({100 * share:.0f} % of variance)"
                for i, share in enumerate(plane.explained)
            ]
            pictures.append(charts.scatter(word, plane.points, labels, names, axes))
            rows.append([word, *_separation(states, labels)])
        blocks.append(
            tag(
                "div",
                tag("h3", title),
                tag("div", pictures, class_="row"),
                charts.mark_legend(names),
                charts.table(
                    ["State", "Documents", "Distance of the labels' means", "Spread in a label"],
                    rows,
                ),
            )
        )
    if not blocks:
        return Markup("")
    text = (
        "The state of the classifier's LSTM after a document's last word, for some hundred "
        "documents, by label. The further the labels are apart, the less the layers above have to "
        "do."
    )
    return join([tag("p", text), blocks])


def _separation(states: np.ndarray, labels: np.ndarray) -> list[str]:
    """Returns documents, the mean distance of the labels' means, and the spread around them."""
    present = np.unique(labels)
    means = np.stack([states[labels == label].mean(axis=0) for label in present])
    spread = np.sqrt(np.square(states - means[np.searchsorted(present, labels)]).sum(axis=1).mean())
    gaps = [float(np.linalg.norm(means[i] - means[j])) for i in range(len(means)) for j in range(i)]
    return [f"{len(labels):,}", f"{np.mean(gaps):.2f}" if gaps else "-", f"{spread:.2f}"]


def _predictions(runs: Sequence[RunFolder]) -> Iterator[tuple[str, Predictions]]:
    """Yields a title and the predictions of each classifier."""
    for run, name, part, _ in _parts(runs, CLASSIFIERS):
        if part.predictions is not None:
            yield TITLES[name] + (f", {run.name}" if len(runs) > 1 else ""), part.predictions


def class_names(found: Predictions) -> list[str]:
    """Returns what labels are called: their names where the classifier knows them."""
    classes, names = found.info["classes"], found.info.get("class_names")
    if isinstance(names, list) and len(names) == classes:
        return [str(name) for name in names]
    return [f"label {i}" for i in range(classes)]


def mistakes(runs: Sequence[RunFolder]) -> Markup:
    """Returns the confusion matrices, and where two classifiers differ."""
    tables = []
    for title, found in _predictions(runs):
        counts = confusion(found.label, found.predicted, found.info["classes"])
        tables.append(_confusion_table(title, counts, class_names(found)))
    if not tables:
        return Markup("")
    words = []
    for run in runs:
        both = [run.parts[n].predictions if n in run.parts else None for n in ("scratch", "warm")]
        if (wrong := aligned(*both)) is not None:
            scratch, warm = wrong
            words.append(
                tag(
                    "p",
                    f"{run.name}: " if len(runs) > 1 else "",
                    f"{int((scratch & warm).sum()):,} documents fool both classifiers; "
                    f"{int((scratch & ~warm).sum()):,} fool only the one from scratch, "
                    f"{int((warm & ~scratch).sum()):,} only the warm one.",
                )
            )
    return join([words, tag("div", tables, class_="row")])


def _confusion_table(title: str, counts: np.ndarray, names: Sequence[str]) -> Markup:
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j in range(len(names)):
            share = counts[i, j] / total[i, 0]
            level = charts.level_class((1 if i == j else -1) * int(np.ceil(share * LEVELS)))
            cells.append(
                tag(
                    "td",
                    tag("strong", f"{counts[i, j]:,}"),
                    tag("span", f"{100 * share:.1f} %"),
                    class_=f"cell {level}",
                )
            )
        rows.append(tag("tr", tag("th", name, scope="row"), cells))
    head = tag("tr", tag("td", "is"), [tag("th", f"taken for {n}", scope="col") for n in names])
    return tag(
        "div",
        tag("table", tag("caption", title), tag("thead", head), tag("tbody", rows)),
        class_="wide confusion",
        tabindex="0",
        role="region",
        aria_label=f"Confusion matrix: {title}",
    )


def calibrations(runs: Sequence[RunFolder]) -> Markup:
    """Returns how often classifiers are right when they are sure."""
    found = []
    for run, name, part, look in _parts(runs, CLASSIFIERS):
        if part.predictions is not None:
            each = calibration(part.predictions.probability, part.predictions.label)
            title = TITLES[name] + (f", {run.name}" if len(runs) > 1 else "")
            found.append((title, each, name, look))
    if not found or len({len(each.edges) for _, each, *_ in found}) > 1:
        return Markup("")
    tiles = [
        tag(
            "div",
            tag("dt", title),
            tag("dd", tag("span", f"{each.error:.3f}", class_="large"),
                tag("span", "expected calibration error", class_="range")),
            class_=f"tile {name}",
        )
        for title, each, name, _ in found
    ]  # fmt: skip
    return join(
        [
            tag("dl", tiles, class_="tiles"),
            charts.reliability_chart("Right, by how sure the classifier is", found),
        ]
    )


def documents(runs: Sequence[RunFolder]) -> Markup:
    """Returns the most wrong and the surest documents, each word shaded by what it adds."""
    blocks = []
    for title, found in _predictions(runs):
        names = class_names(found)
        cards = [_document(each, names, i == 0) for i, each in enumerate(found.info["examples"])]
        blocks += [tag("h3", title), cards]
    if not blocks:
        return Markup("")
    text = (
        "The documents that were classified wrongly with the greatest confidence, and then the "
        "surest right ones of each label. A word's shade is what it adds to the class that was "
        "chosen: the gradient of the class's logit times the word's embedding, which is true for "
        "small changes only. Words that speak for the class are underlined, words against it "
        "have a dotted line. As the classifier reads them: lower case, rare words unknown."
    )
    return join([tag("p", text), _scale("speaks against", "speaks for the class"), blocks])


def _document(example: dict[str, Any], names: Sequence[str], is_open: bool) -> Markup:
    added = np.array(example["contributions"], np.float64)
    largest = float(np.abs(added).max(initial=0.0)) or 1.0
    levels = np.rint(added / largest * LEVELS).astype(int).tolist()
    label, predicted = names[example["label"]], names[example["predicted"]]
    is_right = example["label"] == example["predicted"]
    words: list[Any] = []
    for piece, level in zip(example["pieces"], levels, strict=True):
        word = piece.lstrip(" ")
        words.append(piece[: len(piece) - len(word)])
        words.append(
            tag("span", word, class_=charts.level_class(level)) if abs(level) > 1 else word
        )
    strongest = np.argsort(-np.abs(added), kind="stable")[:6].tolist()
    said = ", ".join(f"{example['pieces'][i].strip()} {added[i]:+.2f}" for i in strongest)
    return tag(
        "details",
        tag(
            "summary",
            tag("span", "right" if is_right else "wrong", class_=f"badge {is_right}".lower()),
            f" {label}" if is_right else f" {label}, taken for {predicted}",
            tag("span", f" at {_sureness(example['probability'])}", class_="range"),
        ),
        tag("p", words, class_="review", dir="auto"),
        tag("p", f"Strongest: {said}", class_="range"),
        class_="document",
        open=is_open,
    )


def _sureness(probability: float) -> str:
    return "more than 99.9 %" if probability > 0.999 else f"{100 * probability:.1f} %"


def settings(runs: Sequence[RunFolder]) -> Markup:
    """Returns every flag of the runs; those that differ from their defaults first."""
    defaults = dataclasses.asdict(Config())
    names = list(dict.fromkeys([*defaults, *(name for run in runs for name in run.config)]))
    if not any(run.config for run in runs):
        return Markup("")
    changed: list[list[str]] = []
    others: list[list[str]] = []
    for name in names:
        values = [str(run.config.get(name, "-")) for run in runs]
        default = str(defaults.get(name, "-"))
        is_changed = any(value != default for value in values)
        (changed if is_changed else others).append([f"--{name}", *values, default])
    head = ["Flag", *(run.name if len(runs) > 1 else "Value" for run in runs), "Default"]
    return join(
        [
            charts.plain_table(head, changed, "Flags that were given"),
            tag(
                "details",
                tag("summary", f"The {len(others)} that have their defaults"),
                charts.plain_table(head, others, "Flags that have their defaults"),
            ),
        ]
    )


def environments(runs: Sequence[RunFolder]) -> Markup:
    """Returns what the runs ran with."""
    names = list(dict.fromkeys(name for run in runs for name in run.environment))
    if not names:
        return Markup("")

    def cell(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    rows = [
        [name.replace("_", " "), *(cell(run.environment.get(name, "-")) or "none" for run in runs)]
        for name in names
    ]
    rows.append(["workers", *(str(run.report.get("world_size", "-")) for run in runs)])
    seconds = [run.report.get("wall_seconds") for run in runs]
    times = [format_seconds(s) if isinstance(s, int | float) else "-" for s in seconds]
    rows.append(["time of the last sitting", *times])
    head = ["", *(run.name if len(runs) > 1 else "Value" for run in runs)]
    return charts.plain_table(head, rows, "Machine and programs")


def missing(runs: Sequence[RunFolder]) -> Markup:
    """Returns what could not be shown, and what would make it."""
    lines = []
    for run in runs:
        lines += run.faults
        named = f"{run.name}: "
        if not run.report:
            lines.append(f"{named}report.json: the run writes it when it ends.")
        if not run.environment:
            lines.append(f"{named}environment.json: an older version wrote none.")
        if not any(part.metrics for part in run.parts.values()):
            lines.append(f"{named}metrics.jsonl: no step has been trained in this folder.")
        if not any(part.predictions for part in run.parts.values()):
            lines.append(
                f"{named}predictions: --stage=all and --stage=evaluate write them at their end; "
                "without them there are no mistakes, calibration, final states or documents."
            )
        if not any(part.states for part in run.parts.values()):
            lines.append(f"{named}encoder bundle: --stage=all and --stage=pretrain write one.")
    return tag("ul", [tag("li", line) for line in lines]) if lines else Markup("")
