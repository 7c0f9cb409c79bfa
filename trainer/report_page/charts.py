"""The report's charts: SVG made without a library, coloured by the classes of page.css.

Each chart has a description in words and its numbers in a table, for readers who do not see it.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.report_page.markup import Markup, tag
from trainer.report_page.statistics import Calibration, Interval

WIDTH, HEIGHT = 720, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 40
MAX_POINTS = 400
TABLE_ROWS = 12
LEVELS = 6  # of a colour on each side of zero
DASHES = {"": None, "dashed": "7 5", "dotted": "2 4"}


class Series(NamedTuple):
    """One line of a chart."""

    name: str  # shown in the legend
    x: Sequence[float]  # [n], in rising order
    y: Sequence[float]  # [n]
    colour: str  # a class of page.css: "scratch", "warm", "pretrain" or "validation"
    line: str = ""  # one of DASHES
    dots: bool = False  # whether each point is marked; for few points


class Scale(NamedTuple):
    """Maps numbers from `low` to `high` to pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Returns about `wanted` round numbers between `low` and `high`."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """Returns a number with 4 digits, in thousands (k) from 10,000."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def thinned(series: Series) -> Series:
    """Returns at most MAX_POINTS points, each a mean of neighbours."""
    count = len(series.x)
    if count <= MAX_POINTS:
        return series
    edges = np.linspace(0, count, MAX_POINTS + 1).astype(int)
    mean = [
        np.add.reduceat(np.asarray(values, np.float64), edges[:-1]) / np.diff(edges)
        for values in (series.x, series.y)
    ]
    return series._replace(x=mean[0].tolist(), y=mean[1].tolist())


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    note: str = "",
    from_zero: bool = False,
) -> Markup:
    """Returns a figure of lines, with a legend that hides lines and a table of their numbers."""
    series = [thinned(each) for each in series if len(each.x)]
    x = Scale(*_bounds([v for s in series for v in s.x], tight=True), LEFT, WIDTH - RIGHT)
    low, high = _bounds([v for s in series for v in s.y])
    y = Scale(0 if from_zero else low, high, HEIGHT - BOTTOM, TOP)
    described = "; ".join(
        f"{s.name}: from {number(s.y[0])} to {number(s.y[-1])}, lowest "
        f"{number(min(s.y))}, highest {number(max(s.y))}"
        for s in series
    )
    lines = [
        {"name": s.name, "x": [round(v, 3) for v in s.x], "y": [float(f"{v:.5g}") for v in s.y]}
        for s in series
    ]
    data = {"xLabel": x_label, "yLabel": y_label, "x": [*x], "series": lines}
    picture = _svg(
        _axes(x, y, x_label, y_label),
        [_line(each, index, x, y) for index, each in enumerate(series)],
        tag("line", class_="cursor", y1=TOP, y2=HEIGHT - BOTTOM, visibility="hidden"),
    )
    plot = tag(
        "div",
        picture,
        _tip(),
        class_="plot",
        tabindex="0",
        role="group",
        aria_roledescription="chart",
        aria_label=f"{title}. {y_label} by {x_label}. {described}. "
        "Left and right arrow keys read single values.",
        data_chart=json.dumps(data, separators=(",", ":")),
    )
    rows = [
        [s.name, number(s.x[i]), number(s.y[i])]
        for s in series
        for i in sorted(set(np.linspace(0, len(s.x) - 1, TABLE_ROWS).astype(int).tolist()))
    ]
    return _figure(title, plot, note, legend(series), table(["Line", x_label, y_label], rows))


def _tip() -> Markup:
    return tag("div", class_="tip", aria_hidden="true", hidden=True)


def legend(series: Sequence[Series]) -> Markup:
    """Returns a button for each line, which shows and hides it."""
    buttons = [
        tag("button", swatch(each), each.name, type="button", aria_pressed="true", data_line=i)
        for i, each in enumerate(series)
    ]
    return tag("div", buttons, class_="legend", role="group", aria_label="Lines shown")


def swatch(series: Series) -> Markup:
    """Returns a short sample of the line."""
    return tag(
        "svg",
        tag("line", class_=f"line {series.colour}", x1=1, x2=27, y1=5, y2=5,
            stroke_dasharray=DASHES[series.line]),
        tag("circle", class_=f"dot {series.colour}", cx=14, cy=5, r=3.5) if series.dots else None,
        width=28, height=10, aria_hidden="true",
    )  # fmt: skip


def _line(series: Series, index: int, x: Scale, y: Scale) -> Markup:
    points = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
    path = "M" + "L".join(f"{a:g} {b:g}" for a, b in points)
    dots = [tag("circle", class_="dot", cx=f"{a:g}", cy=f"{b:g}", r=3.5) for a, b in points]
    return tag(
        "g",
        tag("path", class_="line", d=path, stroke_dasharray=DASHES[series.line]),
        dots if series.dots or len(points) == 1 else None,
        class_=series.colour,
        data_line=index,
    )


def interval_chart(title: str, rows: Sequence[tuple[str, Interval, str]], x_label: str) -> Markup:
    """Returns estimates with their intervals, a row for each (name, interval, colour)."""
    left, right, row_height, top = 160, WIDTH - 70, 46, 8
    height = top + row_height * len(rows) + BOTTOM
    x = Scale(*_bounds([end for _, each, _ in rows for end in each[1:]]), left, right)
    parts = _vertical_grid(x, top, height - BOTTOM)
    for i, (name, each, colour) in enumerate(rows):
        y = top + row_height * (i + 0.5)
        ends = [
            tag("line", class_="line", x1=x(end), x2=x(end), y1=y - 8, y2=y + 8) for end in each[1:]
        ]
        parts.append(
            tag(
                "g",
                tag("text", name, class_="name", x=left - 16, y=y + 5, text_anchor="end"),
                tag("line", class_="line thick", x1=x(each.low), x2=x(each.high), y1=y, y2=y),
                ends,
                tag("circle", class_="dot", cx=x(each.value), cy=y, r=7),
                tag("text", f"{each.value:.1f}", class_="value", x=x(each.high) + 12, y=y + 5),
                class_=colour,
            )
        )
    parts.append(_label(x_label, (left + right) / 2, height - 4))
    described = "; ".join(f"{n}: {e.value:.1f}, {e.low:.1f} to {e.high:.1f}" for n, e, _ in rows)
    label = f"{title}. {x_label}. {described}"
    return _figure(title, _svg(parts, height=height, role="img", aria_label=label))


def heat_map(title: str, values: np.ndarray, largest: float) -> Markup:
    """Returns a cell for each unit, row by row, in one colour above zero and another below.

    Args:
        values: [units].
        largest: The value of the strongest colour.
    """
    columns = 16 if len(values) <= 256 else 32
    rows, cell = -(-len(values) // columns), 320 / columns
    levels = np.clip(np.rint(values / largest * LEVELS), -LEVELS, LEVELS) if largest else values * 0
    paths = []
    for level in range(-LEVELS, LEVELS + 1):
        places = np.flatnonzero(levels == level).tolist()
        path = "".join(
            f"M{i % columns * cell:g} {i // columns * cell:g}h{cell:g}v{cell:g}h-{cell:g}z"
            for i in places
        )
        if path:
            paths.append(tag("path", class_=f"cell {level_class(level)}", d=path))
    mean_size = float(np.abs(values).mean())
    described = (
        f"{title} of {len(values)} units: from {values.min():.3f} to {values.max():.3f}, "
        f"mean size {mean_size:.3f}"
    )
    viewed = {"viewBox": f"0 0 320 {rows * cell:g}", "role": "img", "aria_label": described}
    plot = tag(
        "div",
        tag("svg", paths, **viewed),
        _tip(),
        class_="plot heat",
        data_cells=json.dumps([round(v, 4) for v in values.tolist()], separators=(",", ":")),
        data_columns=columns,
    )
    caption = tag("figcaption", tag("strong", title), f" mean |value| {mean_size:.3f}")
    return tag("figure", caption, plot, class_="small")


def level_class(level: int) -> str:
    """Returns the class in page.css of a level from -LEVELS to LEVELS."""
    return f"level-{'minus' if level < 0 else 'plus'}-{abs(level)}"


def scatter(
    title: str, points: np.ndarray, labels: np.ndarray, names: Sequence[str], axes: Sequence[str]
) -> Markup:
    """Returns points [n, 2], with a shape and a colour for each label."""
    size, margin = 340, 30
    x = Scale(*_bounds(points[:, 0].tolist()), margin, size - 8)
    y = Scale(*_bounds(points[:, 1].tolist()), size - margin, 8)
    side = size - margin - 8
    parts = [tag("rect", class_="frame", x=margin, y=8, width=side, height=side)]
    for label in range(len(names)):
        own = points[labels == label].tolist()
        path = "".join(_mark(label, x(a), y(b)) for a, b in own)
        parts.append(tag("path", class_=f"point class-{label % 6}", d=path))
    parts.append(_label(axes[0], (margin + size) / 2, size - 8))
    turned = f"translate(18 {size / 2 - 10:g}) rotate(-90)"
    parts.append(tag("text", axes[1], class_="label", text_anchor="middle", transform=turned))
    described = (
        f"{title}: {len(points)} documents on two axes; {', '.join(names)}. The table below says "
        "how far the labels are apart."
    )
    viewed = {"viewBox": f"0 0 {size} {size}", "role": "img", "aria_label": described}
    caption = tag("figcaption", tag("strong", title))
    return tag("figure", caption, tag("svg", parts, **viewed), class_="small")


def mark_legend(names: Sequence[str]) -> Markup:
    """Returns the shape and the colour of each label."""
    items = []
    for i, name in enumerate(names):
        mark = tag("path", class_=f"point class-{i % 6}", d=_mark(i, 8, 8))
        items.append(tag("li", tag("svg", mark, width=16, height=16, aria_hidden="true"), name))
    return tag("ul", items, class_="marks")


def _mark(label: int, x: float, y: float) -> str:
    """Returns the path of a circle, triangle, square or diamond around (x, y), in turn by label."""
    r = 4
    return (
        f"M{x - r:g} {y:g}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x:g} {y - r - 0.5:g}l{r + 0.5} {2 * r}h{-2 * r - 1}z",
        f"M{x - r + 0.5:g} {y - r + 0.5:g}h{2 * r - 1}v{2 * r - 1}h{1 - 2 * r}z",
        f"M{x:g} {y - r - 1:g}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
    )[label % 4]


def reliability_chart(title: str, found: Sequence[tuple[str, Calibration, str, str]]) -> Markup:
    """Returns accuracy by confidence for each (name, calibration, colour, line)."""
    low = float(found[0][1].edges[0])
    x = Scale(low, 1, LEFT, WIDTH - RIGHT)
    y = Scale(0, 1, HEIGHT - BOTTOM, TOP)
    rows: list[list[str]] = []
    series: list[Series] = []
    for name, each, colour, line in found:
        filled = np.flatnonzero(each.documents).tolist()
        confidence, accuracy = each.confidence[filled].tolist(), each.accuracy[filled].tolist()
        series.append(Series(name, confidence, accuracy, colour, line, dots=True))
        rows += [
            [
                name,
                f"{each.edges[i]:.2f} to {each.edges[i + 1]:.2f}",
                f"{each.documents[i]:,}",
                f"{100 * each.confidence[i]:.1f} %",
                f"{100 * each.accuracy[i]:.1f} %",
            ]
            for i in filled
        ]
    described = "; ".join(f"{name}: expected error {each.error:.3f}" for name, each, *_ in found)
    picture = _svg(
        _axes(x, y, "confidence", "accuracy"),
        tag("line", class_="ideal", x1=x(low), y1=y(low), x2=x(1), y2=y(1)),
        [_line(each, i, x, y) for i, each in enumerate(series)],
        role="img",
        aria_label=f"{title}. {described}",
    )
    return _figure(
        title,
        picture,
        "The dotted line is perfect calibration: accuracy equals confidence.",
        tag("ul", [tag("li", swatch(s), s.name) for s in series], class_="marks"),
        table(["Classifier", "Confidence", "Documents", "Mean confidence", "Accuracy"], rows),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Returns a table behind a button that unfolds it."""
    return tag("details", tag("summary", "The numbers"), plain_table(head, rows), class_="numbers")


def plain_table(
    head: Sequence[str], rows: Sequence[Sequence[str | Markup]], caption: str = ""
) -> Markup:
    """Returns a table in which the first cell of a row names it."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]])
        for row in rows
    ]
    return wide(
        caption or "Table",
        tag("caption", caption) if caption else None,
        tag("thead", tag("tr", [tag("th", name, scope="col") for name in head])),
        tag("tbody", body),
    )


def wide(label: str, *parts: object, more_classes: str = "") -> Markup:
    """Returns a table that scrolls sideways where it is too wide."""
    classes = f"wide {more_classes}".strip()
    table = tag("table", *parts)
    return tag("div", table, class_=classes, tabindex="0", role="region", aria_label=label)


def tile(name: str, figure: object, notes: Sequence[str], colour: str) -> Markup:
    """Returns a figure in large type, with its name above and notes below."""
    below = [tag("span", note, class_="range") for note in notes]
    return tag(
        "div",
        tag("dt", name),
        tag("dd", tag("span", figure, class_="large"), below),
        class_=f"tile {colour}".strip(),
    )


def _figure(title: str, picture: Markup, note: str = "", *below: Markup) -> Markup:
    caption = tag("figcaption", tag("h3", title), tag("p", note) if note else None)
    return tag("figure", caption, picture, below)


def _svg(*children: object, height: float = HEIGHT, **attributes: str) -> Markup:
    if "role" not in attributes:
        attributes["aria_hidden"] = "true"
    return tag("svg", children, viewBox=f"0 0 {WIDTH} {height:g}", **attributes)


def _bounds(values: Sequence[float], tight: bool = False) -> tuple[float, float]:
    """Returns the ends of an axis that shows the values; they always differ."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = (high - low) * (0 if tight else 0.06)
    if high - low <= 1e-9 * max(abs(high), 1e-30):
        room = abs(high) / 2 or 1.0
    return low - room, high + room


def _label(text: str, x: float, y: float) -> Markup:
    return tag("text", text, class_="label", x=x, y=y, text_anchor="middle")


def _x_tick(x: Scale, value: float, y: float) -> Markup:
    return tag("text", number(value), class_="tick", x=x(value), y=y, text_anchor="middle")


def _vertical_grid(x: Scale, top: float, bottom: float) -> list[Markup]:
    parts = []
    for value in ticks(x.low, x.high):
        parts.append(tag("line", class_="grid", x1=x(value), x2=x(value), y1=top, y2=bottom))
        parts.append(_x_tick(x, value, bottom + 17))
    return parts


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> list[Markup]:
    parts = []
    for value in ticks(y.low, y.high):
        at, left = y(value), LEFT - 8
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
        parts.append(tag("text", number(value), class_="tick", x=left, y=at + 4, text_anchor="end"))
    parts += [_x_tick(x, value, HEIGHT - BOTTOM + 17) for value in ticks(x.low, x.high, 7)]
    turned = f"translate(13 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)"
    return [
        *parts,
        _label(x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5),
        tag("text", y_label, class_="label", transform=turned, text_anchor="middle"),
    ]
