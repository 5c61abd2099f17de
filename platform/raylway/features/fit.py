"""Fitting a transform to the training rows in rounds: each round measures every part of them and merges what was found.

    question = first_question(plan)
    while not isinstance(question, Transform):
        parts = [measure(table, plan, question) for table in the parts of the training rows]
        question = advance(plan, question, parts)

The first round takes counts, means, spreads, ranges and categories; a plan that needs no quantiles has its transform
then. Quantiles are exact and take a round or two more (`quantiles`). Parts are merged in the order of the rows, so the
result depends on how the rows are cut, which is fixed, and never on where or when a part was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec
import numpy as np
import pyarrow as pa

from raylway.errors import UserError
from raylway.features import quantiles
from raylway.features.derive import derived, parsed
from raylway.features.encode import Columns, signed_log
from raylway.features.learnt import Behind, CategoricalFeature, NumericFeature, Target
from raylway.features.moments import Frequent, Moments, most_frequent
from raylway.features.plan import Feature, FitPlan, point_shares
from raylway.features.quantiles import Found, Histogram, Wanted
from raylway.features.schema import sorted_names
from raylway.features.shapes import shapes
from raylway.features.transform import Transform

_MOST_VALUES = 1 << 21
"""Numbers that one round may collect as they are, over all columns: 16 MiB."""
MOST_ONE_HOT = 4096
"""Codes of a feature with one-hot categories: each is a number in every row."""
_MOST_TEXTS = 16
"""Shapes kept of a column that only derived features read, for made-up rows."""
_MOST_SCALED = 1e30
"""Larger numbers leave no room in float32 for the model's products."""


class Part(msgspec.Struct):
    """What one round found in some training rows; everything by the key of the feature (`plan.Feature`)."""

    moments: dict[str, Moments] = {}
    logged: dict[str, Moments] = {}
    """Of sign(x) log(1 + |x|)."""
    missing: dict[str, int] = {}
    counts: dict[str, dict[str, int]] = {}
    """Of categories."""
    frequent: dict[str, list[Frequent]] = {}
    texts: dict[str, dict[str, int]] = {}
    """Of the columns behind derived features: the most frequent shapes (`shapes`)."""
    target: Moments = msgspec.field(default_factory=Moments)
    histograms: dict[str, Histogram] = {}
    values: dict[str, bytes] = {}


class Question(msgspec.Struct, frozen=True):
    """What the next round is to find."""

    asked: dict[str, Wanted]
    """By the key of a feature; nothing in the first round, which finds all else."""
    found: dict[str, Found]
    known: Part | None
    """The first round's, merged; None before it."""


def first_question(_: FitPlan) -> Question:
    """The same for every plan."""
    return Question({}, {}, None)


def measure(table: pa.Table, plan: FitPlan, question: Question) -> Part:
    """Answer a question for the rows of a typed table, all of them training rows.

    Args:
        table: The source columns behind the features and the target.
        plan: What is fitted.
        question: Of this round.

    Raises:
        UserError: A derived column can't be computed.
    """
    table = derived(table, parsed(plan.derive))
    columns = Columns(table)
    part = Part()
    if question.known is not None:
        for feature in plan.numbers:
            if (wanted := question.asked.get(feature.key)) is not None:
                values = columns.number(feature.column, feature.part)
                found = quantiles.below(values[~np.isnan(values)], wanted)
                if isinstance(found, Histogram):
                    part.histograms[feature.key] = found
                else:
                    part.values[feature.key] = found
        return part
    for feature in plan.numbers:
        _measure_number(columns.number(feature.column, feature.part), feature, part)
    for feature in plan.categories:
        texts = columns.text(feature.column, feature.part)
        part.counts[feature.key] = _counts(texts)
        part.missing[feature.key] = texts.null_count
    for name in plan.behind:
        if pa.types.is_string(table.schema.field(name).type):
            part.texts[name] = _frequent(_counts(shapes(columns.text(name))))
        else:
            part.moments[name] = Moments.of(columns.number(name))
    if plan.task == "regression":
        part.target = Moments.of(columns.number(plan.target))
    return part


def advance(plan: FitPlan, question: Question, parts: Iterable[Part]) -> Question | Transform:
    """The next question, or the transform once nothing is left to ask.

    Args:
        plan: What is fitted.
        question: What the parts answer.
        parts: Of all training rows, in their order; may come one by one.

    Raises:
        UserError: A column's numbers are too large to be standardised, none of them is typical, or its categories are
            too many for one-hot.
    """
    found, asked = dict(question.found), {}
    if question.known is None:
        known = _merged(parts)
        counted = known.histograms
        for feature in plan.numbers:
            if feature.key in counted and (count := known.moments[feature.key].count):
                found[feature.key] = quantiles.looking_for(quantiles.ranks(feature.shares(count), count))
    else:
        known = question.known
        merged, values = _gathered(parts)
        counted = {key: quantiles.merged(some) for key, some in merged.items()}
        for key, sent in values.items():
            found[key] = quantiles.finish(found[key], sent, question.asked[key])
    for key, histogram in counted.items():
        if key in found:
            most = _MOST_VALUES // len(counted)
            found[key], wanted = quantiles.advance(found[key], histogram, question.asked.get(key), most)
            if wanted is not None:
                asked[key] = wanted
    if asked:
        return Question(asked, found, msgspec.structs.replace(known, histograms={}))
    return _transform(plan, known, found)


def fit(tables: list[pa.Table], plan: FitPlan) -> Transform:
    """The transform of training rows at hand: all rounds over some typed tables.

    Raises:
        UserError: As of `measure` and `advance`.
    """
    question: Question | Transform = first_question(plan)
    while isinstance(question, Question):
        question = advance(plan, question, [measure(table, plan, question) for table in tables])
    return question


def _measure_number(values: np.ndarray, feature: Feature, part: Part) -> None:
    present = values[~np.isnan(values)]
    part.moments[feature.key] = Moments.of(values)
    part.missing[feature.key] = len(values) - len(present)
    if feature.scale == "log":
        part.logged[feature.key] = Moments.of(signed_log(values))
    if feature.needs_quantiles:
        part.histograms[feature.key] = quantiles.first(present)
    if feature.needs_most_frequent:
        part.frequent[feature.key] = [Frequent.of(present)]


def _merged(parts: Iterable[Part]) -> Part:
    total = Part()
    counts: dict[str, Counter[str]] = {}
    histograms: dict[str, list[Histogram]] = {}
    for part in parts:
        for key, moments in part.moments.items():
            total.moments[key] = total.moments.get(key, Moments()).merged(moments)
        for key, moments in part.logged.items():
            total.logged[key] = total.logged.get(key, Moments()).merged(moments)
        for key, missing in part.missing.items():
            total.missing[key] = total.missing.get(key, 0) + missing
        for key, some in part.counts.items():
            counts.setdefault(key, Counter()).update(some)
        for key, some in part.texts.items():
            total.texts[key] = _frequent(Counter(total.texts.get(key, {})) + Counter(some))
        for key, frequent in part.frequent.items():
            total.frequent.setdefault(key, []).extend(frequent)
        for key, histogram in part.histograms.items():
            histograms.setdefault(key, []).append(histogram)
        total.target = total.target.merged(part.target)
    total.counts = dict(counts)
    total.histograms = {key: quantiles.merged(some) for key, some in histograms.items()}
    return total


def _gathered(parts: Iterable[Part]) -> tuple[dict[str, list[Histogram]], dict[str, list[bytes]]]:
    """A later round's counts and values of every part, by key."""
    histograms: dict[str, list[Histogram]] = {}
    values: dict[str, list[bytes]] = {}
    for part in parts:
        for key, histogram in part.histograms.items():
            histograms.setdefault(key, []).append(histogram)
        for key, some in part.values.items():
            values.setdefault(key, []).append(some)
    return histograms, values


def _transform(plan: FitPlan, known: Part, found: dict[str, Found]) -> Transform:
    numbers = [_number(feature, known, found.get(feature.key)) for feature in plan.numbers]
    categories = [_category(feature, known) for feature in plan.categories]
    mean, spread = 0.0, 1.0
    if plan.task == "regression":
        _refuse_too_large(plan.target, known.target, is_target=True)
        mean, spread = known.target.mean, known.target.spread or 1.0
    return Transform(
        derive={name: plan.derive[name] for name in plan.derive if name in plan.served},
        # of a date only what varies tells rows apart; its instant stays, so that no date is left without an input
        numeric=[feature for feature in numbers if feature.part != "year" or feature.spread],
        categorical=[feature for feature in categories if not feature.part or len(feature.known) > 1],
        behind=[_behind(name, known) for name in plan.behind],
        target=Target(plan.target, plan.task, plan.classes, mean, spread),
        drops_missing=plan.drops_missing,
    )


def _number(feature: Feature, known: Part, found: Found | None) -> NumericFeature:
    moments = known.moments[feature.key]
    _refuse_too_large(feature.name, moments)
    count, spread = moments.count, moments.spread
    # without a present training cell there is no range, and JSON has no infinity
    low, high = (moments.minimum, moments.maximum) if count else (0.0, 0.0)
    ends = np.array([low, high])
    if feature.scale == "log":
        ends = signed_log(ends)
    varies = bool(ends[0] < ends[1])
    median, centre, unit = 0.0, 0.0, 1.0
    points: list[float] = []
    edges: list[float] = []
    if feature.scale == "standard":
        centre, unit = moments.mean, spread
    elif feature.scale == "log":
        centre, unit = known.logged[feature.key].mean, known.logged[feature.key].spread
    if found is not None:
        first, median, third = found.at(np.array([0.25, 0.5, 0.75]), count).tolist()
        if feature.scale == "robust":
            centre, unit = median, (third - first) or 1.0
        if feature.scale == "quantile":
            points = found.at(point_shares(count), count).tolist()
        if feature.how.bins:
            edges = np.unique(found.at(feature.bin_shares, count)).tolist()
    far = float(np.abs(ends - centre).max())
    if varies and far > _MOST_SCALED * (unit or 1.0) and not (points or edges):
        raise _too_large(feature.name, moments)
    return NumericFeature(
        name=feature.name,
        column=feature.column,
        part=feature.part,
        mean=moments.mean,
        spread=spread,
        minimum=low,
        maximum=high,
        scale=feature.scale,
        centre=centre,
        unit=unit if varies else 0.0,
        points=points if varies else [],
        edges=edges if varies else [],
        fill=_fill(feature, known, median),
        indicator=_indicator(feature, known) and feature.part in ("", "seconds"),
    )


def _fill(feature: Feature, known: Part, median: float) -> float:
    """What stands in for a missing cell; nothing does in training where such rows are left out."""
    how = feature.how.impute
    if isinstance(feature.constant, float):
        return feature.constant
    if not feature.imputes or how == "mean":
        return known.moments[feature.key].mean
    if how == "median":
        return median
    value = most_frequent(known.frequent[feature.key])
    if value is None:
        raise UserError(
            f"no number of the column {feature.column!r} stands out as its most frequent one",
            where=f"data.transform.columns.{feature.column}.impute",
            expected="a column with repeated numbers",
            found=f"more than {Frequent.MOST:,} different ones, each about as rare as the others",
            fix="write impute: median or mean for this column",
        )
    return 0.0 if np.isnan(value) else value


def _indicator(feature: Feature, known: Part) -> bool:
    return feature.how.indicator and known.missing[feature.key] > 0


def _category(feature: Feature, known: Part) -> CategoricalFeature:
    counts = present = known.counts[feature.key]
    constant = feature.constant
    if isinstance(constant, str) and known.missing[feature.key]:
        counts = present | {constant: present.get(constant, 0) + known.missing[feature.key]}
    least = 1 if feature.part else feature.how.rare
    result = CategoricalFeature(
        name=feature.name,
        column=feature.column,
        part=feature.part,
        categories=sorted_names({name for name, count in counts.items() if count >= least}),
        rare=sorted_names({name for name, count in counts.items() if count < least}),
        most_frequent=_most_frequent(present),
        constant=constant if isinstance(constant, str) else None,
        one_hot=feature.how.one_hot,
        indicator=_indicator(feature, known) and not feature.part,
    )
    if result.one_hot and result.count > MOST_ONE_HOT:
        raise UserError(
            f"the column {feature.column!r} has too many categories for one-hot",
            where=f"data.transform.columns.{feature.column}.categories",
            expected=f"at most {MOST_ONE_HOT:,}",
            found=f"{result.count:,}",
            fix="write categories: embedding for this column, or let more of them be one with rare",
        )
    return result


def _behind(name: str, known: Part) -> Behind:
    if name in known.texts:
        return Behind(name, 0.0, 0.0, 0.0, list(known.texts[name]))
    moments = known.moments[name]
    if not moments.count or not np.isfinite(moments.mean):
        return Behind(name, 0.0, 1.0, 2.0, [])
    return Behind(name, moments.minimum, moments.mean, moments.maximum, [])


def _frequent(counts: dict[str, int]) -> dict[str, int]:
    """The most frequent ones, in order."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_TEXTS])


def _most_frequent(counts: dict[str, int]) -> str:
    """The first in code point order of those that stand most often."""
    return min(counts, key=lambda text: (-counts[text], text), default="")


def _counts(texts: pa.Array) -> dict[str, int]:
    return {pair["values"]: pair["counts"] for pair in texts.drop_null().value_counts().to_pylist()}


def _refuse_too_large(name: str, moments: Moments, is_target: bool = False) -> None:
    if not np.isfinite(moments.mean) or not np.isfinite(moments.spread):
        raise _too_large(name, moments, is_target)


def _too_large(name: str, moments: Moments, is_target: bool = False) -> UserError:
    rescale = f"such as data.derive: {{scaled: {name} / 1e200}}"
    return UserError(
        f"the numbers of column {name!r} are too large to be standardised",
        where="data.target" if is_target else "data.features",
        expected="squares within the range of a double, below 1e308",
        found=f"values from {moments.minimum:g} to {moments.maximum:g}",
        fix=f"predict a smaller number, {rescale}" if is_target else f"list it under data.features.drop, or {rescale}",
    )
