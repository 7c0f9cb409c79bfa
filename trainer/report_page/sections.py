"""The sections of report.html, made from the runs; a section without data is empty."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.config import Config
from trainer.report_page import charts
from trainer.report_page.charts import LEVELS, Series
from trainer.report_page.markup import Markup, join, tag
from trainer.report_page.run_folder import Part, RunFolder
from trainer.report_page.statistics import (
    Interval,
    by_class,
    calibration,
    confusion,
    mean_of_runs,
    principal_plane,
    proportion,
)
from trainer.report_page.verdict import TITLES, Outcome, aligned, differing_flags, percent
from trainer.reporting.metrics_file import format_seconds
from trainer.reporting.predictions import EXAMPLE_TOKENS, Predictions
from trainer.reporting.report_file import MODELS, errors_by_labels

LINES = ("", "dashed", "dotted")
CLASSIFIERS = ("scratch", "warm", "classifier")
LARGEST_CLASSES = 30  # are drawn, and the others summed
MAX_NAME = 80  # characters


def status(runs: Sequence[RunFolder]) -> Markup:
    """Returns a line for each run that has not ended, and the notes about its data."""
    lines = []
    for run in runs:
        if not run.report:
            written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.last_written))
            last = f"last line written {written}" if run.last_written else "no line written yet"
            lines.append(f"{run.name} has not ended: it is running or was interrupted; {last}.")
    notes = {str(run.report["data_note"]) for run in runs if run.report.get("data_note")}
    lines += [f"Data: {note}." for note in sorted(notes)]
    return join(tag("p", line, class_="status") for line in lines)


def verdict_picture(outcomes: Sequence[Outcome]) -> Markup:
    """Returns the errors with their intervals, of a single run also in large type."""
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
            how = "over the same documents" if only.is_paired else "from two samples"
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
    """Returns a figure in large type; with `sign` "+", positive figures have a plus sign."""
    middle, low, high = (f"{each:{sign}.1f}".replace("-", "\u2212") for each in value)
    return charts.tile(
        name, [middle, tag("small", unit)], [f"{low} to {high}", *([note] if note else [])], colour
    )


def runs_table(runs: Sequence[RunFolder], outcomes: Sequence[Outcome]) -> Markup:
    """Returns a row for each run, if there are several."""
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
    head += [f"--{name}" for name in differing]
    return charts.plain_table(head, rows, "Errors with 95 % intervals")


def labels(runs: Sequence[RunFolder]) -> Markup:
    """Returns a figure of test errors for each number of labels, of runs with --label_counts."""
    figures = []
    for run in runs:
        for count, models in _errors_by_labels(run).items():
            rows = [(MODELS[name], _mean(run, errors), name) for name, errors in models.items()]
            name = f", {run.name}" if len(runs) > 1 else ""
            figures.append(
                charts.interval_chart(
                    f"{count:,} labels{name}", rows, "% of test documents wrong, 95 % intervals"
                )
            )
    if not figures:
        return Markup("")
    text = (
        "The same test documents for every model. With several samples of the labels the interval "
        "is Student's over them; with all labels it covers the choice of test documents. Linear "
        "models read words and pairs of words; TF-IDF and LSA are logistic regressions."
    )
    return join([tag("p", text), figures])


def _errors_by_labels(run: RunFolder) -> dict[int, dict[str, list[float]]]:
    """Returns test errors in percent by number of labels and model; {} if there are none."""
    try:
        return errors_by_labels(run.report.get("labels") or [])
    except (KeyError, TypeError, ValueError):
        return {}


def _mean(run: RunFolder, errors: Sequence[float]) -> Interval:
    if len(errors) > 1:
        return mean_of_runs(list(errors))
    documents = max(int(each["documents"]) for each in run.report["test"].values())
    return percent(proportion(errors[0] / 100 * documents, documents))


def learning(runs: Sequence[RunFolder]) -> Markup:
    """Returns the loss curves of pretraining and of fine-tuning."""
    pretraining = [
        *_curves(runs, ("pretrain",), "loss", "training"),
        *_curves(runs, ("pretrain",), "nats_per_token", "validation", dots=True),
    ]
    tuning = ("scratch", "warm")
    figures = [
        ("Pretraining loss", pretraining, "nats per token",
         "The training loss may use a sampled softmax and dropout; validation is exact."),
        ("Fine-tuning: error on the validation split",
         _curves(runs, tuning, "error_percent", dots=True), "% wrong",
         "The weights of the lowest point are kept; with --labels=multi, see the next figure."),
        ("Fine-tuning: labels on the validation split",
         _curves(runs, tuning, "f1_error_percent", dots=True), "100 minus micro F1 in percent",
         "At thresholds of 0.5. The weights of the lowest point are kept."),
        ("Fine-tuning: training loss",
         _curves(runs, tuning, "loss", training=True), "nats per document", ""),
        ("Fine-tuning: validation loss",
         _curves(runs, tuning, "loss", dots=True, training=False), "nats per document",
         "It rises when a classifier becomes overconfident, even while its error falls."),
    ]  # fmt: skip
    return join(
        charts.line_chart(title, lines, "step", unit, note)
        for title, lines, unit, note in figures
        if lines
    )


def _curves(
    runs: Sequence[RunFolder],
    parts: Sequence[str],
    value: str,
    kind: str = "",
    dots: bool = False,
    training: bool | None = None,
) -> list[Series]:
    """Returns a line for each part and run, of `value` in metrics.jsonl.

    Args:
        kind: Added to the name in the legend.
        training: True: lines of training steps only. False: of evaluations only. None: both.
    """
    found = []
    for title, name, part, look in _parts(runs, parts):
        lines = [
            line
            for line in part.metrics
            if value in line and training in (None, "tokens_per_second" in line)
        ]
        if lines:
            if kind:
                title = title.replace(TITLES[name], f"{TITLES[name]}, {kind}", 1)
            x, y = [line["step"] for line in lines], [line[value] for line in lines]
            colour = "validation" if kind == "validation" and len(runs) == 1 else name
            found.append(Series(title, x, y, colour, look, dots))
    return found


def _parts(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterator[tuple[str, str, Part, str]]:
    """Yields a title, the part's name, the part, and the style of the run's lines in charts."""
    for index, run in enumerate(runs):
        for name in names:
            if name in run.parts:
                title = TITLES[name] + (f", {run.name}" if len(runs) > 1 else "")
                yield title, name, run.parts[name], LINES[index % len(LINES)]


def learning_rate_range(runs: Sequence[RunFolder]) -> Markup:
    """Returns the loss against the learning rate, of runs with --lr_range."""
    found, rows = [], []
    for index, run in enumerate(runs):
        report = run.report.get("lr_range") or {}
        try:
            points = [(each["learning_rate"], each["loss"]) for each in report["points"]]
            x, y = [math.log10(rate) for rate, _ in points], [float(loss) for _, loss in points]
            rows.append([run.name, report["stage"], f"{report['suggestion']:g}"])
        except (KeyError, TypeError, ValueError):
            continue
        found.append(Series(run.name, x, y, "pretrain", LINES[index % len(LINES)], dots=True))
    if not rows:
        return Markup("")
    chart = charts.line_chart(
        "Loss while the learning rate rises",
        found,
        "logarithm of the learning rate, base 10",
        "training loss",
        "The suggestion is a tenth of the rate with the lowest smoothed loss.",
    )
    head = ["Run", "Stage", "Suggested learning rate"]
    return join([chart, charts.plain_table(head, rows, "Suggested learning rates")])


def throughput(runs: Sequence[RunFolder]) -> Markup:
    """Returns tokens per second over the time since the part's first line."""
    found = []
    for title, name, part, look in _parts(runs, ("pretrain", "scratch", "warm")):
        lines = [each for each in part.metrics if {"tokens_per_second", "unix_time"} <= each.keys()]
        if lines:
            minutes = [(each["unix_time"] - lines[0]["unix_time"]) / 60 for each in lines]
            rates = [each["tokens_per_second"] for each in lines]
            found.append(Series(title, minutes, rates, name, look))
    if not found:
        return Markup("")
    return charts.line_chart(
        "Tokens per second",
        found,
        "minutes since the first line of each part",
        "tokens/s, all workers",
        "Training steps only, without evaluations and checkpoints.",
        from_zero=True,
    )


def learned_states(runs: Sequence[RunFolder]) -> Markup:
    """Returns heat maps of the encoder's learned and mean states."""
    blocks = []
    for run in runs:
        states = next((part.states for part in run.parts.values() if part.states), {})
        rows, pictures = [], []
        # By layer, h before c.
        for name, values in sorted(states.items(), key=lambda s: (s[0][:-1], s[0].endswith("c"))):
            title, sizes = _state_title(name), np.abs(values)
            pictures.append(charts.heat_map(title, values, float(sizes.max())))
            figures = (values.min(), values.max(), sizes.mean(), np.linalg.norm(values))
            rows.append([title, str(len(values)), *(f"{figure:.4f}" for figure in figures)])
        if rows:
            head = ["State", "Units", "Lowest", "Highest", "Mean size", "Norm"]
            blocks += [
                tag("h3", run.name) if len(runs) > 1 else None,
                tag("div", pictures, class_="row four"),
                _scale("below zero", "above zero"),
                charts.table(head, rows),
            ]
    if not blocks:
        return Markup("")
    text = (
        "States (h, c) that the LSTM can start from: trained as parameters during pretraining, or "
        "the final state averaged over the corpus. A cell is a unit, at the same place in each "
        "picture. Each picture has its own scale."
    )
    return join([tag("p", text), blocks])


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
    """Returns the final states of documents, on the plane in which they spread most."""
    blocks = []
    for title, _, found, _ in _predictions(runs):
        labels = found.tensors["state/label"]
        if len(labels) < 3:
            continue
        names, group = grouped_classes(found)
        labels = group[labels]
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
        head = ["State", "Documents", "Distance of the labels' means", "Spread in a label"]
        blocks += [
            tag("h3", title),
            tag("div", pictures, class_="row"),
            charts.mark_legend(names),
            charts.table(head, rows),
        ]
    if not blocks:
        return Markup("")
    text = (
        "The state of the classifier's LSTM after the last word of some hundred documents, by "
        "label. The further apart the labels are, the easier the task of the layers above."
    )
    return join([tag("p", text), blocks])


def _separation(states: np.ndarray, labels: np.ndarray) -> list[str]:
    """Returns the documents, the mean distance of the labels' means, and the spread around them."""
    present = np.unique(labels)
    means = np.stack([states[labels == label].mean(axis=0) for label in present])
    spread = np.sqrt(np.square(states - means[np.searchsorted(present, labels)]).sum(axis=1).mean())
    gaps = [float(np.linalg.norm(means[i] - means[j])) for i in range(len(means)) for j in range(i)]
    return [f"{len(labels):,}", f"{np.mean(gaps):.2f}" if gaps else "-", f"{spread:.2f}"]


def _predictions(runs: Sequence[RunFolder]) -> Iterator[tuple[str, str, Predictions, str]]:
    """Yields a title, the part's name, its predictions and the line style, per classifier."""
    for title, name, part, look in _parts(runs, CLASSIFIERS):
        if part.predictions is not None:
            yield title, name, part.predictions, look


def class_names(found: Predictions) -> list[str]:
    """Returns the names of the classes, or numbers if the classifier has none."""
    classes, names = found.info["classes"], found.info.get("class_names")
    if isinstance(names, list) and len(names) == classes:
        names = [str(name) for name in names]
        return [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in names]
    return [f"label {i}" for i in range(classes)]


def grouped_classes(found: Predictions) -> tuple[list[str], np.ndarray]:
    """Returns the names of groups and each class's group, int64 [classes].

    A group is a class. With many classes, it is one with the most documents, or the others.
    """
    names = class_names(found)
    if len(names) <= LARGEST_CLASSES + 1:
        return names, np.arange(len(names))
    documents = np.bincount(found.label, minlength=len(names))
    largest = np.sort(np.argsort(-documents, kind="stable")[:LARGEST_CLASSES])
    group = np.full(len(names), LARGEST_CLASSES)
    group[largest] = np.arange(LARGEST_CLASSES)
    return [*(names[i] for i in largest), f"{len(names) - LARGEST_CLASSES:,} others"], group


def mistakes(runs: Sequence[RunFolder]) -> Markup:
    """Returns confusion matrices, each class's figures, and how many mistakes are shared."""
    tables = []
    for title, _, found, _ in _predictions(runs):
        if found.has_sets:
            tables.append(_set_table(title, found))
            continue
        names, group = grouped_classes(found)
        counts = confusion(group[found.label], group[found.predicted], len(names))
        if len(names) < len(group):
            title += (
                f". The {LARGEST_CLASSES} largest of {len(group):,} labels; a label and a "
                "prediction that are both among the others may differ"
            )
        tables.append(_confusion_table(title, counts, names))
        tables.append(_class_table(title, counts, names))
    if not tables:
        return Markup("")
    words = []
    for run in runs:
        both = [run.parts[n].predictions if n in run.parts else None for n in ("scratch", "warm")]
        if (wrong := aligned(*both)) is not None:
            scratch, warm = wrong
            text = (
                f"Both classifiers are wrong on {int((scratch & warm).sum()):,} documents, only "
                f"the one from scratch on {int((scratch & ~warm).sum()):,}, only the warm-started "
                f"one on {int((warm & ~scratch).sum()):,}."
            )
            words.append(tag("p", f"{run.name}: " if len(runs) > 1 else "", text))
    return join([words, tag("div", tables, class_="row")])


def _class_table(title: str, counts: np.ndarray, names: Sequence[str]) -> Markup:
    figures = by_class(counts)
    rows = [
        [name, *(f"{100 * x:.1f} %" for x in each), f"{documents:,}"]
        for name, each, documents in zip(names, figures, counts.sum(axis=1), strict=True)
    ]
    head = ["class", "precision", "recall", "F1", "documents"]
    return charts.plain_table(head, rows, f"By class: {title}")


def _set_table(title: str, found: Predictions) -> Markup:
    """Returns each label's figures, and those of all labels, of documents with sets of labels."""
    rows = []
    for name, row in zip(class_names(found), found.by_class(), strict=True):
        figures = [f"{100 * row[each]:.1f} %" for each in ("precision", "recall", "f1")]
        area = "-" if np.isnan(row["roc_auc"]) else f"{row['roc_auc']:.3f}"
        rows.append([name, *figures, area, f"{row['threshold']:.2f}", f"{row['documents']:,.0f}"])
    metrics, documents = found.means_over_classes(), f"{len(found.label):,}"
    rows.sort(key=lambda row: -int(row[-1].replace(",", "")))
    if len(rows) > LARGEST_CLASSES:
        title += f". The {LARGEST_CLASSES} largest of {len(rows):,} labels"
    for name, which in (("all labels, micro", "f1_micro"), ("all labels, macro", "f1_macro")):
        area = f"{metrics['roc_auc']:.3f}" if which == "f1_macro" and "roc_auc" in metrics else "-"
        figures = ["-", "-", f"{100 * metrics[which]:.1f} %", area, "-", documents]
        rows.insert(0, [name, *figures])
    head = ["label", "precision", "recall", "F1", "ROC AUC", "threshold", "documents"]
    caption = f"By label: {title}. A document is wrong unless each of its labels is right."
    return charts.plain_table(head, rows[: LARGEST_CLASSES + 2], caption)


def _confusion_table(title: str, counts: np.ndarray, names: Sequence[str]) -> Markup:
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j in range(len(names)):
            share = counts[i, j] / total[i, 0]
            level = charts.level_class((1 if i == j else -1) * int(np.ceil(share * LEVELS)))
            figures = (tag("strong", f"{counts[i, j]:,}"), tag("span", f"{100 * share:.1f} %"))
            cells.append(tag("td", *figures, class_=f"cell {level}"))
        rows.append(tag("tr", tag("th", name, scope="row"), cells))
    columns = [tag("th", f"predicted as {n}", scope="col") for n in names]
    return charts.wide(
        f"Confusion matrix: {title}",
        tag("caption", title),
        tag("thead", tag("tr", tag("td", "label"), columns)),
        tag("tbody", rows),
        more_classes="confusion",
    )


def calibrations(runs: Sequence[RunFolder]) -> Markup:
    """Returns how often classifiers are right, by their confidence."""
    found = []
    for title, name, each, look in _predictions(runs):
        if not each.has_sets:
            confidence = each.probability_of(each.predicted)
            measured = calibration(confidence, ~each.is_wrong, each.info["classes"])
            found.append((title, measured, name, look))
    if not found or len({len(each.edges) for _, each, *_ in found}) > 1:
        return Markup("")
    tiles = [
        charts.tile(title, f"{each.error:.3f}", ["expected calibration error"], name)
        for title, each, name, _ in found
    ]
    chart = charts.reliability_chart("Accuracy by confidence", found)
    return join([tag("dl", tiles, class_="tiles"), chart])


def documents(runs: Sequence[RunFolder]) -> Markup:
    """Returns the most wrong and the surest documents, each word shaded by its contribution."""
    blocks = []
    for title, _, found, _ in _predictions(runs):
        names = class_names(found)
        cards = [_document(each, names, i == 0) for i, each in enumerate(found.info["examples"])]
        blocks += [tag("h3", title), cards]
    if not blocks:
        return Markup("")
    text = (
        "First the documents that were misclassified with the highest confidence, then the surest "
        "correct ones of each label. A word's shade is its contribution to the predicted class: "
        "the gradient of the class's logit times the word's embedding, which holds for small "
        "changes only. Words for the class are underlined, words against it have a dotted line. "
        "The text is as the classifier reads it: lower case, rare words unknown. Of long "
        f"documents, the last {EXAMPLE_TOKENS:,} tokens are shown."
    )
    return join([tag("p", text), _scale("against", "for the predicted class"), blocks])


def _document(example: dict[str, Any], names: Sequence[str], is_open: bool) -> Markup:
    pieces = example["pieces"][-EXAMPLE_TOKENS:]
    added = np.array(example["contributions"][-EXAMPLE_TOKENS:], np.float64)
    largest = float(np.abs(added).max(initial=0.0)) or 1.0
    levels = np.rint(added / largest * LEVELS).astype(int).tolist()
    label, predicted = (_named(example[each], names) for each in ("label", "predicted"))
    sure = example["probability"]
    certainty = " at more than 99.9 %" if sure > 0.999 else f" at {100 * sure:.1f} %"
    if "explained" in example:
        certainty = f"; shaded for {names[example['explained']]}," + certainty
    is_right = example["label"] == example["predicted"]
    words: list[Any] = []
    for piece, level in zip(pieces, levels, strict=True):
        word = piece.lstrip(" ")
        shaded = tag("span", word, class_=charts.level_class(level)) if abs(level) > 1 else word
        words += [piece[: len(piece) - len(word)], shaded]
    strongest = np.argsort(-np.abs(added), kind="stable")[:6].tolist()
    listed = ", ".join(f"{pieces[i].strip()} {added[i]:+.2f}" for i in strongest)
    summary = tag(
        "summary",
        tag("span", "right" if is_right else "wrong", class_=f"badge {is_right}".lower()),
        f" {label}" if is_right else f" {label}, predicted as {predicted}",
        tag("span", certainty, class_="range"),
    )
    return tag(
        "details",
        summary,
        tag("p", words, class_="review", dir="auto"),
        tag("p", f"Strongest: {listed}", class_="range"),
        class_="document",
        open=is_open,
    )


def _named(classes: int | list[int], names: Sequence[str]) -> str:
    """Returns the name of a class, or those of a set."""
    if isinstance(classes, int):
        return names[classes]
    return ", ".join(names[c] for c in classes) or "no label"


def settings(runs: Sequence[RunFolder]) -> Markup:
    """Returns every flag of the runs; those that differ from their defaults first."""
    defaults = dataclasses.asdict(Config())
    names = list(dict.fromkeys([*defaults, *(name for run in runs for name in run.config)]))
    if not any(run.config for run in runs):
        return Markup("")
    changed: list[list[str]] = []
    unchanged: list[list[str]] = []
    for name in names:
        values = [str(run.config.get(name, "-")) for run in runs]
        default = str(defaults.get(name, "-"))
        (changed if set(values) != {default} else unchanged).append([f"--{name}", *values, default])
    head = ["Flag", *_columns(runs), "Default"]
    folded = tag(
        "details",
        tag("summary", f"{len(unchanged)} flags at their defaults"),
        charts.plain_table(head, unchanged, "Flags at their defaults"),
    )
    return join([charts.plain_table(head, changed, "Flags set for this report's runs"), folded])


def _columns(runs: Sequence[RunFolder]) -> list[str]:
    return [run.name for run in runs] if len(runs) > 1 else ["Value"]


def environments(runs: Sequence[RunFolder]) -> Markup:
    """Returns the machines and programs of the runs."""
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
    rows.append(["time since the last start", *times])
    return charts.plain_table(["", *_columns(runs)], rows, "Machine and programs")


def missing(runs: Sequence[RunFolder]) -> Markup:
    """Returns the data that is missing, and how to get it."""
    lines = []
    for run in runs:
        parts = run.parts.values()
        lines += run.faults
        lines += [
            f"{run.name}: {line}"
            for is_there, line in (
                (run.report, "report.json: the run writes it when it ends."),
                (run.environment, "environment.json: older versions do not write it."),
                (any(p.metrics for p in parts), "metrics.jsonl: no training in this folder."),
                (
                    any(p.predictions for p in parts),
                    "predictions: --stage=all and --stage=evaluate write them at their end; they "
                    "are needed for mistakes, calibration, final states and documents.",
                ),
                (
                    any(p.states for p in parts),
                    "encoder bundle: --stage=all and --stage=pretrain write it.",
                ),
            )
            if not is_there
        ]
    return tag("ul", [tag("li", line) for line in lines]) if lines else Markup("")
