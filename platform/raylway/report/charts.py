"""Small charts as inline SVG: drawn by hand, so that they follow the page's light and dark colours, print well, hold
real text, and need neither a script nor a network.

Every chart has a title and a description for those who can't see it, and takes its colours from the classes `s1` to
`s8` of the page's style sheet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 14, 44
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """Points to draw in one colour.

    Args:
        name: For the legend; an empty one is not listed.
        x: float [n]
        y: float [n]
        style: How the points are joined.
        colour: 1 to 8, or 0 for the quiet colour of reference lines.
        tips: A text for each point, shown by the browser when the pointer rests on it (`dots` only).
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: Literal["line", "faint", "dashed", "dots", "cloud", "bars"] = "line"
    colour: int = 1
    tips: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """One axis; bounds that are left out follow from the points."""

    label: str
    low: float | None = None
    high: float | None = None
    percent: bool = False


@dataclass(frozen=True)
class Figure:
    """A finished chart for the page."""

    title: str
    svg: Markup
    caption: str = ""
    legend: list[tuple[str, Series]] = field(default_factory=list)


def chart(title: str, description: str, series: list[Series], axes: tuple[Axis, Axis], caption: str = "") -> Figure:
    """Draw series over an x and a y axis.

    Args:
        title: What the chart shows; no two charts of a page have the same.
        description: What can be seen in it, in words, for readers who can't see it.
        series: Drawn in this order.
        axes: The x and the y axis.
        caption: Shown below.
    """
    across, up = axes
    key = re.sub(r"[^a-z0-9]+", "-", title.lower())
    x = _Scale(_bounds(across, [part.x for part in series]), _LEFT, WIDTH - _RIGHT)
    y = _Scale(_bounds(up, [part.y for part in series]), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t-{key} d-{key}">',
        f'<title id="t-{key}">{escape(title)}</title><desc id="d-{key}">{escape(description)}</desc>',
        f'<clipPath id="c-{key}"><rect x="{_LEFT}" y="{_TOP - 4}" width="{WIDTH - _LEFT - _RIGHT + 4}"'
        f' height="{HEIGHT - _TOP - _BOTTOM + 8}"/></clipPath>',
        *_grid(x, y, across, up),
        f'<g clip-path="url(#c-{key})">',
        *(_marks(part, x, y) for part in series if len(part.x)),
        "</g></svg>",
    ]
    legend = [(part.name, part) for part in series if part.name]
    return Figure(title, Markup("".join(parts)), caption, legend if len(legend) > 1 else [])


class _Scale:
    """From values to places on the page, linearly."""

    def __init__(self, bounds: tuple[float, float], start: float, end: float) -> None:
        self.low, self.high = bounds
        self.start, self.end = start, end

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.start + (np.asarray(values, float) - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values between two bounds: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(index * step) for index in np.arange(first, last + 1)]


def _bounds(axis: Axis, values: list[np.ndarray]) -> tuple[float, float]:
    known = np.concatenate([np.zeros(0), *values])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    low = axis.low if axis.low is not None else low
    high = axis.high if axis.high is not None else high
    if not high > low:
        low, high = low - (abs(low) or 1) * 0.05, low + (abs(low) or 1) * 0.05
    margin = (high - low) * 0.04
    return (low if axis.low is not None else low - margin), (high if axis.high is not None else high + margin)


def _grid(x: _Scale, y: _Scale, across: Axis, up: Axis) -> list[str]:
    base, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    rows, columns = ticks(y.low, y.high), ticks(x.low, x.high)
    for at, label in zip(y(np.array(rows)), _labels(rows, up), strict=True):
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for at, label in zip(x(np.array(columns)), _labels(columns, across), strict=True):
        anchor = "end" if at > right - 12 else "middle"
        parts.append(f'<path class="axis" d="M{at:.1f} {base}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{base + 17}" text-anchor="{anchor}">{label}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {base}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across.label)}</text>')
    height = (_TOP + base) / 2
    turned = f'transform="translate(11 {height}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="name" {turned}>{escape(up.label)}</text>')
    return parts


def _labels(values: list[float], axis: Axis) -> list[str]:
    """Tick labels, all with as many decimals as the distance between two needs."""
    values = [value + 0.0 for value in values]  # no minus sign on zero
    step = min(np.diff(values), default=1.0) * (100 if axis.percent else 1)
    largest = max(map(abs, values), default=0.0)
    if not axis.percent and (largest >= 1e5 or largest < 1e-3):
        return [_compact(value) for value in values]
    decimals = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    return [f"{value:,.{decimals}%}" if axis.percent else f"{value:,.{decimals}f}" for value in values]


def _compact(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit <= abs(value) < 1e12:
            return f"{value / limit:.4g}{suffix}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+", "e")


def _marks(series: Series, x: _Scale, y: _Scale) -> str:
    across, up = x(series.x), y(series.y)
    colour = f"s{series.colour}"
    if series.style == "dots":
        tips = list(series.tips) or [""] * len(across)
        return "".join(
            f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="4.5"><title>{escape(tip)}</title></circle>'
            for a, b, tip in zip(across, up, tips, strict=True)
        )
    if series.style == "cloud":
        points = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(across, up, strict=True))
        return f'<path class="cloud {colour}" d="{points}"/>'
    if series.style == "bars":
        return _bars(series, across, up, float(y(np.array(max(y.low, 0.0)))))
    points = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(across, up, strict=True))
    return f'<path class="{series.style} {colour}" d="M{points}"/>'


def _bars(series: Series, across: np.ndarray, up: np.ndarray, base: float) -> str:
    """Bars around evenly spaced centres, two units apart."""
    step = float(np.diff(across).min()) if len(across) > 1 else 24.0
    width = max(1.0, step - 2)
    tips = list(series.tips) or [""] * len(across)
    return "".join(
        f'<rect class="bar s{series.colour}" x="{a - width / 2:.1f}" y="{b:.1f}" width="{width:.1f}"'
        f' height="{max(0.0, base - b):.1f}"><title>{escape(tip)}</title></rect>'
        for a, b, tip in zip(across, up, tips, strict=True)
    )
