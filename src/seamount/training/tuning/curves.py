"""Draws curves as SVG that takes its colours from the page around it. Called by `report`; knows not what they mean.

Nothing in it is a style or a script, so that a page may forbid both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 16, 34
_WIDE, _NARROW, _HEIGHT = 920, 440, 260
_MOST_POINTS = 240
_TICKS = 5
_LOGARITHMIC_FROM = 30.0  # times that the highest value is the lowest
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Curve:
    """One row of points.

    Attributes:
        kind: a line, with a band from the lowest to the highest where several points fall together; or dots, joined.
        points: x and y, x ascending; those that are not finite are left out.
    """

    kind: Literal["line", "dots"]
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, at = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            found = [m * 10.0**e for e in range(-30, 30) for m in (1, 2, 5) if self.low <= m * 10.0**e <= self.high]
            return found if len(found) <= 8 else [v for v in found if math.log10(v) % 1 < 1e-9]
        rough = (self.high - self.low) / _TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(nice * unit for nice in _NICE if nice * unit >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def draw(
    label: str,
    curves: Iterable[Curve],
    *,
    marks: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    is_wide: bool = False,
) -> Markup:
    """Curves over steps as an `<svg>`.

    The classes `curve-0`, `curve-1` ... of lines and dots, `band`, `grid`, `mark` and `tick` give a page its hold. The
    axis is logarithmic where the values span much.

    Args:
        label: read aloud in place of the picture.
        marks: upright lines, at x, with a name, for which a wide picture alone has room.
        from_zero: the axis begins there.
        is_wide: for the whole width of a page, not half of it.

    Returns:
        Markup; empty where no curve has a point.
    """
    kept = [
        (number, curve.kind, [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)])
        for number, curve in enumerate(curves)
    ]
    xs = [x for _, _, points in kept for x, _ in points]
    ys = [y for _, _, points in kept for _, y in points]
    if not xs:
        return Markup()
    across, up = _axes(xs, ys, from_zero, _WIDE if is_wide else _NARROW)
    parts = [_grid(across, up), *(_mark(across, at, name if is_wide else "") for at, name in marks)]
    for number, kind, points in kept:
        parts.append(_line(number, points, across, up) if kind == "line" else _dots(number, points, across, up))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDE if is_wide else _NARROW, _HEIGHT, label, Markup().join(parts)
    )


def _axes(xs: list[float], ys: list[float], from_zero: bool, width: int) -> tuple[_Axis, _Axis]:
    low, high = min(ys), max(ys)
    logarithmic = not from_zero and low > 0 and high / low >= _LOGARITHMIC_FROM
    if from_zero:
        low = min(low, 0.0)
    if high == low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    elif logarithmic:
        low, high = low / 1.1, high * 1.1
    else:
        spare = (high - low) * 0.04
        low, high = low if from_zero else low - spare, high + spare
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    return (
        _Axis(left, right, _LEFT, width - _RIGHT),
        _Axis(low, high, _HEIGHT - _BOTTOM, _TOP, logarithmic),
    )


def _grid(across: _Axis, up: _Axis) -> Markup:
    parts = []
    for value in up.ticks():
        y = up.place(value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                across.start, across.end, y, y
            )
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                _LEFT - 8, y + 4, _number(value)
            )
        )
    for value in across.ticks():
        if value == round(value):
            parts.append(
                Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                    across.place(value), _HEIGHT - 12, _number(value)
                )
            )
    return Markup().join(parts)


def _mark(across: _Axis, at: float, name: str) -> Markup:
    x = across.place(min(max(at, across.low), across.high))
    return Markup(
        '<line class="mark" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/><text class="tick" x="{:.1f}" y="{}">{}</text>'
    ).format(x, x, _TOP, _HEIGHT - _BOTTOM, x + 4, _TOP + 10, name if len(name) <= 24 else name[:23] + "…")


def _line(number: int, points: list[tuple[float, float]], across: _Axis, up: _Axis) -> Markup:
    parts = _together(points)
    middles = [
        (across.place(sum(x for x, _ in part) / len(part)), up.place(sum(y for _, y in part) / len(part)))
        for part in parts
    ]
    band = Markup()
    if len(parts) < len(points):
        top = [(x, up.place(max(y for _, y in part))) for (x, _), part in zip(middles, parts, strict=True)]
        low = [(x, up.place(min(y for _, y in part))) for (x, _), part in zip(middles, parts, strict=True)]
        band = Markup('<polygon class="band curve-{}" points="{}"/>').format(number, _joined(top + low[::-1]))
    if len(middles) == 1:
        return _dots(number, points, across, up)
    return band + Markup('<polyline class="curve curve-{}" points="{}"/>').format(number, _joined(middles))


def _dots(number: int, points: list[tuple[float, float]], across: _Axis, up: _Axis) -> Markup:
    places = [(across.place(x), up.place(y)) for x, y in points]
    dots = [
        Markup('<circle class="dot curve-{}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(number, *at) for at in places
    ]
    joined = Markup('<polyline class="curve joins curve-{}" points="{}"/>').format(number, _joined(places))
    return joined + Markup().join(dots)


def _together(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The points in at most so many groups of neighbours."""
    count = min(len(points), _MOST_POINTS)
    edges = [i * len(points) // count for i in range(count + 1)] if count else [0]
    return [points[a:b] for a, b in pairwise(edges)]


def _joined(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g} M"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4g}"
