"""From a run's records to the charts of its report."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from raylway.evaluate.record import Evaluation
from raylway.report import curves
from raylway.report.charts import COLOURS, Axis, Figure, Series, chart
from raylway.report.words import figure, sentence_list
from raylway.runs import pace
from raylway.storage import Place

_MOST_ROWS = 1_000_000
"""Answers that the curves are drawn from; of more, every k-th is taken."""
_MOST_DOTS = 1_500
_STEPS = Axis("step", low=0.0)


Points = tuple[np.ndarray, np.ndarray]
"""Steps and values, float [n] each."""


class History:
    """What training wrote to `metrics.jsonl`, by the name of the value; values that are not finite are left out."""

    def __init__(self, place: Place) -> None:
        found: dict[str, dict[str, tuple[list[float], list[float]]]] = {"step": {}, "validation": {}, "pace": {}}
        self.tally = pace.Tally()
        for record in pace.lines(place):
            self.tally.add(record)
            for name, value in record.items():
                if record["kind"] in found and isinstance(value, int | float) and np.isfinite(value):
                    steps, values = found[record["kind"]].setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(value)
        self.steps, self.validations, self.paces = (
            {name: (np.array(steps, float), np.array(values, float)) for name, (steps, values) in columns.items()}
            for columns in found.values()
        )


def learning(history: History, best_step: int | None) -> list[Figure]:
    """Loss, the other validation metrics, and the learning rate."""
    figures = []
    if "loss" in history.steps:
        figures.append(_loss(history, best_step))
    for name, (at, values) in history.validations.items():
        if name.startswith("val_") and name != "val_loss":
            label = f"validation {name.removeprefix('val_').replace('_', ' ')}"
            tips = [f"step {step:,.0f}: {value:.4g}" for step, value in zip(at, values, strict=True)]
            described = f"From {figure(values[0])} at the first validation to {figure(values[-1])} at the last."
            series = [Series("", at, values, colour=2), Series("", at, values, "dots", 2, tips)]
            axes = _STEPS, Axis(label)
            figures.append(chart(label.capitalize(), described, series, axes, f"{described} {_best(best_step)}"))
    if "lr" in history.steps:
        at, rate = curves.thinned(*history.steps["lr"])
        described = f"From {figure(rate[0])} over {figure(rate.max())} at most to {figure(rate[-1])} at the end."
        axes = _STEPS, Axis("learning rate", low=0.0)
        figures.append(chart("Learning rate", described, [Series("", at, rate, colour=3)], axes, described))
    if "grad_norm" in history.steps:
        at, norm = curves.thinned(*history.steps["grad_norm"])
        described = f"Before clipping; {figure(float(np.median(history.steps['grad_norm'][1])))} at the median."
        axes = _STEPS, Axis("norm of the gradient", low=0.0, high=float(np.quantile(norm, 0.995)) or None)
        series = [Series("", at, norm, "faint", 4), Series("", at, curves.smoothed(norm), "line", 4)]
        figures.append(chart("Gradient norm", described, series, axes, described))
    return figures


def classification(predictions: Path, evaluation: Evaluation) -> list[Figure]:
    """ROC and calibration."""
    classes = [scores.name for scores in evaluation.per_class]
    part = curves.spread(evaluation.rows, _MOST_ROWS)
    target = pq.read_table(predictions, columns=["target"])["target"].to_numpy()[part]
    areas = {scores.name: scores.roc_auc for scores in evaluation.per_class if scores.roc_auc is not None}
    if len(classes) == 2:
        shown = [name for name in classes[1:] if name in areas]
    else:
        shown = sorted(sorted(areas, key=lambda name: areas[name])[:COLOURS], key=classes.index)
    scores = {name: _scores(predictions, name)[part] for name in shown}
    drawn = f" Drawn from every {part.step}th row." if part.step > 1 else ""
    figures = [_roc(scores, target, areas, classes, drawn)] if scores else []
    if len(classes) == 2:
        claim = scores.get(classes[1], _scores(predictions, classes[1])[part])
        figures.append(_calibration(claim, target == classes[1], f"probability of {classes[1]}", drawn))
    else:
        answered = pq.read_table(predictions, columns=["prediction"])["prediction"].to_numpy()[part]
        claim = functools.reduce(np.maximum, (_scores(predictions, name)[part] for name in classes))
        figures.append(_calibration(claim, target == answered, "probability of the answer", drawn))
    return figures


def regression(predictions: Path, evaluation: Evaluation) -> list[Figure]:
    """Predicted against true, and how far off."""
    part = curves.spread(evaluation.rows, _MOST_ROWS)
    table = pq.read_table(predictions, columns=["target", "prediction"])
    true, answer = (table[name].to_numpy()[part] for name in ("target", "prediction"))
    dots = curves.spread(len(true), _MOST_DOTS)
    low, high = float(min(true.min(), answer.min())), float(max(true.max(), answer.max()))
    ends = np.array([low, high])
    r2 = evaluation.metrics["r2"]
    drawn = f" Every {dots.step}th row is drawn." if dots.step > 1 else ""
    caption = "Rows on the line are answered exactly." + drawn
    cloud = [
        Series("", ends, ends, "dashed", 0),
        Series("", true[dots], answer[dots], "cloud", 1),
    ]
    described = f"A cloud of test rows around the line of exact answers; R² is {figure(r2)}."
    figures = [chart("Predicted and true values", described, cloud, (Axis("true"), Axis("predicted")), caption)]
    counts, edges = np.histogram(answer - true, bins=int(np.clip(len(true) ** 0.5, 7, 31)))
    centres = (edges[1:] + edges[:-1]) / 2
    tips = [f"{a:.4g} to {b:.4g}: {n:,} rows" for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    bars = [Series("", centres, counts.astype(float), "bars", 1, tips)]
    off = np.quantile(answer - true, [0.05, 0.5, 0.95])
    described = (
        f"Half of the answers are off by less than {figure(float(np.median(np.abs(answer - true))))}; "
        f"nine in ten errors lie between {figure(off[0])} and {figure(off[2])}."
    )
    axes = Axis("predicted minus true", float(edges[0]), float(edges[-1])), Axis("rows", low=0.0)
    return [*figures, chart("Errors", described, bars, axes, described)]


def _loss(history: History, best_step: int | None) -> Figure:
    at, loss = curves.thinned(*history.steps["loss"])
    smooth = curves.smoothed(loss)
    series = [Series("", at, loss, "faint", 1), Series("training, smoothed", at, smooth, "line", 1)]
    steps = len(history.steps["loss"][0])
    described = f"Training loss from {figure(smooth[0])} to {figure(smooth[-1])} over {steps:,} steps."
    high = float(np.quantile(loss, 0.995))
    if "val_loss" in history.validations:
        at, held = history.validations["val_loss"]
        tips = [f"step {step:,.0f}: {value:.4g}" for step, value in zip(at, held, strict=True)]
        series += [Series("validation", at, held, "line", 2), Series("", at, held, "dots", 2, tips)]
        ends = f"{figure(held[0])} at first, {figure(held.min())} at best, {figure(held[-1])} at last"
        described += f" Validation loss {ends}."
        high = max(high, float(held.max()))
    low = float(min(part.y.min() for part in series))
    margin = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    axes = _STEPS, Axis("loss", low - margin if low > margin else min(low, 0.0), high + margin)
    return chart("Loss", described, series, axes, f"The faint line is each step. {_best(best_step)}".strip())


def _best(step: int | None) -> str:
    return f"The bundle holds the weights of step {step:,}, the best on validation." if step else ""


def _roc(
    scores: dict[str, np.ndarray], target: np.ndarray, areas: dict[str, float], classes: list[str], drawn: str
) -> Figure:
    chance = np.array([0.0, 1.0])
    series = [Series("chance" if len(scores) > 1 else "", chance, chance, "dashed", 0)]
    for colour, (name, score) in enumerate(scores.items(), 1):
        is_class = target == name
        if is_class.any() and not is_class.all():
            label = f"{name} ({areas[name]:.3f})" if len(scores) > 1 else ""
            series.append(Series(label, *curves.roc(is_class, score), "line", colour))
    named = sentence_list([f"{name} {areas[name]:.3f}" for name in scores])
    if len(classes) == 2:
        caption = f"{classes[1]} against {classes[0]}; the area below the curve is {areas[classes[1]]:.4f}."
    elif len(scores) < len(areas):
        caption = (
            f"Each class against all others, of {len(areas)} classes the {len(scores)} told apart worst; with areas."
        )
    else:
        caption = "Each class against all others, with the area below its curve."
    axes = Axis("false positive rate", 0.0, 1.0, True), Axis("true positive rate", 0.0, 1.0, True)
    return chart("ROC", f"Areas below the curves: {named}. Chance is 0.5.", series, axes, caption + drawn)


def _calibration(claim: np.ndarray, came_true: np.ndarray, what: str, drawn: str) -> Figure:
    found = curves.reliability(claim, came_true)
    chance = np.array([0.0, 1.0])
    tips = [
        f"claimed {a:.1%}, observed {b:.1%}, {n:,} rows"
        for a, b, n in zip(found.claimed, found.observed, found.rows, strict=True)
    ]
    centres = (np.floor(np.minimum(found.claimed * 10, 9.999)) + 0.5) / 10
    share = found.rows / found.rows.sum()
    series = [
        Series("share of rows", centres, share, "bars", 0, [f"{tip}" for tip in tips]),
        Series("perfect", chance, chance, "dashed", 0),
        Series("", found.claimed, found.observed, "line", 1),
        Series("observed", found.claimed, found.observed, "dots", 1, tips),
    ]
    described = "; ".join(tips) + "."
    caption = f"When the model claims a probability, how often is it so? Mean gap {found.error:.1%}.{drawn}"
    axes = Axis(what, 0.0, 1.0, True), Axis("how often it was so", 0.0, 1.0, True)
    return chart("Calibration", described, series, axes, caption)


def _scores(predictions: Path, name: str) -> np.ndarray:
    return pq.read_table(predictions, columns=[f"p_{name}"])[f"p_{name}"].to_numpy()


def worst(predictions: Path, evaluation: Evaluation, most: int) -> list[dict[str, str]]:
    """The test rows that the model got most wrong, the worst first: of classes, wrong answers by the probability of the
    true one; of numbers, answers by their distance. Of equal ones the first of the source.
    """
    table = pq.read_table(predictions, columns=["row_id", "file", "line", "target", "prediction"])
    if evaluation.task == "regression":
        off = np.abs(table["prediction"].to_numpy() - table["target"].to_numpy())
        order = np.lexsort((table["row_id"].to_numpy(), -off))[:most]
        order = order[off[order] > 0]
    else:
        target = table["target"].to_numpy()
        wrong = np.flatnonzero(target != table["prediction"].to_numpy())
        true = np.zeros(len(target), np.float32)
        for scores in evaluation.per_class:
            mine = target == scores.name
            true[mine] = _scores(predictions, scores.name)[mine]
        order = wrong[np.lexsort((wrong, true[wrong]))][:most]
    rows = table.take(order).to_pylist()
    if evaluation.task == "regression":
        measures = [figure(float(value)) for value in off[order]]
        cells = [(figure(row["target"]), figure(row["prediction"])) for row in rows]
    else:
        measures = [f"{value:.2%}" if value >= 1e-4 else "below 0.01%" for value in true[order].tolist()]
        cells = [(row["target"], row["prediction"]) for row in rows]
    return [
        {"place": f"{row['file']}:{row['line']}", "id": str(row["row_id"]), "true": a, "answer": b, "measure": measure}
        for row, (a, b), measure in zip(rows, cells, measures, strict=True)
    ]
