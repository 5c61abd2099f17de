"""All pieces' findings together: the task, the classes, the features, and the side of every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raylway.data import sides
from raylway.data.assessment import (
    Columns,
    Counted,
    Found,
    columns_of,
    comma_hint,
    ordering_of,
    unfit_target,
)
from raylway.data.clean import Assessed, Rules
from raylway.data.columns import Seen
from raylway.data.describe import Described
from raylway.data.division import Division
from raylway.data.opening import Source, no_rows
from raylway.data.roles import FEW_CLASSES, Names, Roles, choose_features, infer_task, signature
from raylway.data.treated import fit_plan, ineffective
from raylway.data.warnings import Subject
from raylway.errors import UserError
from raylway.features.plan import FitPlan
from raylway.features.prepared import SPLITS, Account, Generation, SplitName
from raylway.features.schema import sorted_names
from raylway.features.signature import Signature, Task
from raylway.job.load import LoadedJob


@dataclass(frozen=True)
class Outcome:
    """What preparation decided before anything is encoded."""

    task: Task
    classes: list[str]
    roles: Roles
    plan: FitPlan
    signature: Signature
    account: Account
    by_class: dict[SplitName, list[int]]
    division: Division
    per_piece: list[np.ndarray]
    """By piece: rows by side (`split`) and class, int64 [4, classes]."""
    types: dict[str, str]
    distinct: dict[str, int]
    """Different values of each column of text."""
    sentences: list[str]
    described: Described
    """All columns over all rows that could be read."""


@dataclass(frozen=True)
class Pieces:
    """All pieces, assessed."""

    found: list[Found]
    columns: Columns
    tables: Sequence[pa.Table]
    """By piece (`ordering.ordered`)."""
    count: Callable[[Division, list[list[int]]], list[Counted]]
    """Counts the rows of every piece, once the division and each piece's class codes are known."""


def conclude(
    loaded: LoadedJob,
    source: Source,
    names: Names,
    rules: Rules,
    seen: dict[str, Seen],
    pieces: Pieces,
    past: list[Generation] | None = None,
) -> Outcome:
    """Decide over all rows.

    Args:
        loaded: The job.
        source: Its source.
        names: Its names.
        rules: What the pieces were held to.
        seen: What the whole data holds, by column.
        pieces: All of them, in order.
        past: The generations that this data continues.

    Raises:
        UserError: Too many rows are invalid, none is left, the target does not fit the task, or a class is too small.
    """
    found = pieces.found
    quarantined = _allow_rejects(loaded, source, found)
    rows = sum(each.usable for each in found)
    if not rows:
        raise _nothing_left(loaded, source, found)
    types = rules.types | derived_types(rules, [each.assessed for each in found])
    order = ordering_of(loaded, source)
    sides.check(loaded, source, types, order, [each.refused for each in found if each.refused])
    task, why, classes = _target(loaded, names, types, found, rows)
    position = {name: index for index, name in enumerate(classes)}
    codes = [[position[value] for value in each.assessed.values] if classes else [] for each in found]
    rows_of_all = sides.Rows(order, pieces.tables, codes, past or [], len(source.files))
    divided, told = sides.divided(loaded, task, classes, rows_of_all)
    per_piece = [np.array(each.counts, np.int64) for each in pieces.count(divided, codes)]
    totals = np.sum(per_piece, axis=0)
    per_side = {name: int(totals[side].sum()) for side, name in enumerate(SPLITS, 1)}
    if not per_side["train"]:
        raise sides.nothing_to_train_on(loaded, order)
    account = Account(
        read=sum(each.assessed.read for each in found),
        kept=told.kept,
        missing=sum(each.assessed.missing for each in found),
        duplicates=rows - told.kept,
        quarantined=quarantined,
        **per_side,
    )
    by_class: dict[SplitName, list[int]] = {
        name: totals[side].tolist() if classes else [] for side, name in enumerate(SPLITS, 1)
    }
    different = _distinct(types, pieces.columns)
    empty = empty_columns(seen)
    where = loaded.location("data.features")
    roles = choose_features(names, types, different, account.kept, empty, rules.dates, where)
    plan = fit_plan(loaded, names, roles, task, classes)
    sentences = [why] * bool(why) + roles.sentences + ineffective(loaded, roles)
    sentences += _absences(names.target, classes, by_class)
    return Outcome(
        task,
        classes,
        roles,
        plan,
        signature(names, roles, types, task, classes, rules.drop_missing, loaded.job.data.read.missing_words),
        account,
        by_class,
        divided,
        per_piece,
        types,
        different,
        sentences + sides.sentences(order, told, past or []),
        pieces.columns.described,
    )


@dataclass(frozen=True)
class Preview:
    """What some rows suggest; the whole data may decide otherwise."""

    task: Task
    classes: list[str]
    roles: Roles
    distinct: dict[str, int]
    usable: int
    sentences: list[str]
    described: Described


def preview(loaded: LoadedJob, names: Names, rules: Rules, seen: dict[str, Seen], found: list[Found]) -> Preview:
    """As `conclude`, from some rows, raising only what further rows can't mend.

    Raises:
        UserError: The target does not fit the task, or no feature is left.
    """
    rows = sum(each.usable for each in found)
    types = rules.types | derived_types(rules, [each.assessed for each in found])
    task, why, classes = _target(loaded, names, types, found, rows, whole_data=False)
    columns = columns_of(found)
    different = _distinct(types, columns)
    empty = empty_columns(seen)
    where = loaded.location("data.features")
    roles = choose_features(names, types, different, rows, empty, rules.dates, where)
    fit_plan(loaded, names, roles, task, classes)
    sentences = [why] * bool(why) + roles.sentences + ineffective(loaded, roles)
    return Preview(task, classes, roles, different, rows, sentences, columns.described)


def derived_types(rules: Rules, pieces: list[Assessed]) -> dict[str, str]:
    """The type of each derived column, over all pieces.

    Raises:
        UserError: A user's function gives text in one piece and numbers in another.
    """
    types: dict[str, str] = {}
    for name in rules.derive:
        kinds = sorted({piece.derived_types[name] for piece in pieces} - {"null"})
        if len(kinds) > 1:
            raise UserError(
                f"the derived column {name!r} has no one type",
                where=rules.places[name],
                expected="text, numbers or truth values in every part of the data",
                found=" and ".join(kinds),
                fix="let the function return one type",
            )
        types[name] = kinds[0] if kinds else "float64"
    return types


def subject(loaded: LoadedJob, names: Names, found: Outcome | Preview) -> Subject:
    """What `warnings` looks at; of a part of the data the sides of the split are not known, so no class is counted."""
    by = loaded.job.data.split.by
    return Subject(
        found.described.columns,
        found.roles.numeric,
        found.roles.categorical,
        names.target,
        found.task,
        dict(zip(found.classes, found.by_class["train"], strict=True)) if isinstance(found, Outcome) else {},
        ("class" if found.classes else "chance") if by == "auto" else by,
        names.drop,
        found.roles.date,
    )


def _allow_rejects(loaded: LoadedJob, source: Source, found: list[Found]) -> int:
    """How many rows are invalid, if the job lets so many pass."""
    rejects = [reject for each in found for reject in each.assessed.rejects]
    read = sum(each.assessed.read for each in found)
    invalid = sum(each.invalid for each in found)
    if not read:
        raise no_rows(loaded.location("data.source"), ", ".join(source.files[:5]))
    clean = loaded.job.data.clean
    if rejects and (clean.invalid == "error" or invalid > clean.max_invalid * read):
        first = rejects[0]
        limit = "none" if clean.invalid == "error" else f"at most {100 * clean.max_invalid:.4g}% of the rows"
        column = f"column {first.column!r}: " if first.column else ""
        places = "; ".join(source.places.of(reject.row_id) for reject in rejects[1:4])
        raise UserError(
            f"{column}{first.reason}",
            where=source.places.of(first.row_id),
            expected=f"invalid rows: {limit}",
            found=f"{invalid} of {read}; here: {first.cell[:200]!r}" + (f"; also {places}" if places else ""),
            fix="correct the rows, or let more of them go to quarantine with data.clean.invalid and max_invalid"
            + comma_hint(first.cell),
        )
    return invalid


def _nothing_left(loaded: LoadedJob, source: Source, found: list[Found]) -> UserError:
    empty: Counter[str] = Counter()
    for each in found:
        empty.update(each.assessed.missing_by)
    most = ", ".join(f"{name} ({count})" for name, count in empty.most_common(3))
    read = sum(each.assessed.read for each in found)
    imputes = loaded.job.data.clean.missing == "impute"
    return UserError(
        "no row is left to train on: each misses a cell or is invalid",
        where=loaded.location("data.source"),
        found=f"{read} rows read; empty cells by column: {most or 'none'}",
        fix="choose a target that has values"
        if imputes
        else "take the emptiest columns out of the source, or set data.clean.missing: impute",
    )


def _target(
    loaded: LoadedJob, names: Names, types: dict[str, str], found: list[Found], rows: int, whole_data: bool = True
) -> tuple[Task, str, list[str]]:
    """Task, the sentence about it, and the classes."""
    pieces = [each.assessed for each in found]
    known = {value for piece in pieces for value in piece.values}
    named = all(each.assessed.values or not each.usable for each in found)
    whole = all(piece.whole for piece in pieces)
    task, why = infer_task(loaded.job.task, types[names.target], whole, len(known) if named else FEW_CLASSES + 1, rows)
    if task == "regression":
        if types[names.target] in ("string", "bool"):
            what = "text" if types[names.target] == "string" else "true or false"
            raise unfit_target(loaded, names.target, what, ", ".join(sorted(known)[:3]) or what)
        return task, why, []
    classes = sorted_names(known)
    if len(classes) < 2 and whole_data:
        raise UserError(
            f"the target {names.target!r} has a single class",
            where=loaded.location("data.target"),
            expected="two classes or more",
            found=f"{classes[0]!r} in all of {rows} rows",
            fix="choose another target or data that holds the other classes",
        )
    return task, why, classes


def _distinct(types: dict[str, str], columns: Columns) -> dict[str, int]:
    """How many different values each column of text has."""
    return {name: columns.distinct.get(name, 0) for name, kind in types.items() if kind == "string"}


def empty_columns(seen: dict[str, Seen]) -> list[str]:
    """Columns without a present cell."""
    return [name for name, column in seen.items() if column.stored == ["null"]]


def _absences(target: str, classes: list[str], by_class: dict[SplitName, list[int]]) -> list[str]:
    sentences = []
    for side, counts in by_class.items():
        absent = [repr(name) for name, count in zip(classes, counts, strict=True) if not count]
        if absent and sum(counts):
            consequence = "the model never learns it" if side == "train" else f"the {side} metrics say nothing about it"
            sentences.append(f"no {side} row has the {target} {', '.join(absent[:5])}: {consequence}")
    return sentences
