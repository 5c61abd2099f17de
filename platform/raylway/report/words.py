"""Numbers and findings in words."""

from __future__ import annotations

import datetime
from typing import Any

from raylway.evaluate.record import LABELS, LOWER_IS_BETTER, Baseline, Evaluation
from raylway.features.prepared import LeakTest


def figure(value: float | None) -> str:
    """Three to four significant digits; a dash for what is not known."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.2e}".replace("e+0", "e").replace("e-0", "e-")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if size < 10 else f"{value:.4g}"


def bound(value: float) -> str:
    """An end of a range: whole numbers as they are, others to four digits."""
    return f"{value:,}" if isinstance(value, int) else figure(value)


def number(value: float) -> str:
    """A count, with its thousands apart."""
    return f"{value:,.0f}"


def percent(part: float, whole: float) -> str:
    """A share, or a dash of nothing; a share that is there is never shown as 0%."""
    if not whole:
        return "–"
    share = part / whole
    return f"{share:.1%}" if share == 0 or share >= 0.001 else "<0.1%"


def seconds(value: float) -> str:
    """A length of time in the two units that matter."""
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def moment(text: str) -> str:
    """An ISO time as a date and a time to the minute, in UTC."""
    return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC).strftime("%-d %B %Y, %H:%M UTC")


def sentence_list(parts: list[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def leaks(found: LeakTest) -> str:
    """The result of the leak test."""
    of = "" if found.compared == found.rows else f" (contents of {number(found.compared)} rows compared)"
    tests = [
        (found.row_ids_on_two_sides, "row stands on two sides", "rows stand on two sides"),
        (found.unplaced, "kept row is in no shard", "kept rows are in no shard"),
        (found.foreign, "row of a shard is no kept row", "rows of the shards are no kept rows"),
        (found.equal_rows_on_two_sides, "content of rows is on two sides", "contents of rows are on two sides"),
        (found.groups_on_two_sides, "group is on two sides", "groups are on two sides"),
        (found.out_of_order, "side begins before an earlier one ends", "sides begin before an earlier one ends"),
    ]
    told = [(count, one, many) for count, one, many in tests if count is not None]
    if found.passed:
        return f"Read back from the shards, of {number(found.rows)} rows{of}: " + sentence_list(
            [f"no {one}" for _, one, _ in told]
        )
    wrong = [f"{number(count)} {one if count == 1 else many}" for count, one, many in told if count]
    return f"Read back from the shards, of {number(found.rows)} rows{of}: " + sentence_list(wrong)


def main_metric(evaluation: Evaluation) -> str:
    """The metric by which the headline compares."""
    if evaluation.task == "regression":
        return "rmse"
    return "roc_auc" if evaluation.metrics["roc_auc"] is not None else "accuracy"


def headline(evaluation: Evaluation, target: str) -> str:
    """What came out, in two sentences for a reader who knows no metric's name."""
    metrics, rows = evaluation.metrics, number(evaluation.rows)
    if not evaluation.rows:
        return "The test split has no rows, so nothing was measured. data.split.test sets its share."
    if evaluation.task == "regression":
        far = f"On {rows} rows that it never saw, the model's answer for “{target}” is off by {figure(metrics['mae'])}"
        explained = (
            f" on average and explains {metrics['r2']:.1%} of its variance."
            if metrics["r2"] is not None
            else " on average."
        )
        return far + explained
    answer = (
        f"On {rows} rows that it never saw, the model names “{target}” rightly {metrics['accuracy']:.1%} of the time"
    )
    if metrics["roc_auc"] is None:
        return answer + "."
    if len(evaluation.per_class) == 2:
        other, one = (scores.name for scores in evaluation.per_class)
        shown = f"Shown a row that is {one} and one that is {other}, it gives the first the higher probability of {one}"
        return f"{answer}. {shown} {metrics['roc_auc']:.1%} of the time."
    return answer + f", and tells a class from the others with a mean ROC-AUC of {metrics['roc_auc']:.3f}."


def verdict(evaluation: Evaluation) -> list[str]:
    """How the model stands against each baseline, one sentence each."""
    name = main_metric(evaluation)
    ours = evaluation.metrics[name]
    sentences = []
    for baseline in evaluation.baselines:
        theirs = baseline.scores.metrics[name] if baseline.scores else None
        if ours is None or theirs is None:
            continue
        better = ours < theirs if name in LOWER_IS_BETTER else ours > theirs
        word = "It beats" if better else "It equals" if ours == theirs else "It falls short of"
        sentences.append(f"{word} {_called(baseline)}: {LABELS[name]} {figure(ours)} against {figure(theirs)}.")
    return sentences


def comparison(evaluation: Evaluation) -> dict[str, Any]:
    """The model and its baselines as a table: metric labels, and a row a contender with the best cell marked."""
    names = list(evaluation.metrics)
    contenders = [("this model", evaluation.metrics)]
    contenders += [(part.name, part.scores.metrics) for part in evaluation.baselines if part.scores]
    best = {}
    for name in names:
        known = [metrics[name] for _, metrics in contenders if metrics[name] is not None]
        if known:
            best[name] = min(known) if name in LOWER_IS_BETTER else max(known)  # type: ignore[type-var]
    rows = [
        (title, [(figure(metrics[name]), metrics[name] is not None and metrics[name] == best[name]) for name in names])
        for title, metrics in contenders
    ]
    heads = [LABELS[name] + (" ↓" if name in LOWER_IS_BETTER else " ↑") for name in names]
    return {"heads": heads, "rows": rows}


def _called(baseline: Baseline) -> str:
    return {"majority class": "always naming the most frequent class", "mean": "always answering the mean"}.get(
        baseline.name, baseline.name
    )
