"""Which rows are duplicates, and on which side each row falls: over all pieces, one part of the keys after the other.

Pieces are sorted by `key` (`ordering`), so the rows of a range of keys are a slice of each piece; equal rows share
their key, and so do rows that must stay together. A few ranges, each of about `BUCKET_ROWS` rows, are in memory at a
time. What remains is small: the cuts (where in the order test and validation end, by stratum), and a list of the rows
that are left out or belong to an earlier generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pyarrow as pa

from raylway.data import engine, split
from raylway.data.ordering import Ordering
from raylway.data.split import OUT, TEST, TRAIN, VALIDATION, Shares
from raylway.features.prepared import LINE_BITS, Cut, Generation

BUCKET_ROWS = 1 << 20
_EVERY = 256
_ALL = np.uint64(2**64 - 1)
_NONE = -1


class Exceptions(msgspec.Struct, frozen=True):
    """Rows that do not go where their file's generation and their key say, in the order of their ids."""

    rows: bytes
    """uint64 row ids."""
    firsts: bytes
    """uint64: of a duplicate, the row that it repeats; 0 of others."""
    where: bytes
    """int16: the generation whose cuts hold for the row; -1: left out."""

    @classmethod
    def of(cls, rows: np.ndarray, firsts: np.ndarray, where: np.ndarray) -> Exceptions:
        order = np.argsort(rows)
        return cls(rows[order].tobytes(), firsts[order].tobytes(), where[order].astype(np.int16).tobytes())

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return (
            np.frombuffer(self.rows, np.uint64),
            np.frombuffer(self.firsts, np.uint64),
            np.frombuffer(self.where, np.int16),
        )

    def between(self, first: int, last: int) -> Exceptions:
        """Those of the rows from `first` to `last`."""
        rows, firsts, where = self.arrays()
        low = np.searchsorted(rows, np.uint64(first))
        high = np.searchsorted(rows, np.uint64(last), side="right")
        part = slice(low, high)
        return Exceptions(rows[part].tobytes(), firsts[part].tobytes(), where[part].tobytes())


class Division(msgspec.Struct, frozen=True):
    """The side of every row as a function of its words."""

    ordering: Ordering
    strata: list[str]
    """Names of the strata: the classes, or one without a name."""
    by_class: bool
    classes: list[str]
    """All classes, whether or not they are strata."""
    generations: list[Generation]
    exceptions: Exceptions


@dataclass
class Told:
    """What the buckets say together."""

    kept: int = 0
    joined: int = 0
    """Rows that equal an earlier one and stay."""
    moved: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """Rows left out because an equal one is on a side further held out, by their own side."""

    def add(self, other: Told) -> None:
        self.kept += other.kept
        self.joined += other.joined
        self.moved = [a + b for a, b in zip(self.moved, other.moved, strict=True)]


@dataclass(frozen=True)
class Plan:
    """What is to be divided, and how."""

    ordering: Ordering
    strata: list[str]
    by_class: bool
    classes: list[str]
    shares: Shares
    keep: bool
    """Whether equal rows stay."""
    past: list[Generation]
    files: int
    where: str
    """In the job file, for messages."""

    @property
    def starts(self) -> np.ndarray:
        """First row id of each generation."""
        counts = np.cumsum([0, *(each.files for each in self.past)]).astype(np.uint64)
        return counts << np.uint64(LINE_BITS)


def divide(
    tables: Sequence[pa.Table], codes: list[np.ndarray], plan: Plan, sizes_fit: Callable[[np.ndarray], None]
) -> tuple[Division, Told]:
    """Divide all rows.

    Args:
        tables: By piece (`ordering.ordered`).
        codes: By piece: its class codes in terms of all classes.
        plan: What is asked.
        sizes_fit: Called with the number of kept rows by stratum, for the first generation only; raises if too few.

    Raises:
        UserError: There are too few rows, groups or instants.
    """
    buckets = _Buckets(tables, codes, plan)
    sizes, told, exceptions = [], Told(), []
    for size, listed, one in engine.side_by_side(lambda number: buckets[number].summary(), range(len(buckets))):
        sizes.append(size)
        exceptions.append(listed)
        told.add(one)
    table = np.array(sizes)
    if not plan.past:
        sizes_fit(table.sum(axis=0))
    found = Exceptions.of(*(np.concatenate(part) for part in zip(*exceptions, strict=True)))
    inherits = plan.ordering.is_given or (plan.ordering.by == "time" and bool(plan.past))
    cuts = {} if inherits else _cuts(buckets, table, plan)
    files = plan.files - sum(each.files for each in plan.past)
    generations = [*plan.past, *([Generation(files, cuts)] if files or not plan.past else [])]
    return Division(plan.ordering, plan.strata, plan.by_class, plan.classes, generations, found), told


def sides(table: pa.Table, codes: np.ndarray, division: Division, exceptions: Exceptions) -> np.ndarray:
    """The side of each row of a table (`ordering.ordered`), int8.

    Args:
        table: The rows of one piece.
        codes: Its class codes in terms of all classes.
        division: Of the whole data; its own exceptions are not looked at.
        exceptions: Those of the piece's rows.
    """
    rows = table["row"].to_numpy()
    starts = np.cumsum([0, *(each.files for each in division.generations[:-1])]).astype(np.uint64)
    where = (np.searchsorted(starts << np.uint64(LINE_BITS), rows, side="right") - 1).astype(np.int16)
    listed, _, told = exceptions.arrays()
    if len(listed):
        at = np.minimum(np.searchsorted(listed, rows), len(listed) - 1)
        hit = listed[at] == rows
        where[hit] = told[at[hit]]
    if division.ordering.is_given:
        return np.where(where < 0, np.int8(OUT), table["side"].to_numpy())
    if division.ordering.by == "time":
        where[where > 0] = 0
    key = table["key"].to_numpy()
    rest = table["rest"].to_numpy()
    stratum = codes[table["code"].to_numpy()] if division.by_class else np.zeros(len(key), np.int32)
    result = np.full(len(key), TRAIN, np.int8)
    for number, generation in enumerate(division.generations):
        mine = where == number
        if not mine.any():
            continue
        cuts = [generation.cuts.get(name, Cut("", "")) for name in division.strata]
        # the test rows are the first: they are written last
        for side, ends in ((VALIDATION, [cut.validation for cut in cuts]), (TEST, [cut.test for cut in cuts])):
            result[mine & _within(key, rest, stratum, ends)] = side
    result[where < 0] = OUT
    return result


def _within(key: np.ndarray, rest: np.ndarray, stratum: np.ndarray, ends: list[str]) -> np.ndarray:
    """Which rows come no later than the end of their stratum."""
    values = [int(end, 16) if end else 0 for end in ends]
    some = np.array([bool(end) for end in ends])[stratum]
    high = np.array([value >> 64 for value in values], np.uint64)[stratum]
    low = np.array([value & (2**64 - 1) for value in values], np.uint64)[stratum]
    return some & ((key < high) | ((key == high) & (rest <= low)))


class _Bucket:
    """The rows of one range of keys, sorted: by key, and equal rows beside each other, the one that stays first."""

    def __init__(self, columns: dict[str, np.ndarray], plan: Plan) -> None:
        self._plan = plan
        order = _order(columns, plan.ordering)
        self.key, self.rest, self.row, self.stratum = (
            columns[name][order] for name in ("key", "rest", "row", "stratum")
        )
        self.side = columns["side"][order] if plan.ordering.is_given else np.zeros(0, np.int8)
        identity = columns["identity"][order] if "identity" in columns else self.key
        equal = (identity[1:] == identity[:-1]) & (self.rest[1:] == self.rest[:-1]) & (self.key[1:] == self.key[:-1])
        self.repeats = np.append(False, equal)[: len(order)]
        """Whether a row equals the one before it."""
        self.first = np.maximum.accumulate(np.where(self.repeats, 0, np.arange(len(order))))
        """Where the first of each row's equals is."""
        self.keep = ~self.repeats
        if plan.keep:
            self.keep = np.ones(len(order), bool)
            if plan.ordering.is_given:  # equal rows of another side can't stay
                self.keep = self.side == self.side[self.first]
        own = np.searchsorted(plan.starts, self.row, side="right") - 1
        if plan.ordering.has_units and len(order):
            begins = np.flatnonzero(np.append(True, self.key[1:] != self.key[:-1]))
            lengths = np.diff(np.append(begins, len(order)))
            self._generation = np.repeat(np.minimum.reduceat(own, begins), lengths)
        else:
            self._generation = own[self.first]
        self._own = own

    @property
    def counted(self) -> np.ndarray:
        """Which rows are divided now: kept, and not those of earlier generations."""
        return self.keep & (self._generation == len(self._plan.past))

    def summary(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray], Told]:
        """Rows that are divided now by stratum, exceptions, and what to tell."""
        sizes = np.bincount(self.stratum[self.counted], minlength=len(self._plan.strata))
        told = Told(int(self.keep.sum()), int((self.keep & self.repeats).sum()))
        if self._plan.ordering.is_given:
            lost = self.side[~self.keep & (self.side != self.side[self.first])]
            told.moved = np.bincount(lost, minlength=4).tolist()
        return sizes, self.exceptions(), told

    def exceptions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, their firsts, and where they go (`Exceptions`)."""
        listed = np.flatnonzero(~self.keep | (self._generation != self._own))
        firsts = np.where(self.repeats[listed], self.row[self.first[listed]], np.uint64(0))
        return self.row[listed], firsts, np.where(self.keep[listed], self._generation[listed], _NONE)

    def ends(self, stratum: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the rows of a stratum that are divided now: how many there are up to the end of each run that must stay
        together, and the last row's (key, rest) as [runs, 2]."""
        rows = np.flatnonzero(self.counted & (self.stratum == stratum))
        key, rest = self.key[rows], self.rest[rows]
        same = key[1:] == key[:-1]
        if not self._plan.ordering.has_units:
            same &= rest[1:] == rest[:-1]
        last = np.flatnonzero(np.append(~same, True)[: len(rows)])
        low = np.full(len(last), _ALL) if self._plan.ordering.has_units else rest[last]
        return last + 1, np.stack([key[last], low], axis=1)


class _Buckets:
    """Ranges of keys, each loaded when asked for."""

    def __init__(self, tables: Sequence[pa.Table], codes: list[np.ndarray], plan: Plan) -> None:
        self._tables, self._codes, self._plan = tables, codes, plan
        self._edges = key_ranges(tables)
        self._count = len(self._edges[0]) - 1
        self._only: _Bucket | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> _Bucket:
        if self._count > 1:
            return _Bucket(self._columns(number), self._plan)
        self._only = self._only or _Bucket(self._columns(0), self._plan)
        return self._only

    def _columns(self, number: int) -> dict[str, np.ndarray]:
        names = [name for name in self._tables[0].column_names if name != "position"]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for table, codes, edges in zip(self._tables, self._codes, self._edges, strict=True):
            some = table.slice(edges[number], edges[number + 1] - edges[number])
            for name in names:
                values = some[name].to_numpy()
                by_class = name == "code" and self._plan.by_class and len(codes)
                parts[name].append(codes[values] if by_class else values)
        columns = {name: np.concatenate(each) for name, each in parts.items()}
        stratum = columns.pop("code")
        columns["stratum"] = stratum if self._plan.by_class else np.zeros(len(stratum), np.int32)
        return columns


def key_ranges(tables: Sequence[pa.Table]) -> list[np.ndarray]:
    """Ranges of keys that each have about `BUCKET_ROWS` rows: by table where each begins, and where the last ends."""
    sample = np.sort(np.concatenate([table["key"].to_numpy()[_EVERY - 1 :: _EVERY].copy() for table in tables]))
    step = max(1, BUCKET_ROWS // _EVERY)
    total = sum(table.num_rows for table in tables)
    borders = np.unique(sample[step - 1 :: step]) if total > BUCKET_ROWS else sample[:0]
    edges = []
    for table in tables:
        inner = np.searchsorted(table["key"].to_numpy(), borders, side="right")
        edges.append(np.concatenate([[0], inner, [table.num_rows]]))
    return edges


def _order(columns: dict[str, np.ndarray], ordering: Ordering) -> np.ndarray:
    """The order of a bucket: key, identity, rest, then the side furthest held out, then the row id."""
    key = columns["key"]
    if "identity" in columns:
        order = np.lexsort((columns["identity"], key))
        near = (columns["identity"][order[1:]] == columns["identity"][order[:-1]]) & (key[order[1:]] == key[order[:-1]])
    else:
        order = np.argsort(key)
        near = key[order[1:]] == key[order[:-1]]
    if not near.any():
        return order
    # few rows share their words with another: only they are compared in full
    places = np.flatnonzero(np.append(near, False) | np.append(False, near))
    rows = order[places]
    words = [columns["row"], *([-columns["side"]] if ordering.is_given else []), columns["rest"]]
    words += [columns["identity"]] if "identity" in columns else []
    order[places] = rows[np.lexsort(tuple(word[rows] for word in (*words, key)))]
    return order


def _cuts(buckets: _Buckets, sizes: np.ndarray, plan: Plan) -> dict[str, Cut]:
    """Where test and validation end in each stratum; `sizes` is [buckets, strata]."""
    totals = sizes.sum(axis=0)
    test, validation = split.counts(totals, plan.shares)
    strata = range(len(plan.strata))
    if plan.ordering.has_units:
        return {plan.strata[0]: _unit_cut(buckets, sizes[:, 0], plan, int(test[0]), int(validation[0]))}
    first = _resolved(buckets, sizes, [(each, int(test[each])) for each in strata])
    second = _resolved(
        buckets, sizes, [(each, max(first[each][0], int(test[each] + validation[each]))) for each in strata]
    )
    return {name: Cut(first[at][1], second[at][1]) for at, name in enumerate(plan.strata)}


def _resolved(buckets: _Buckets, sizes: np.ndarray, wanted: list[tuple[int, int]]) -> dict[int, tuple[int, str]]:
    """By stratum: the cut nearest to the wanted one that parts no equal rows, and the words of its last row."""
    sums = np.cumsum(sizes, axis=0)
    by_bucket: dict[int, list[tuple[int, int]]] = {}
    found: dict[int, tuple[int, str]] = {}
    for stratum, cut in wanted:
        if cut <= 0:
            found[stratum] = (0, "")
        else:
            by_bucket.setdefault(int(np.searchsorted(sums[:, stratum], cut)), []).append((stratum, cut))

    def resolve(number: int) -> dict[int, tuple[int, str]]:
        bucket, before = buckets[number], sums[number] - sizes[number]
        return {each: _nearest(*bucket.ends(each), int(before[each]), cut) for each, cut in by_bucket[number]}

    for each in engine.side_by_side(resolve, sorted(by_bucket)):
        found |= each
    return found


def _nearest(ends: np.ndarray, words: np.ndarray, before: int, cut: int) -> tuple[int, str]:
    high = int(np.searchsorted(ends, cut - before))
    low_end = before + (int(ends[high - 1]) if high else 0)
    high_end = before + int(ends[high])
    if high_end != cut and cut - low_end <= high_end - cut:
        if low_end == 0:
            return 0, ""
        if high == 0:  # the run begins the bucket: everything before its own words
            return low_end, f"{_value(words[0]) - 1:032x}"
        return low_end, f"{_value(words[high - 1]):032x}"
    return high_end, f"{_value(words[high]):032x}"


def _value(words: np.ndarray) -> int:
    return (int(words[0]) << 64) | int(words[1])


def _unit_cut(buckets: _Buckets, sizes: np.ndarray, plan: Plan, test: int, validation: int) -> Cut:
    """Cuts between groups or instants: nearest to the wanted counts, at least one on each side that has a share."""
    ends: list[np.ndarray] = []
    words: list[np.ndarray] = []
    before = 0
    each = engine.side_by_side(lambda number: buckets[number].ends(0), range(len(buckets)))
    for (end, word), size in zip(each, sizes, strict=True):
        ends.append(before + end)
        words.append(word[:, 0])
        before += int(size)
    every, keys = np.concatenate(ends), np.concatenate(words)
    sides = 1 + plan.shares.held_out
    if len(every) < sides:
        if plan.past:
            return Cut("", "")
        raise split.too_few(len(every), "groups" if plan.ordering.by == "group" else "instants", sides, plan.where)
    first = _unit_end(every, 0, test, sides - 1)
    second = _unit_end(every, first, validation, 1)
    return Cut(*("" if not at else f"{(int(keys[at - 1]) << 64) | (2**64 - 1):032x}" for at in (first, second)))


def _unit_end(ends: np.ndarray, begin: int, wanted: int, leave: int) -> int:
    """How many units come before a cut that is `wanted` rows after the first `begin` units; `leave` stay behind it."""
    if not wanted:
        return begin
    aim = (int(ends[begin - 1]) if begin else 0) + wanted
    high = int(np.searchsorted(ends, aim))
    low = high - 1
    nearer_low = low >= 0 and (high == len(ends) or aim - ends[low] <= ends[high] - aim)
    units = (low if nearer_low else high) + 1
    return min(max(units, begin + 1), len(ends) - leave)
