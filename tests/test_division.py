"""Duplicates and sides over ranges of keys, against plain numpy and pandas over all rows at once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylway.data import division, split
from raylway.data.division import Exceptions, Plan
from raylway.data.ordering import Ordering
from raylway.data.rowhash import hash_rows, mix
from raylway.data.split import OUT, TEST, TRAIN, VALIDATION, Shares
from raylway.features.prepared import LINE_BITS, Generation

CASES = st.tuples(
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 3)), min_size=8, max_size=150),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([1, 2, 5, 1_000]),
)


def words(values: list[int], seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    hashes = hash_rows(pa.table({"x": pa.array(values, pa.int64())}))[0]
    return mix(hashes[:, 0] ^ mix(np.array([seed], np.uint64))), hashes[:, 1].copy()


def made(values, codes, files, units=None) -> tuple[list[pa.Table], np.ndarray]:
    """A piece a file, and the row ids in the order of the values."""
    key, rest = words(values)
    tables, ids = [], np.zeros(len(values), np.uint64)
    for file, places in enumerate(np.array_split(np.arange(len(values)), files)):
        ids[places] = (np.uint64(file) << np.uint64(LINE_BITS)) + np.arange(2, len(places) + 2, dtype=np.uint64)
        columns = {"key": key[places], "rest": rest[places], "row": ids[places]}
        columns["position"] = np.arange(len(places), dtype=np.uint32)
        columns["code"] = np.array(codes, np.int32)[places]
        if units is not None:
            columns |= {"key": np.array(units, np.uint64)[places], "identity": key[places]}
        order = np.argsort(columns["key"], kind="stable")
        tables.append(pa.table({name: column[order] for name, column in columns.items()}))
    return tables, ids


def sides(tables, ids, plan) -> np.ndarray:
    codes = [np.arange(len(plan.classes), dtype=np.int32)] * len(tables)
    divided, told = division.divide(tables, codes, plan, lambda sizes: None)
    found = {}
    for table, own in zip(tables, codes, strict=True):
        rows = table["row"].to_numpy()
        part = divided.exceptions.between(int(rows.min()), int(rows.max())) if len(rows) else Exceptions(b"", b"", b"")
        found |= dict(zip(rows.tolist(), division.sides(table, own, divided, part).tolist(), strict=True))
    result = np.array([found[row] for row in ids.tolist()], np.int8)
    assert told.kept == (result != OUT).sum()
    return result


def plan(files, by="rows", strata=("",), shares=(0.1, 0.2), keep=False, past=()) -> Plan:
    names = list(strata)
    return Plan(Ordering(3, by), names, len(names) > 1, names, Shares(*shares), keep, list(past), files, "job")


def reference(values, codes, keep, shares) -> np.ndarray:
    """All rows at once: pandas finds the first of equal rows, one sort divides them."""
    key, rest = words(values)
    stays = np.ones(len(values), bool) if keep else ~pd.Series(values).duplicated().to_numpy()
    result = np.zeros(len(values), np.int8)
    kept = np.flatnonzero(stays)
    strata = np.array(codes)[kept]
    test, validation = split.counts(np.bincount(strata, minlength=max(codes) + 1), shares)
    for stratum in range(max(codes) + 1):
        rows = kept[strata == stratum]
        rows = rows[np.lexsort((rest[rows], key[rows]))]
        first = nearest(key, rest, rows, int(test[stratum]))
        second = nearest(key, rest, rows, max(first, int(test[stratum] + validation[stratum])))
        result[rows[:first]], result[rows[first:second]], result[rows[second:]] = TEST, VALIDATION, TRAIN
    return result


def nearest(key, rest, rows, cut) -> int:
    pairs = list(zip(key[rows].tolist(), rest[rows].tolist(), strict=True))
    allowed = [at for at in range(len(rows) + 1) if at in (0, len(rows)) or pairs[at - 1] != pairs[at]]
    return min(allowed, key=lambda at: (abs(at - cut), at))


@given(CASES)
@settings(max_examples=200, deadline=None)
def test_any_ranges_give_what_one_sort_gives(case):
    pairs, files, keep, bucket = case
    values = [value for value, _ in pairs]
    codes = [value % 3 for value in values]  # a row's class follows from the row
    codes = np.unique(codes, return_inverse=True)[1].tolist()
    held, every = division.BUCKET_ROWS, division._EVERY
    division.BUCKET_ROWS, division._EVERY = bucket, 1
    try:
        tables, ids = made(values, codes, files)
        strata = [f"c{code}" for code in range(max(codes) + 1)]
        found = sides(tables, ids, plan(files, strata=strata, keep=keep))
    finally:
        division.BUCKET_ROWS, division._EVERY = held, every
    assert (
        found.tolist()
        == reference(values, codes if len(strata) > 1 else [0] * len(values), keep, Shares(0.1, 0.2)).tolist()
    )


@given(CASES)
@settings(max_examples=200, deadline=None)
def test_a_unit_is_on_one_side_and_no_wanted_side_is_empty(case):
    pairs, files, keep, bucket = case
    units = [unit for _, unit in pairs]
    values = [value * 4 + unit for value, unit in pairs]
    if len(set(units)) < 3:
        return
    held, every = division.BUCKET_ROWS, division._EVERY
    division.BUCKET_ROWS, division._EVERY = bucket, 1
    try:
        tables, ids = made(values, [0] * len(values), files, units)
        found = sides(tables, ids, plan(files, "group", keep=keep))
    finally:
        division.BUCKET_ROWS, division._EVERY = held, every
    rows = pd.DataFrame({"unit": units, "side": found, "value": values})
    kept = rows[rows["side"] != OUT]
    assert (kept.groupby("unit")["side"].nunique() == 1).all()
    assert set(kept["side"]) == {TRAIN, VALIDATION, TEST}
    expected = np.ones(len(values), bool) if keep else ~rows["value"].duplicated().to_numpy()
    assert ((found != OUT) == expected).all()
    assert kept["unit"][kept["side"] == TEST].max() < kept["unit"][kept["side"] == VALIDATION].min()


@given(CASES, st.booleans())
@settings(max_examples=150, deadline=None)
def test_rows_of_earlier_files_keep_their_sides(case, by_group):
    pairs, files, keep, bucket = case
    values = [value for value, _ in pairs]
    units = [value % 7 for value in values] if by_group else None
    old = max(1, files - 1)
    by = "group" if by_group else "rows"
    held, every = division.BUCKET_ROWS, division._EVERY
    division.BUCKET_ROWS, division._EVERY = bucket, 1
    try:
        tables, ids = made(values, [0] * len(values), files, units)
        before = (ids >> np.uint64(LINE_BITS)) < old
        if by_group and len({unit for unit, is_old in zip(units, before, strict=True) if is_old}) < 3:
            return
        first, _ = division.divide(
            tables[:old], [np.zeros(1, np.int32)] * old, plan(old, by, keep=keep), lambda sizes: None
        )
        alone = sides(tables[:old], ids[before], plan(old, by, keep=keep))
        both = sides(tables, ids, plan(files, by, keep=keep, past=first.generations))
    finally:
        division.BUCKET_ROWS, division._EVERY = held, every
    assert (both[before] == alone).all()
    frame = pd.DataFrame({"unit": units or values, "side": both})
    assert (frame[frame["side"] != OUT].groupby("unit")["side"].nunique() <= 1).all()
    if not keep and not by_group:
        new = (both != OUT) & ~before
        assert (both[new] == TEST).sum() == split.counts(np.array([new.sum()]), Shares(0.1, 0.2))[0].sum()


def test_too_few_groups_are_refused():
    tables, _ = made([1, 2, 3], [0, 0, 0], 1, [1, 1, 2])
    with pytest.raises(split.UserError, match="too few groups to divide"):
        division.divide(tables, [np.zeros(1, np.int32)], plan(1, "group"), lambda sizes: None)


def test_only_files_that_came_first_have_a_generation():
    tables, _ = made(list(range(40)), [0] * 40, 2)
    first, _ = division.divide(tables, [np.zeros(1, np.int32)] * 2, plan(2), lambda sizes: None)
    again, _ = division.divide(tables, [np.zeros(1, np.int32)] * 2, plan(2, past=first.generations), lambda sizes: None)
    assert again.generations == first.generations == [Generation(2, first.generations[0].cuts)]
