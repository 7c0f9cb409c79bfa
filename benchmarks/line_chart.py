"""A line chart as SVG, in the colours of the reader's theme."""

from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 780, 340, 60, 280, 36, 44
COLOURS = ("#0b6e66", "#b35900", "#6639ba", "#0969da", "#bf3989", "#57606a", "#8a6d00")
DARK = ("#57cfc0", "#f0a35e", "#bc8cff", "#79b8ff", "#f778ba", "#8b949e", "#e3b341")
DASHES = ("none", "7 4", "2 3")

Points = Sequence[tuple[float, float]]


def svg(
    lines: Mapping[str, Points],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    labels: tuple[str, str],
    x_is_logarithmic: bool = False,
) -> str:
    """Returns the chart, with the lines' names beside it.

    Args:
        lines: By name: x and y of each point. A line of one point is a dot.
        x_ticks, y_ticks: Marks of the axes, from the lowest value to the highest.
        labels: Of the x and the y axis.
        x_is_logarithmic: Whether x is; y always is.
    """
    x = _axis(x_ticks, LEFT, WIDTH - RIGHT, x_is_logarithmic)
    y = _axis(y_ticks, HEIGHT - BOTTOM, TOP, True)
    parts = [f'<rect class="background" width="{WIDTH}" height="{HEIGHT}" rx="8"/>']
    for value in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(value)}H{WIDTH - RIGHT}"/>')
        parts.append(_text(f"{value:g}", LEFT - 8, y(value) + 4, "end"))
    parts += [_text(f"{value:,g}", x(value), HEIGHT - BOTTOM + 20, "middle") for value in x_ticks]
    for i, (name, points) in enumerate(lines.items()):
        places = [f"{x(a)} {y(b)}" for a, b in points]
        style = f'class="c{i % len(COLOURS)}" stroke-dasharray="{DASHES[i % len(DASHES)]}"'
        if len(places) > 1:
            parts.append(f'<path {style} d="M{"L".join(places)}"/>')
        parts += [f'<path class="dot c{i % len(COLOURS)}" d="M{place}h0"/>' for place in places]
        height = TOP + 6 + 22 * i
        parts.append(f'<path {style} d="M{WIDTH - RIGHT + 12} {height}h28"/>')
        parts.append(_text(name, WIDTH - RIGHT + 48, height + 4, "start"))
    parts.append(_text(labels[1], LEFT - 40, TOP - 16, "start"))
    parts.append(_text(labels[0], WIDTH - RIGHT, HEIGHT - 6, "end"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
    return "\n".join([head, f"<style>{_style()}</style>", *parts, "</svg>\n"])


def _axis(ticks: Sequence[float], start: float, stop: float, is_logarithmic: bool):
    ends = [ticks[0], ticks[-1]]

    def place(value: float) -> float:
        low, high, at = np.log([*ends, max(value, ends[0])]) if is_logarithmic else (*ends, value)
        return round(float(start + (at - low) / (high - low) * (stop - start)), 1)

    return place


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _style() -> str:
    def colours(of: Sequence[str]) -> str:
        return " ".join(f".c{i} {{ stroke: {colour} }}" for i, colour in enumerate(of))

    return (
        "text { font: 13px system-ui, sans-serif; fill: #1c2128 } "
        "path { fill: none; stroke-width: 2 } .dot { stroke-width: 5; stroke-linecap: round } "
        ".background { fill: #ffffff } .grid { stroke: #d0d7de; stroke-width: 1 } "
        f"{colours(COLOURS)} @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} "
        f".background {{ fill: #0d1117 }} .grid {{ stroke: #30363d }} {colours(DARK)} }}"
    )
