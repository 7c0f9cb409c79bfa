"""The report's pictures: SVG without a library, in colours that page.css gives to classes.

Each has a description in words and its numbers in a table, so nobody needs to see it.
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
    """One line of a chart.

    Attributes:
      name: in the legend.
      x, y: numbers [n], x in rising order.
      colour: a class of page.css: "scratch", "warm", "pretrain", "run-1" and so on.
      line: one of DASHES.
      dots: whether each point is marked: for few.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    line: str = ""
    dots: bool = False


class Scale(NamedTuple):
    """Numbers from `low` to `high` -> pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return round(
            self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 1
        )


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Returns round numbers from about `low` to about `high`, inside of both."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def number(value: float) -> str:
    """Returns a number as an axis shows it: 4 figures, and k for thousands from 10,000 on."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def thinned(series: Series) -> Series:
    """Returns at most MAX_POINTS points, each the mean of its neighbours."""
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
    """Returns a figure of lines, with a legend that hides them and a table of their numbers."""
    series = [thinned(each) for each in series if len(each.x)]
    all_x = [x for each in series for x in each.x]
    all_y = [y for each in series for y in each.y]
    x = Scale(*_bounds(all_x, tight=True), LEFT, WIDTH - RIGHT)
    low, high = _bounds(all_y)
    y = Scale(0 if from_zero else low, high, HEIGHT - BOTTOM, TOP)
    lines = [_line(each, index, x, y) for index, each in enumerate(series)]
    described = "; ".join(
        f"{each.name}: from {number(each.y[0])} to {number(each.y[-1])}, lowest "
        f"{number(min(each.y))}, highest {number(max(each.y))}"
        for each in series
    )
    data = {
        "xLabel": x_label,
        "yLabel": y_label,
        "x": [x.low, x.high, x.start, x.stop],
        "series": [
            {
                "name": each.name,
                "x": [round(v, 3) for v in each.x],
                "y": [float(f"{v:.5g}") for v in each.y],
            }
            for each in series
        ],
    }
    picture = _svg(
        _axes(x, y, x_label, y_label),
        lines,
        tag("line", class_="cursor", y1=TOP, y2=HEIGHT - BOTTOM, visibility="hidden"),
    )
    rows = [
        [each.name, number(each.x[i]), number(each.y[i])]
        for each in series
        for i in sorted(set(np.linspace(0, len(each.x) - 1, TABLE_ROWS).astype(int).tolist()))
    ]
    return _figure(
        title,
        tag(
            "div",
            picture,
            tag("div", class_="tip", aria_hidden="true", hidden=True),
            class_="plot",
            tabindex="0",
            role="group",
            aria_roledescription="chart",
            aria_label=f"{title}. {y_label} by {x_label}. {described}. "
            "Left and right arrow keys read single values.",
            data_chart=json.dumps(data, separators=(",", ":")),
        ),
        note,
        legend(series),
        table(["Line", x_label, y_label], rows),
    )


def legend(series: Sequence[Series]) -> Markup:
    """Returns one button a line, which shows and hides it."""
    return tag(
        "div",
        [
            tag("button", swatch(each), each.name, type="button", aria_pressed="true", data_line=i)
            for i, each in enumerate(series)
        ],
        class_="legend",
        role="group",
        aria_label="Lines shown",
    )


def swatch(series: Series) -> Markup:
    """Returns a short piece of the line."""
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
    """Returns estimates with their intervals, one a row: (name, interval, colour)."""
    left, row_height, top = 160, 46, 8
    height = top + row_height * len(rows) + BOTTOM
    low, high = _bounds([end for _, each, _ in rows for end in each[1:]])
    x = Scale(low, high, left, WIDTH - 70)
    parts = _vertical_grid(x, top, height - BOTTOM)
    for i, (name, each, colour) in enumerate(rows):
        middle = top + row_height * (i + 0.5)
        parts.append(
            tag(
                "g",
                tag("text", name, class_="name", x=left - 16, y=middle + 5, text_anchor="end"),
                tag("line", class_="line thick", x1=x(each.low), x2=x(each.high), y1=middle,
                    y2=middle),
                [tag("line", class_="line", x1=x(end), x2=x(end), y1=middle - 8, y2=middle + 8)
                 for end in each[1:]],
                tag("circle", class_="dot", cx=x(each.value), cy=middle, r=7),
                tag("text", f"{each.value:.1f}", class_="value", x=x(each.high) + 12, y=middle + 5),
                class_=colour,
            )
        )  # fmt: skip
    label = tag("text", x_label, class_="label", x=(left + WIDTH - 70) / 2, y=height - 4,
                text_anchor="middle")  # fmt: skip
    said = "; ".join(f"{n}: {e.value:.1f}, {e.low:.1f} to {e.high:.1f}" for n, e, _ in rows)
    return _figure(
        title,
        _svg(parts, label, height=height, role="img", aria_label=f"{title}. {x_label}. {said}"),
    )


def heat_map(title: str, values: np.ndarray, largest: float) -> Markup:
    """Returns one cell a unit, row by row; what is above zero and below has two colours.

    Args:
      values: [units].
      largest: the value of the strongest colour.
    """
    columns = 16 if len(values) <= 256 else 32
    rows, cell = -(-len(values) // columns), 320 / columns
    levels = np.clip(np.rint(values / largest * LEVELS), -LEVELS, LEVELS) if largest else values * 0
    paths = []
    for level in range(-LEVELS, LEVELS + 1):
        places = np.flatnonzero(levels == level)
        if len(places):
            path = "".join(
                f"M{i % columns * cell:g} {i // columns * cell:g}h{cell:g}v{cell:g}h-{cell:g}z"
                for i in places.tolist()
            )
            paths.append(tag("path", class_=f"cell {level_class(level)}", d=path))
    height = rows * cell
    middle = float(np.abs(values).mean())
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), f" mean |value| {middle:.3f}"),
        tag(
            "div",
            tag(
                "svg",
                paths,
                viewBox=f"0 0 320 {height:g}",
                role="img",
                aria_label=f"{title} of {len(values)} units: from {values.min():.3f} to "
                f"{values.max():.3f}, mean size {middle:.3f}",
            ),
            tag("div", class_="tip", aria_hidden="true", hidden=True),
            class_="plot heat",
            data_cells=json.dumps([round(v, 4) for v in values.tolist()], separators=(",", ":")),
            data_columns=columns,
        ),
        class_="small",
    )


def level_class(level: int) -> str:
    """Returns the class of page.css of a level, from -LEVELS to LEVELS."""
    return f"level-{'minus' if level < 0 else 'plus'}-{abs(level)}"


def scatter(
    title: str, points: np.ndarray, labels: np.ndarray, names: Sequence[str], axes: Sequence[str]
) -> Markup:
    """Returns points [n, 2], a shape and a colour for each label."""
    size, margin = 340, 30
    x = Scale(*_bounds(points[:, 0].tolist()), margin, size - 8)
    y = Scale(*_bounds(points[:, 1].tolist()), size - margin, 8)
    groups = []
    for label in range(len(names)):
        own = points[labels == label]
        path = "".join(_mark(label, x(a), y(b)) for a, b in own.tolist())
        groups.append(tag("path", class_=f"point class-{label % 6}", d=path))
    frame = tag("rect", class_="frame", x=margin, y=8, width=size - margin - 8,
                height=size - margin - 8)  # fmt: skip
    words = [
        tag("text", axes[0], class_="label", x=(margin + size) / 2, y=size - 8,
            text_anchor="middle"),
        tag("text", axes[1], class_="label", text_anchor="middle",
            transform=f"translate(18 {size / 2 - 10:g}) rotate(-90)"),
    ]  # fmt: skip
    return tag(
        "figure",
        tag("figcaption", tag("strong", title)),
        tag(
            "svg",
            frame,
            groups,
            words,
            viewBox=f"0 0 {size} {size}",
            role="img",
            aria_label=f"{title}: {len(points)} documents on two axes; "
            f"{', '.join(names)}. The table below says how far the labels are apart.",
        ),
        class_="small",
    )


def mark_legend(names: Sequence[str]) -> Markup:
    """Returns the shape and the colour of each label."""
    return tag(
        "ul",
        [
            tag("li", tag("svg", tag("path", class_=f"point class-{i % 6}", d=_mark(i, 8, 8)),
                          width=16, height=16, aria_hidden="true"), name)
            for i, name in enumerate(names)
        ],
        class_="marks",
    )  # fmt: skip


def _mark(label: int, x: float, y: float) -> str:
    """Returns a path around (x, y): circle, triangle, square, diamond, and again from there."""
    r = 4
    return (
        f"M{x - r:g} {y:g}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x:g} {y - r - 0.5:g}l{r + 0.5} {2 * r}h{-2 * r - 1}z",
        f"M{x - r + 0.5:g} {y - r + 0.5:g}h{2 * r - 1}v{2 * r - 1}h{1 - 2 * r}z",
        f"M{x:g} {y - r - 1:g}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
    )[label % 4]


def reliability_chart(title: str, found: Sequence[tuple[str, Calibration, str, str]]) -> Markup:
    """Returns how often classifiers are right, by how sure they are: (name, ..., colour, line)."""
    low = float(found[0][1].edges[0])
    x = Scale(low, 1, LEFT, WIDTH - RIGHT)
    y = Scale(0, 1, HEIGHT - BOTTOM, TOP)
    ideal = tag("line", class_="ideal", x1=x(low), y1=y(low), x2=x(1), y2=y(1))
    lines: list[Markup] = []
    rows: list[list[str]] = []
    series: list[Series] = []
    for name, each, colour, line in found:
        filled = each.documents > 0
        sure, right = each.confidence[filled].tolist(), each.accuracy[filled].tolist()
        own = Series(name, sure, right, colour, line, dots=True)
        series.append(own)
        lines.append(_line(own, len(lines), x, y))
        rows += [
            [name, f"{a:.2f} to {b:.2f}", f"{n:,}", f"{100 * c:.1f} %", f"{100 * r:.1f} %"]
            for a, b, n, c, r in zip(
                each.edges,
                each.edges[1:],
                each.documents,
                each.confidence,
                each.accuracy,
                strict=False,
            )
            if n
        ]
    said = "; ".join(f"{name}: expected error {each.error:.3f}" for name, each, *_ in found)
    return _figure(
        title,
        _svg(
            _axes(x, y, "how sure the classifier is", "share that is right"),
            ideal,
            lines,
            role="img",
            aria_label=f"{title}. {said}",
        ),
        "The dotted line is a classifier that is right as often as it says.",
        tag("ul", [tag("li", swatch(s), s.name) for s in series], class_="marks"),
        table(["Classifier", "Sure", "Documents", "Mean sureness", "Right"], rows),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Returns a table that can be unfolded."""
    return tag("details", tag("summary", "The numbers"), plain_table(head, rows), class_="numbers")


def plain_table(
    head: Sequence[str], rows: Sequence[Sequence[str | Markup]], caption: str = ""
) -> Markup:
    """Returns a table whose first cell of a row names it; the others are numbers, or text."""
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", tag("tr", [tag("th", name, scope="col") for name in head])),
            tag(
                "tbody",
                [
                    tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]])
                    for row in rows
                ],
            ),
        ),
        class_="wide",
        tabindex="0",
        role="region",
        aria_label=caption or "Table",
    )


def _figure(title: str, picture: Markup, note: str = "", *below: Markup) -> Markup:
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), tag("p", note) if note else None),
        picture,
        below,
    )


def _svg(*children: object, height: float = HEIGHT, **attributes: str) -> Markup:
    if "role" not in attributes:
        attributes["aria_hidden"] = "true"
    return tag("svg", children, viewBox=f"0 0 {WIDTH} {height:g}", **attributes)


def _bounds(values: Sequence[float], tight: bool = False) -> tuple[float, float]:
    """Returns the ends of an axis that shows the values, never the same number twice."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = (high - low) * (0 if tight else 0.06)
    if high - low <= 1e-9 * max(abs(high), 1e-30):
        room = abs(high) / 2 or 1.0
    return low - room, high + room


def _vertical_grid(x: Scale, top: float, bottom: float) -> list[Markup]:
    parts = []
    for value in ticks(x.low, x.high):
        parts.append(tag("line", class_="grid", x1=x(value), x2=x(value), y1=top, y2=bottom))
        parts.append(
            tag("text", number(value), class_="tick", x=x(value), y=bottom + 17,
                text_anchor="middle")
        )  # fmt: skip
    return parts


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> list[Markup]:
    parts = []
    for value in ticks(y.low, y.high):
        parts.append(
            tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value))
        )
        parts.append(
            tag("text", number(value), class_="tick", x=LEFT - 8, y=y(value) + 4, text_anchor="end")
        )
    for value in ticks(x.low, x.high, 7):
        parts.append(
            tag("text", number(value), class_="tick", x=x(value), y=HEIGHT - BOTTOM + 17,
                text_anchor="middle")
        )  # fmt: skip
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    turned = f"translate(13 {middle_y:g}) rotate(-90)"
    return [
        *parts,
        tag("text", x_label, class_="label", x=middle_x, y=HEIGHT - 5, text_anchor="middle"),
        tag("text", y_label, class_="label", transform=turned, text_anchor="middle"),
    ]
