"""A column's values as a drawing of a few words' size: bars over its range, or of its most frequent texts."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from raylway.report.words import figure, number

_WIDTH, _HEIGHT = 96, 24


def spark(column: dict[str, Any]) -> Markup:
    """Inline SVG of a column of `profile.json`; empty if there is nothing to draw."""
    if counts := column["histogram"]:
        described = f"from {figure(column['minimum'])} to {figure(column['maximum'])}"
        return _bars([(count, "") for count in counts], f"Spread of {column['name']} {described}")
    if frequent := column["frequent"]:
        tips = [(count, f"{name}: {number(count)}") for name, count in frequent.items()]
        return _bars(tips, f"Most frequent values of {column['name']}")
    return Markup("")


def _bars(counts: list[tuple[int, str]], label: str) -> Markup:
    highest = max(count for count, _ in counts) or 1
    step = min(_WIDTH / len(counts), 14)
    bars = []
    for at, (count, tip) in enumerate(counts):
        tall = max(1.0, count / highest * _HEIGHT) if count else 0.0
        shown = f"<title>{escape(tip)}</title>" if tip else ""
        bars.append(
            f'<rect class="bar s1" x="{at * step:.1f}" y="{_HEIGHT - tall:.1f}" width="{max(1.0, step - 1):.1f}"'
            f' height="{tall:.1f}">{shown}</rect>'
        )
    opening = f'<svg class="spark" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
    return Markup("".join([opening, *bars, "</svg>"]))
