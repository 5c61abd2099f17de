"""How fast training went and where its time went, for the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from raylway.report import curves
from raylway.report.charts import Axis, Figure, Series, chart
from raylway.report.figures import History
from raylway.report.words import number, percent, seconds
from raylway.runs.pace import Line

_STEPS = Axis("step", low=0.0)


def charts(history: History) -> list[Figure]:
    """Rows a second and the time of a step, over the steps."""
    if "step_s" not in history.steps:
        return []
    at, rate = curves.thinned(*history.steps["rows_per_s"])
    overall = _rate(history)
    described = f"{number(overall)} rows a second over all steps. The faint line is each step."
    top = float(np.quantile(rate, 0.995)) * 1.05 or None
    series = [Series("", at, rate, "faint", 1), Series("", at, curves.smoothed(rate), "line", 1)]
    figures = [chart("Rows a second", described, series, (_STEPS, Axis("rows/s", low=0.0, high=top)), described)]
    at, times = curves.thinned(*history.steps["step_s"])
    series = [Series("each step", at, times * 1000, "faint", 2)]
    for colour, (label, name) in enumerate((("median", "step_p50_s"), ("99th percentile", "step_p99_s")), 2):
        if name in history.paces:
            at, values = history.paces[name]
            series += [Series(label, at, values * 1000, "line", colour), Series("", at, values * 1000, "dots", colour)]
    p50, p99 = np.percentile(history.steps["step_s"][1], [50, 99]) * 1000
    described = f"Half of all steps took at most {p50:.3g} ms, 99 in 100 at most {p99:.3g} ms."
    top = 1.1 * max(float(np.quantile(times, 0.99)) * 1000, *(float(part.y.max()) for part in series[1:]), p99)
    axes = _STEPS, Axis("milliseconds", low=0.0, high=top)
    return [*figures, chart("Time of a step", described, series, axes, described)]


def facts(history: History, events: Iterable[Line]) -> dict[str, Any]:
    """Figures over the whole of training, and the parts of its wall time; empty before the first step."""
    if "step_s" not in history.steps:
        return {}
    times = history.steps["step_s"][1]
    spent = history.tally.spent(events)
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    parts = [
        ("steps that were kept", spent.kept, 1),
        ("validation", spent.validation, 2),
        ("standing still for checkpoints", spent.checkpoints, 3),
        ("steps that were lost and made again", spent.lost, 5),
        ("starts, restarts and ends", spent.starting, 0),
    ]
    tiles = [
        (number(_rate(history)), "rows a second"),
        (f"{p50:.3g} ms", "a step at the median"),
        (f"{p99:.3g} ms", "at the 99th percentile"),
        (percent(history.steps["data_s"][1].sum(), times.sum()), "of it waiting for rows"),
        (percent(spent.kept, spent.wall), "goodput"),
    ]
    return {
        "tiles": tiles,
        "parts": [
            {"name": name, "elapsed_s": elapsed, "colour": colour, "share": percent(elapsed, spent.wall)}
            for name, elapsed, colour in parts
        ],
        "wall_s": spent.wall,
        "attempts": spent.attempts,
        "slowest": _slowest(history),
    }


def _rate(history: History) -> float:
    return float(history.steps["rows"][1].sum() / history.steps["step_s"][1].sum())


def _slowest(history: History) -> str:
    """Which rank held up the others, in a sentence; empty for one worker."""
    if "slowest_rank" not in history.steps:
        return ""
    ranks = history.steps["slowest_rank"][1].astype(int)
    behind = np.bincount(ranks, history.steps["slowest_s"][1] - history.steps["median_s"][1])
    rank = int(behind.argmax())
    share = percent(float(behind[rank]), float(history.steps["step_s"][1].sum()))
    return (
        f"Rank {rank} was the slowest in {percent(int((ranks == rank).sum()), len(ranks))} of the steps; its own work "
        f"took longer than that of the median rank by {seconds(float(behind[rank]))}, {share} of the steps’ time."
    )
