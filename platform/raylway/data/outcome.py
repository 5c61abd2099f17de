"""All pieces' findings together: the task, the classes, the features, and the side of every row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raylway.data import describe, split
from raylway.data.clean import Assessed, Rules, distinct
from raylway.data.columns import Seen
from raylway.data.csv_read import Reject
from raylway.data.decide import Places, Types, decide
from raylway.data.describe import Described
from raylway.data.opening import Source, no_rows
from raylway.data.roles import FEW_CLASSES, Names, Roles, choose_features, infer_task, signature
from raylway.data.warnings import Subject
from raylway.errors import UserError
from raylway.features.prepared import SPLITS, Account, SplitName
from raylway.features.schema import sorted_names
from raylway.features.signature import Signature, Task
from raylway.job.load import LoadedJob


@dataclass(frozen=True)
class Outcome:
    """What preparation decided before anything is encoded."""

    task: Task
    classes: list[str]
    roles: Roles
    signature: Signature
    account: Account
    by_class: dict[SplitName, list[int]]
    sides: list[np.ndarray]
    """By piece: int8 [rows of the piece], the side of each row (`split`)."""
    distinct: dict[str, int]
    """Different values of each column of text."""
    rejects: list[Reject]
    sentences: list[str]
    described: Described
    """All columns over all rows that could be read."""


def rules_of(loaded: LoadedJob, names: Names, types: Types) -> Rules:
    """What the pieces' rows are held to, once the types are decided."""
    clean = loaded.job.data.clean
    target_type = types.of.get(names.target, "")
    certain = loaded.job.task == "classification" or target_type in ("string", "bool")
    classes: Literal["all", "few", "none"] = "all" if certain or names.target in names.derive else "few"
    if loaded.job.task == "regression":
        classes = "none"
    hidden = [name for name in names.derive if name in names.drop and name not in names.target_sources]
    return Rules(
        types=types.of,
        derive=names.derive,
        places={name: loaded.location(f"data.derive.{name}") for name in names.derive},
        target=names.target,
        target_sources=sorted(names.target_sources),
        unused=hidden,
        drop_missing=clean.missing == "drop",
        infinite_is_missing=clean.infinite == "missing",
        classes=classes,
    )


def conclude(
    loaded: LoadedJob, source: Source, names: Names, rules: Rules, seen: dict[str, Seen], pieces: list[Assessed]
) -> Outcome:
    """Decide over all rows.

    Args:
        loaded: The job.
        source: Its source.
        names: Its names.
        rules: What the pieces were held to.
        seen: What the whole data holds, by column.
        pieces: All of them, in order.

    Raises:
        UserError: Too many rows are invalid, none is left, the target does not fit the task, or a class is too small.
    """
    rejects = _allowed_rejects(loaded, source, pieces)
    usable = [np.frombuffer(piece.usable, bool) for piece in pieces]
    rows = sum(int(mask.sum()) for mask in usable)
    if not rows:
        raise _nothing_left(loaded, source, pieces)
    types = rules.types | pieces[0].derived_types
    task, why, classes, codes = _target(loaded, names, types, pieces, rows)
    kept, approximate = _sides(loaded, task, names, classes, codes, pieces)
    per_side = {name: int((kept == side).sum()) for side, name in enumerate(SPLITS, 1)}
    account = Account(
        read=sum(piece.read for piece in pieces),
        kept=sum(per_side.values()),
        missing=sum(piece.missing for piece in pieces),
        duplicates=rows - sum(per_side.values()),
        quarantined=len(rejects),
        **per_side,
    )
    by_class: dict[SplitName, list[int]] = {
        name: np.bincount(codes[kept == side], minlength=len(classes)).tolist() if classes else []
        for side, name in enumerate(SPLITS, 1)
    }
    different = _distinct(types, pieces)
    empty = empty_columns(seen)
    roles = choose_features(names, types, different, account.kept, empty, loaded.location("data.features"))
    sentences = [why] * bool(why) + roles.sentences + _absences(names.target, classes, by_class) + approximate
    return Outcome(
        task,
        classes,
        roles,
        signature(names, roles, types, task, classes, required=rules.drop_missing),
        account,
        by_class,
        _by_piece(usable, kept),
        different,
        rejects,
        sentences,
        describe.merged(piece.described for piece in pieces),
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


def preview(loaded: LoadedJob, names: Names, rules: Rules, seen: dict[str, Seen], pieces: list[Assessed]) -> Preview:
    """As `conclude`, from some rows, raising only what further rows can't mend.

    Raises:
        UserError: The target does not fit the task, or no feature is left.
    """
    rows = sum(int(np.frombuffer(piece.usable, bool).sum()) for piece in pieces)
    types = rules.types | pieces[0].derived_types
    task, why, classes, _ = _target(loaded, names, types, pieces, rows, whole_data=False)
    different = _distinct(types, pieces)
    empty = empty_columns(seen)
    roles = choose_features(names, types, different, rows, empty, loaded.location("data.features"))
    described = describe.merged(piece.described for piece in pieces)
    return Preview(task, classes, roles, different, rows, [why] * bool(why) + roles.sentences, described)


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
    )


def merged(parts: list[dict[str, Seen]]) -> dict[str, Seen]:
    """What all pieces saw, by column; `parts` in the order of the rows."""
    result = dict(parts[0])
    for part in parts[1:]:
        for name, column in part.items():
            result[name] = result[name].merged(column)
    return result


def types_of(loaded: LoadedJob, names: Names, seen: dict[str, Seen], places: Places) -> Types:
    """The types of all columns; a regression's target is a number whatever it looks like."""
    numeric = set(names.numeric)
    if loaded.job.task == "regression" and names.target in seen and "text" in seen[names.target].sources:
        column = seen[names.target]
        if column.bad > loaded.job.data.clean.max_invalid * column.present:
            raise _text_target(loaded, names.target, places.cell(column.first_bad) if column.first_bad else "text")
        numeric.add(names.target)
    return decide(seen, numeric, loaded.job.data.clean, places)


def _allowed_rejects(loaded: LoadedJob, source: Source, pieces: list[Assessed]) -> list[Reject]:
    """The rejected rows in order, if the job lets so many pass."""
    rejects = [reject for piece in pieces for reject in piece.rejects]
    read = sum(piece.read for piece in pieces)
    if not read:
        raise no_rows(loaded.location("data.source"), ", ".join(source.files[:5]))
    clean = loaded.job.data.clean
    if rejects and (clean.invalid == "error" or len(rejects) > clean.max_invalid * read):
        first = rejects[0]
        limit = "none" if clean.invalid == "error" else f"at most {100 * clean.max_invalid:.4g}% of the rows"
        column = f"column {first.column!r}: " if first.column else ""
        places = "; ".join(source.places.of(reject.row_id) for reject in rejects[1:4])
        raise UserError(
            f"{column}{first.reason}",
            where=source.places.of(first.row_id),
            expected=f"invalid rows: {limit}",
            found=f"{len(rejects)} of {read}; here: {first.cell[:200]!r}" + (f"; also {places}" if places else ""),
            fix="correct the rows, or let more of them go to quarantine with data.clean.invalid and max_invalid",
        )
    return rejects


def _nothing_left(loaded: LoadedJob, source: Source, pieces: list[Assessed]) -> UserError:
    empty: Counter[str] = Counter()
    for piece in pieces:
        empty.update(piece.missing_by)
    most = ", ".join(f"{name} ({count})" for name, count in empty.most_common(3))
    read = sum(piece.read for piece in pieces)
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
    loaded: LoadedJob, names: Names, types: dict[str, str], pieces: list[Assessed], rows: int, whole_data: bool = True
) -> tuple[Task, str, list[str], np.ndarray]:
    """Task, the sentence about it, classes, and the class code of each usable row (int32)."""
    known = {value for piece in pieces for value in piece.values}
    named = all(piece.values or not piece.hashes for piece in pieces)
    whole = all(piece.whole for piece in pieces)
    task, why = infer_task(loaded.job.task, types[names.target], whole, len(known) if named else FEW_CLASSES + 1, rows)
    if task == "regression":
        if types[names.target] == "string":
            raise _text_target(loaded, names.target, ", ".join(sorted(known)[:3]) or "text")
        return task, why, [], np.zeros(rows, np.int32)
    classes = sorted_names(known)
    if len(classes) < 2 and whole_data:
        raise UserError(
            f"the target {names.target!r} has a single class",
            where=loaded.location("data.target"),
            expected="two classes or more",
            found=f"{classes[0]!r} in all of {rows} rows",
            fix="choose another target or data that holds the other classes",
        )
    position = {name: index for index, name in enumerate(classes)}
    codes = [
        np.array([position[value] for value in piece.values], np.int32)[np.frombuffer(piece.codes, np.int32)]
        for piece in pieces
        if piece.values
    ]
    return task, why, classes, np.concatenate(codes) if codes else np.zeros(0, np.int32)


def _sides(
    loaded: LoadedJob, task: Task, names: Names, classes: list[str], codes: np.ndarray, pieces: list[Assessed]
) -> tuple[np.ndarray, list[str]]:
    """The side of each usable row (int8, `split`; left out: a duplicate), and a sentence if counts are approximate."""
    hashes = np.concatenate([np.frombuffer(piece.hashes, np.uint64).reshape(-1, 2) for piece in pieces])
    keep = split.first_of_equal(hashes)
    approximate = []
    if loaded.job.data.clean.duplicates == "keep" and not keep.all():
        approximate = ["equal rows are kept on one side, so the numbers of rows of a side are approximate"]
        keep[:] = True
    strata = _strata(loaded, task, names, classes, codes[keep])
    shares = split.Shares(loaded.job.data.split.validation, loaded.job.data.split.test)
    if len(strata) < 1 + shares.held_out:
        raise UserError(
            f"{len(strata)} rows can't be divided into training, validation and test rows",
            where=loaded.location("data.split"),
            fix="give more rows, or set validation or test to 0%",
        )
    sides = np.zeros(len(hashes), np.int8)
    sides[keep] = split.divide(hashes[keep], strata, shares, loaded.job.seed)
    if not (sides == split.TRAIN).any():
        raise UserError(
            "no row is left to train on: equal rows are kept and all fall on the other sides of the split",
            where=loaded.location("data.split"),
            fix="set data.clean.duplicates: drop, or give validation and test smaller shares",
        )
    return sides, approximate


def _strata(loaded: LoadedJob, task: Task, names: Names, classes: list[str], codes: np.ndarray) -> np.ndarray:
    by = loaded.job.data.split.by
    if by == "stratified" and task == "regression":
        raise UserError(
            "a stratified split needs classes",
            where=loaded.location("data.split.by"),
            found=f"the task is regression on {names.target!r}",
            fix="write data.split.by: random",
        )
    if by == "random" or task == "regression":
        return np.zeros(len(codes), np.int32)
    sizes = np.bincount(codes, minlength=len(classes))
    shares = split.Shares(loaded.job.data.split.validation, loaded.job.data.split.test)
    least = 2 if shares.held_out else 1
    small = [
        f"{name!r} ({size} row{'s' * int(size != 1)})"
        for name, size in zip(classes, sizes, strict=True)
        if size < least
    ]
    if small:
        raise UserError(
            f"a class of the target {names.target!r} has too few rows for a stratified split",
            where=loaded.location("data.split"),
            expected=f"at least {least} rows of each class",
            found=f"{', '.join(small[:5])}{' and more' if len(small) > 5 else ''}",
            fix="give more rows of it, leave the class out of the data, or write data.split.by: random",
        )
    return codes


def _distinct(types: dict[str, str], pieces: list[Assessed]) -> dict[str, int]:
    """How many different values each column of text has."""
    texts = [name for name, kind in types.items() if kind == "string"]
    return {
        name: distinct([np.frombuffer(piece.texts[name], np.uint64) for piece in pieces if name in piece.texts])
        for name in texts
    }


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


def _by_piece(usable: list[np.ndarray], kept: np.ndarray) -> list[np.ndarray]:
    sides, start = [], 0
    for mask in usable:
        count = int(mask.sum())
        side = np.zeros(len(mask), np.int8)
        side[mask] = kept[start : start + count]
        sides.append(side)
        start += count
    return sides


def _text_target(loaded: LoadedJob, target: str, found: str) -> UserError:
    return UserError(
        f"the target {target!r} is text, which regression can't predict",
        where=loaded.location("data.target"),
        expected="a column of numbers",
        found=found,
        fix="choose a numeric target, or task: classification",
    )
