"""What each column is for: target, feature or neither; the task; and what the model's caller must send."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from raylway.errors import UserError
from raylway.features.derive import Derivation, derivation
from raylway.features.signature import Input, Signature, Task
from raylway.features.texts import Values
from raylway.job.load import LoadedJob

FEW_CLASSES = 20
"""A target of at most so many whole values is a class, if there are five rows a value or just two values."""
_NEARLY_ALL = 0.95
"""Texts that differ in more than this share of the rows name the rows."""
_MANY_TEXTS = 100
"""A column of text with more values than this, and different in more than half of the rows, is no category."""


@dataclass(frozen=True)
class Names:
    """The names that a job uses, checked against the columns of its source."""

    columns: list[str]
    """Of the source, in its order."""
    derive: dict[str, str]
    """Derived columns in an order in which each reads only source columns and earlier ones."""
    target: str
    target_sources: frozenset[str]
    """What the target derives from, directly or not; the target itself if it is a column of the source."""
    numeric: list[str]
    categorical: list[str]
    date: list[str]
    drop: list[str]
    split: str
    """The column that says the side or the group of a row; empty if there is none."""

    def reads(self, name: str) -> frozenset[str]:
        """The source columns behind a column: itself, if it is one."""
        return _behind(name, self.derive)[0]

    def derives(self, name: str) -> frozenset[str]:
        """The derived columns that must be computed for a column: none, if it is of the source."""
        return _behind(name, self.derive)[1]


def check_names(loaded: LoadedJob, columns: list[str]) -> Names:
    """Check every name in the data section.

    Raises:
        UserError: A name is unknown, the target is also a feature, or derived columns read each other in a circle.
    """
    data = loaded.job.data
    known = [*columns, *data.derive]
    for name in data.derive:
        if not name.strip():
            raise UserError("a derived column has no name", where=loaded.location("data.derive"), fix="give it one")
        if name in columns:
            raise UserError(
                f"the derived column {name!r} is a column of the source already",
                where=loaded.location(f"data.derive.{name}"),
                fix="give it another name",
            )
    derive = _ordered(loaded, columns)
    _check_known([data.target], known, loaded.location("data.target"), "the target")
    lists = {key: getattr(data.features, key) for key in ("numeric", "categorical", "date", "drop")}
    for key, names in lists.items():
        among = columns if key == "date" else known
        _check_known(names, among, loaded.location(f"data.features.{key}"), f"a column of features.{key}")
    for name in data.transform.columns:
        _check_known([name], known, loaded.location(f"data.transform.columns.{name}"), "a key of transform.columns")
    direct, through = _behind(data.target, derive)
    hidden = direct | through
    for key in ("numeric", "categorical", "date"):
        for name in lists[key]:
            if name in hidden:
                why = (
                    "is the target"
                    if name == data.target
                    else f"gives the target {data.target!r} away: it derives from it"
                )
                raise UserError(
                    f"the feature {name!r} {why}",
                    where=loaded.location(f"data.features.{key}"),
                    fix=f"take it out of features.{key}",
                )
    column = data.split.column
    if column:
        _check_known([column], known, loaded.location("data.split.column"), "a column of the split")
    says_side = data.split.by in ("group", "column") and column not in (*lists["numeric"], *lists["categorical"])
    return Names(columns, derive, data.target, frozenset(hidden), **lists, split=column if column and says_side else "")


@dataclass(frozen=True)
class Roles:
    """The features, in the order of the model's inputs."""

    numeric: list[str]
    categorical: list[str]
    date: list[str]
    derive: dict[str, str]
    """Only what the features need, in order."""
    sentences: list[str]
    unused: dict[str, tuple[str, str]]
    """Columns that are no feature for what they look like: role (text, identifier), and why."""


def choose_features(
    names: Names,
    types: dict[str, str],
    texts: dict[str, int],
    rows: int,
    empty: Iterable[str],
    dates: Iterable[str],
    where: str,
) -> Roles:
    """Which columns feed the model, and as what.

    Args:
        names: Checked names.
        types: Type of every source column and derived column.
        texts: Number of different values of each column of text.
        rows: Kept rows.
        empty: Columns without a present cell.
        dates: Columns of text whose cells are dates.
        where: For messages.

    Raises:
        UserError: No feature is left.
    """
    numeric, categorical, date, sentences = [], [], [], []
    unused: dict[str, tuple[str, str]] = {}
    for name in [*names.columns, *names.derive]:
        behind, through = _behind(name, names.derive)
        leaks = sorted((behind | through) & names.target_sources)
        if name in names.drop or name == names.target:
            continue
        if leaks:
            sentences.append(f"column {name!r} is no feature: the target {names.target!r} derives from {leaks[0]!r}")
        elif name == names.split:
            sentences.append(f"column {name!r} is no feature: the rows are split by it")
        elif name in empty:
            sentences.append(f"column {name!r} is no feature: it is empty in every row")
        elif name in names.date:
            _refuse_no_dates(name, types[name], where)
            date.append(name)
        elif name in names.numeric or (name not in names.categorical and types[name] in ("int64", "float64")):
            numeric.append(name)
        elif name in dates and name in names.columns and name not in names.categorical:
            date.append(name)
            sentences.append(
                f"column {name!r} holds dates: its instant and its parts are features; list it under "
                "features.categorical or features.drop to have it otherwise"
            )
        elif name in names.categorical or texts.get(name, 0) <= max(_MANY_TEXTS, rows / 2):
            categorical.append(name)
        else:
            role = "identifier" if texts[name] > _NEARLY_ALL * rows else "text"
            unused[name] = role, f"about {texts[name]:,} different texts in {rows:,} rows"
            sentences.append(
                f"column {name!r} is no feature: about {texts[name]:,} different texts in {rows:,} rows are no "
                "categories but identifiers or free text; list it under features.categorical to use it"
            )
    if not numeric and not categorical and not date:
        raise UserError(
            "no column is left to be a feature",
            where=where,
            found="; ".join(sentences) or f"columns: {', '.join(names.columns)}",
            fix="drop fewer columns, or list one under data.features.numeric, categorical or date",
        )
    _refuse_derived_from_truth_values([*numeric, *categorical], names, types, where)
    needed = frozenset().union(*(names.derives(name) for name in (*numeric, *categorical)))
    derive = {name: text for name, text in names.derive.items() if name in needed}
    return Roles(numeric, categorical, date, derive, sentences, unused)


def signature(
    names: Names,
    roles: Roles,
    types: dict[str, str],
    task: Task,
    classes: list[str],
    required: bool,
    missing: list[str],
) -> Signature:
    """What a row must hold to be answered: the source columns behind the features.

    Args:
        names: Checked names.
        roles: The features.
        types: Type of every source column.
        task: What the model does.
        classes: Class names in order.
        required: Whether a row must hold all of them; a job that imputes fills whatever is missing.
        missing: Further texts and numbers that are missing cells.
    """
    computed = frozenset().union(*(names.reads(name) for name in roles.derive))
    direct = {*roles.numeric, *roles.categorical, *roles.date}
    inputs = []
    for name in names.columns:
        if name in direct or name in computed:
            is_number = name in roles.numeric or (types[name] in ("int64", "float64") and name not in roles.categorical)
            is_number |= name in computed and types[name] in ("int64", "float64")
            kind: Literal["number", "category", "date"] = "number" if is_number else "category"
            values: Values = {"string": "text", "bool": "boolean"}.get(types[name], "number")  # type: ignore[assignment]
            inputs.append(Input(name, "date" if name in roles.date else kind, required, values))
    return Signature(task, names.target, inputs, classes, missing)


def infer_task(asked: str, kind: str, whole: bool, values: int, rows: int) -> tuple[Task, str]:
    """The task, and the sentence that says why.

    Args:
        asked: The job's `task`.
        kind: Type of the target.
        whole: Whether a numeric target has only whole values.
        values: How many different values it has; more than `FEW_CLASSES` may be given as any such number.
        rows: Rows with a target.
    """
    if asked != "auto":
        return ("regression" if asked == "regression" else "classification"), ""
    if kind in ("string", "bool"):
        return (
            "classification",
            f"the task is classification: the target is {'text' if kind == 'string' else 'true or false'}",
        )
    if whole and (values <= 2 or (values <= FEW_CLASSES and values * 5 <= rows)):
        return (
            "classification",
            f"the task is classification: the target has {values} whole values (task: regression overrides)",
        )
    return "regression", "the task is regression: the target is a number"


def _refuse_no_dates(name: str, kind: str, where: str) -> None:
    if kind != "string":
        raise UserError(
            f"the column {name!r} does not hold dates",
            where=where,
            expected="text such as 2013-01-01 or 2013-01-01T05:00:00Z, or a column of dates or timestamps",
            found="true and false" if kind == "bool" else "numbers",
            fix="take it out of data.features.date",
        )


def _refuse_derived_from_truth_values(features: list[str], names: Names, types: dict[str, str], where: str) -> None:
    """A served row holds numbers and text only, so an expression over true and false can't be computed for it."""
    for name in features:
        if unfit := [read for read in sorted(names.reads(name)) if name in names.derive and types[read] == "bool"]:
            raise UserError(
                f"the feature {name!r} derives from {unfit[0]!r}, which holds true and false",
                where=where,
                expected="features derived from numbers and text",
                fix=f"use {unfit[0]!r} itself, or write it as 0 and 1 in the source",
            )


def _ordered(loaded: LoadedJob, columns: list[str]) -> dict[str, str]:
    """Derived columns sorted so that each reads only earlier ones; ties keep the order of the job file."""
    waiting: dict[str, Derivation] = {
        name: derivation(text, loaded.location(f"data.derive.{name}")) for name, text in loaded.job.data.derive.items()
    }
    for name, expression in waiting.items():
        place = loaded.location(f"data.derive.{name}")
        _check_known(sorted(expression.columns), [*columns, *waiting], place, f"a column of {expression.text!r}")
    done: dict[str, str] = {}
    while waiting:
        ready = next((name for name, expression in waiting.items() if not expression.columns & waiting.keys()), None)
        if ready is None:
            raise UserError(
                "derived columns read each other in a circle",
                where=loaded.location("data.derive"),
                found=", ".join(waiting),
            )
        done[ready] = waiting.pop(ready).text
    return done


def _behind(name: str, derive: dict[str, str]) -> tuple[frozenset[str], frozenset[str]]:
    """The source columns that a column is or reads, and the derived columns on the way, itself included."""
    if name not in derive:
        return frozenset({name}), frozenset()
    source: frozenset[str] = frozenset()
    through = frozenset({name})
    for read in derivation(derive[name]).columns:
        direct, further = _behind(read, derive)
        source |= direct
        through |= further
    return source, through


def _check_known(names: list[str], known: list[str], where: str, what: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"there is no column {name!r}",
                where=where,
                expected=f"{what} to be one of: {', '.join(known[:40])}{' ...' if len(known) > 40 else ''}",
                found=name,
                fix=f"did you mean {near[0]!r}?" if near else "name one of the columns",
            )
