"""The split that a job asks for: what is refused, how the rows are divided, and what the user is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raylway.data import division, ordering, split
from raylway.data.csv_read import Reject
from raylway.data.division import Division, Plan, Told
from raylway.data.opening import Source
from raylway.data.ordering import Ordering
from raylway.errors import UserError
from raylway.features.prepared import SPLITS, Generation
from raylway.features.signature import Task
from raylway.job.load import LoadedJob


@dataclass(frozen=True)
class Rows:
    """The usable rows of all pieces."""

    order: Ordering
    tables: Sequence[pa.Table]
    """By piece (`ordering.ordered`)."""
    codes: list[list[int]]
    """By piece: its class codes in terms of all classes."""
    past: list[Generation]
    files: int


def divided(loaded: LoadedJob, task: Task, classes: list[str], rows: Rows) -> tuple[Division, Told]:
    """Divide all rows as the job says.

    Raises:
        UserError: The split does not fit the task, or there are too few rows, groups, instants or rows of a class.
    """
    order = rows.order
    by = loaded.job.data.split.by
    if by == "stratified" and task == "regression":
        raise UserError(
            "a stratified split needs classes",
            where=loaded.location("data.split.by"),
            expected="the task classification",
            found=f"the task is regression on {loaded.job.data.target!r}",
            fix="write data.split.by: random",
        )
    every = sum(table.num_rows for table in rows.tables)
    by_class = order.by == "rows" and by != "random" and task == "classification"
    shares = split.Shares(loaded.job.data.split.validation, loaded.job.data.split.test)

    def sizes_fit(sizes: np.ndarray) -> None:
        if by_class:
            copies = 0 if rows.past else every - int(sizes.sum())
            _refuse_small(loaded, classes, sizes, 2 if shares.held_out else 1, copies)
        if not order.is_given and not order.has_units and int(sizes.sum()) < 1 + shares.held_out:
            raise split.too_few(int(sizes.sum()), "rows", 1 + shares.held_out, loaded.location("data.split"))

    plan = Plan(
        order,
        classes if by_class else [""],
        by_class,
        classes,
        shares,
        loaded.job.data.clean.duplicates == "keep",
        rows.past,
        rows.files,
        loaded.location("data.split"),
    )
    return division.divide(rows.tables, [np.array(each, np.int32) for each in rows.codes], plan, sizes_fit)


def _refuse_small(loaded: LoadedJob, classes: list[str], sizes: np.ndarray, least: int, copies: int) -> None:
    small = [
        f"{name!r} ({size} row{'s' * int(size != 1)})"
        for name, size in zip(classes, sizes, strict=True)
        if size < least
    ]
    if small:
        raise UserError(
            f"a class of the target {loaded.job.data.target!r} has too few rows for a stratified split",
            where=loaded.location("data.split"),
            expected=f"at least {least} rows of each class",
            found=f"{', '.join(small[:5])}{' and more' if len(small) > 5 else ''}"
            + (f"; {copies:,} rows that equal others do not count" if copies else ""),
            fix="give more rows of it, leave the class out of the data, or write data.split.by: random",
        )


def check(loaded: LoadedJob, source: Source, types: dict[str, str], order: Ordering, refused: list[Reject]) -> None:
    """Whether every row and every instant of the job has a place in the split.

    Raises:
        UserError: One has none; the first is named.
    """
    kind = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
    places: list[np.uint64] = []
    for key in ("validation", "test") if order.by == "at" else ():
        text = getattr(order, key)
        place = ordering.instant(text, kind[types[order.column]]) if text else None
        if place is not None:
            places.append(place)
        elif text:
            raise UserError(
                f"{text!r} is no place in the column {order.column!r}",
                where=loaded.location(f"data.split.at.{key}"),
                expected="a date or time in ISO 8601, or a number if the column holds numbers",
                found=f"{text!r}; the column holds {'text' if types[order.column] == 'string' else 'numbers'}",
                fix="write a place as the column writes it",
            )
    if len(places) == 2 and not places[0] < places[1]:
        raise UserError(
            "the validation rows begin after the test rows",
            where=loaded.location("data.split.at.validation"),
            expected=f"a place before {order.test!r}",
            found=repr(order.validation),
            fix="swap them: the latest rows are for test",
        )
    if refused:
        first = min(refused, key=lambda reject: reject.row_id)
        raise UserError(
            f"column {first.column!r}: {first.reason}",
            where=source.places.of(first.row_id),
            expected="train, validation or test in every row"
            if order.by == "column"
            else "a number, or a date or time in ISO 8601, in every row",
            found=repr(first.cell[:200]),
            fix="correct the row, or split by something else with data.split",
        )


def nothing_to_train_on(loaded: LoadedJob, order: Ordering) -> UserError:
    """No row is on the training side."""
    if order.is_given:
        first = order.validation or order.test
        return UserError(
            "no row is left to train on: the source gives all rows to the other sides of the split",
            where=loaded.location("data.source.train" if order.by == "files" else "data.split"),
            expected=f"rows before {first!r}" if first else "rows of the side train",
            found="none that is complete",
            fix="write later places under data.split.at" if first else "give rows for training",
        )
    return UserError(
        "no row is left to train on: equal rows are kept and all fall on the other sides of the split",
        where=loaded.location("data.split"),
        expected="rows that differ",
        found="so many equal rows that they fill these sides",
        fix="set data.clean.duplicates: drop, or give validation and test smaller shares",
    )


def sentences(order: Ordering, told: Told, past: list[Generation]) -> list[str]:
    """What the user should know of the split."""
    said = []
    if order.has_units:
        what = "group" if order.by == "group" else "instant"
        said.append(f"rows of one {what} stay on one side, so the numbers of rows of a side are approximate")
    elif told.joined and not order.is_given:
        said.append("equal rows are kept on one side, so the numbers of rows of a side are approximate")
    for side, name in enumerate(SPLITS, 1):
        if told.moved[side]:
            said.append(
                f"{told.moved[side]:,} {name} rows are left out as duplicates: "
                "equal rows are on a side further held out"
            )
    if past:
        # only where the source says the sides can a new row be further held out than an old one that it equals
        but = ", but for those that are left out as duplicates" if any(told.moved) else ""
        said.append(f"the rows of the first {sum(each.files for each in past)} files keep their sides{but}")
    return said
