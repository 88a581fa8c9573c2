"""The pictures of the studies: panels of curves and dots on one page, a file of its own in SVG."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import ceil, floor, log10

from markupsafe import Markup, escape

from surm_seg.charts import ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 250, 44, 150, 24, 34
"""Units of a panel of curves: all of it, and room for the numbers, the names, the title and the axis."""

GAP = 16  # units between panels
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31", "#999999", "#5e3c99")
"""Okabe and Ito's colour-blind-safe palette without its yellow, and three more."""

Series = Mapping[str, Sequence[tuple[float, float]]]


def curves(title: str, x_name: str, series: Series, *, log_x: bool = False, log_y: bool = False) -> Markup:
    """A line per name with its points (x, y); the names stand beside, in the order of the last points.

    Args:
        x_name: what x is.
        log_x, log_y: logarithmic axes. On the first, every x of the first line has its number.
    """

    def across(x: float) -> float:
        return log10(x) if log_x else x

    def up(y: float) -> float:
        return log10(y) if log_y else y

    xs = [x for x, _ in next(iter(series.values()))]
    start, span = across(xs[0]), across(xs[-1]) - across(xs[0]) or 1.0
    ys = [up(y) for points in series.values() for _, y in points]
    levels = [float(n) for n in range(floor(min(ys)), ceil(max(ys)) + 1)] if log_y else ticks(min(ys), max(ys))
    low, high = levels[0], levels[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        part = (y - low) / ((high - low) or 1.0)
        inner = HEIGHT - TOP - BOTTOM
        return LEFT + (WIDTH - LEFT - RIGHT) * (across(x) - start) / span, TOP + inner * (1 - part)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text x="{LEFT}" y="14" font-weight="bold">{escape(title)}</text>']
    for level in levels:
        y = place(xs[0], level)[1]
        shown = f"{10**level if log_y else level:g}"
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for x in xs if log_x else (xs[0], xs[-1]):
        parts.append(
            f'<text x="{place(x, low)[0]:.1f}" y="{bottom + 14}" text-anchor="middle">{x:g}</text>',
        )
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    order = sorted(series, key=lambda name: -series[name][-1][1])
    for n, (name, points) in enumerate(series.items()):
        colour = COLOURS[n % len(COLOURS)]
        line = " ".join("{:.1f},{:.1f}".format(*place(x, up(y))) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        row = TOP + 8 + 16 * order.index(name)
        parts.append(f'<text x="{right + 10}" y="{row}" fill="{colour}">{escape(name)}</text>')
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>')


def scatter(
    title: str,
    x_name: str,
    points: Mapping[str, tuple[float, float, float]],
    *,
    hollow: Collection[str] = (),
    others: Sequence[tuple[float, float]] = (),
    stairs: bool = False,
) -> Markup:
    """A dot per name at (x, y), x logarithmic, with a bar of y ± spread; names stand beside, in the order of y.

    Args:
        points: name -> x, y, spread of y; where x is 0 the dot has a place of its own, left of all powers of ten.
        hollow: names whose dots are rings: those that were not measured.
        others: x, y of grey dots without a name.
        stairs: join the named dots by steps, as a front of those that no other beats.
    """
    every = [x for x, *_ in (*points.values(), *others)]
    powers = [log10(x) for x in every if x] or [0.0]
    zero = floor(min(powers)) - 1
    start, end = zero if 0 in every else zero + 1, max(ceil(max(powers)), zero + 2)
    ys = [y + side * s for _, y, s in points.values() for side in (-1, 1)] + [y for _, y in others]
    levels = ticks(min(ys), max(ys))
    low, high = levels[0], levels[-1]
    order = sorted(points, key=lambda name: -points[name][1])
    right, height = WIDTH - RIGHT, max(HEIGHT, TOP + BOTTOM + 16 * len(order))
    bottom = height - BOTTOM

    def across(x: float) -> float:
        return LEFT + (right - LEFT) * ((log10(x) if x else zero) - start) / (end - start)

    def up(y: float) -> float:
        return bottom - (bottom - TOP) * (y - low) / ((high - low) or 1.0)

    parts = [f'<text x="{LEFT}" y="14" font-weight="bold">{escape(title)}</text>']
    for level in levels:
        parts.append(f'<line x1="{LEFT}" y1="{up(level):.1f}" x2="{right}" y2="{up(level):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(level) + 4:.1f}" text-anchor="end">{level:g}</text>')
    for power in range(start, end + 1):
        x = 0.0 if power == zero else 10.0**power
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 14}" text-anchor="middle">{_short(x)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_name)}</text>')
    parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="#bbb"/>' for x, y in others]
    if stairs:
        path = "H".join(f"{across(x):.1f} V{up(y):.1f} " for x, y, _ in sorted(points.values()))
        x, y, _ = min(points.values())
        parts.append(f'<path d="M{across(x):.1f} {up(y):.1f} H{path}" fill="none" stroke="#555"/>')
    for n, name in enumerate(order):
        x, y, s = points[name]
        colour, row, place = COLOURS[n % len(COLOURS)], TOP + 8 + 16 * n, across(x)
        parts.append(
            f'<line x1="{place:.1f}" y1="{up(y - s):.1f}" x2="{place:.1f}" y2="{up(y + s):.1f}" stroke="{colour}"/>'
        )
        fill = f'fill="white" stroke="{colour}" stroke-width="2"' if name in hollow else f'fill="{colour}"'
        parts.append(f'<circle cx="{place:.1f}" cy="{up(y):.1f}" r="4" {fill}/>')
        parts.append(
            f'<line x1="{place:.1f}" y1="{up(y):.1f}" x2="{right + 6}" y2="{row - 4}" stroke="{colour}" '
            'stroke-width=".5" stroke-dasharray="2 3"/>'
        )
        parts.append(f'<text x="{right + 10}" y="{row}" fill="{colour}">{escape(name)}</text>')
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}">{"".join(parts)}</svg>')


def _short(number: float) -> str:
    """With k for thousands and M for millions."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def page(rows: Sequence[Sequence[Markup]]) -> str:
    """Rows of panels as the text of an SVG file with a white background."""
    placed, right, top = [], 0, 0
    for row in rows:
        left, sizes = 0, [_size(panel) for panel in row]
        for panel, (width, height) in zip(row, sizes, strict=True):
            place = f'<svg x="{left}" y="{top}" width="{width}" height="{height}" '
            placed.append(panel.replace("<svg ", Markup(place), 1))
            left += width + GAP
        right = max(right, left - GAP)
        top += max(height for _, height in sizes) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-GAP} {-GAP} {right + 2 * GAP} {top + GAP}" '
        f'width="{right + 2 * GAP}" font-family="sans-serif" font-size="11">'
        f'<rect x="{-GAP}" y="{-GAP}" width="100%" height="100%" fill="white"/>{"".join(placed)}</svg>\n'
    )


def _size(panel: Markup) -> tuple[int, int]:
    found = re.match(r'<svg viewBox="0 0 (\d+) (\d+)"', panel)
    assert found is not None, "every panel says how large it is"
    return int(found[1]), int(found[2])
