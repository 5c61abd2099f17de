"""Hashes, duplicates and the division of rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from raylway.data import split
from raylway.data.clean import distinct, smallest
from raylway.data.rowhash import hash_rows
from raylway.data.split import Shares

ROWS = st.lists(
    st.tuples(
        st.integers(-2, 2) | st.none(),
        st.sampled_from([0.0, -0.0, 0.5, 1.0]) | st.none(),
        st.booleans() | st.none(),
        st.sampled_from(["", "a", "b", "ab", "ä"]) | st.none(),
    ),
    min_size=1,
    max_size=60,
)
PINNED = [
    [8627471764465860085, 13028417800886134755],
    [7923909843895884657, 9473809848472623918],
    [3079626389921993394, 6389106317937985578],
]
SCHEMA = pa.schema({"i": pa.int64(), "f": pa.float64(), "b": pa.bool_(), "t": pa.string()})


def table_of(rows) -> pa.Table:
    return pa.table(
        [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), SCHEMA.types, strict=True)], SCHEMA
    )


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_rows_are_equal_exactly_when_their_hashes_are(rows):
    hashes = [tuple(pair) for pair in hash_rows(table_of(rows))[0].tolist()]
    for row, digest in zip(rows, hashes, strict=True):
        for other, other_digest in zip(rows, hashes, strict=True):
            assert (row == other) == (digest == other_digest)


def test_hashes_are_the_same_on_every_machine_and_version():
    rows = [(1, 2.5, True, "ä"), (None, None, None, None), (-1, -0.0, False, "")]
    assert hash_rows(table_of(rows))[0].tolist() == PINNED
    assert hash_rows(table_of(rows).select(["t", "b", "f", "i"]))[0].tolist() == PINNED


def test_hashes_tell_many_columns_and_missing_cells_apart():
    width = 130
    rows = [[None if column == row else 0 for column in range(width)] for row in range(width)] + [[0] * width]
    table = pa.table(
        [pa.array(column, pa.int64()) for column in zip(*rows, strict=True)], [f"c{i}" for i in range(width)]
    )
    assert len({tuple(pair) for pair in hash_rows(table)[0].tolist()}) == width + 1


def test_hash_bits_are_balanced():
    hashes = hash_rows(pa.table({"x": pa.array(range(20_000)), "y": pa.array([0.5] * 20_000)}))[0]
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(bits[:, :64].sum(1), bits[:, 64:].sum(1))[0, 1]) < 0.05


def some(count: int, classes: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = np.sort(rng.integers(0, classes, count)).astype(np.int32)
    codes[:classes] = range(classes)
    return rng.integers(0, 2**64, (count, 2), np.uint64), codes


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.05, 0.1, 0.25]),
    st.sampled_from([0.0, 0.1, 0.2, 0.5]),
)
@settings(max_examples=300, deadline=None)
def test_counts_are_exact_and_in_proportion(sizes, validation, test):
    sizes = np.array(sizes)
    total = sizes.sum()
    for_test, for_validation = split.counts(sizes, Shares(validation, test))
    room = int((sizes - 1).sum())
    wanted = min(max(1, int(test * total + 0.5)) if test else 0, room)
    assert for_test.sum() == wanted
    assert for_validation.sum() == min(max(1, int(validation * total + 0.5)) if validation else 0, room - wanted)
    assert (sizes - for_test - for_validation >= 1).all() and (for_test >= 0).all() and (for_validation >= 0).all()
    if wanted >= len(sizes):
        assert (for_test[sizes > 1] >= 1).all()
        # a class that would have none takes its one from others, else nobody is more than a row off
        forced = (wanted * sizes / total < 1).sum()
        assert (np.abs(for_test - wanted * sizes / total) <= 1 + forced).all()


@pytest.mark.parametrize("seed", range(5))
def test_class_counts_are_those_of_scikit_learn(seed):
    _, codes = some(1_000, 4, seed)
    sizes = np.bincount(codes)
    for_test, _ = split.counts(sizes, Shares(0.0, 0.2))
    _, held_out = train_test_split(codes, test_size=0.2, stratify=codes, random_state=seed)
    assert np.abs(for_test - np.bincount(held_out)).max() <= 1 and for_test.sum() == len(held_out)


@pytest.mark.parametrize("count", [0, 1, 100, 4_095, 4_096, 50_000])
def test_distinct_texts_are_counted(count):
    words = hash_rows(pa.table({"t": pa.array([f"text {n}" for n in range(count)], pa.string())}))[1]["t"]
    halves = [np.unique(words[: count * 2 // 3])[:4096], np.unique(words[count // 3 :])[:4096]]
    assert distinct(smallest(halves)) == (count if count < 4_096 else pytest.approx(count, rel=0.06))
