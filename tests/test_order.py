"""The order of rows as properties: each row once an epoch, the same for any number of workers, after any resume."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylway.train.feed.order import Order, Window, num_microbatches, random_seed, share

SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=9)
LANES = st.sampled_from([1, 2, 5, 64])


def epoch(order: Order, number: int, batch: int) -> list[np.ndarray]:
    """Positions of each step of one epoch, over all ranks."""
    steps = math.ceil(order.num_rows / batch)
    return [order.positions(number * steps + index, batch) for index in range(steps)]


@given(shards=SHARDS, lanes=LANES, seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 50), number=st.integers(0, 3))
def test_each_row_is_seen_once_an_epoch(shards: list[int], lanes: int, seed: int, batch: int, number: int) -> None:
    order = Order(shards, seed, lanes)
    steps = epoch(order, number, batch)
    assert sorted(np.concatenate(steps)) == list(range(sum(shards)))
    assert all(len(rows) == batch for rows in steps[:-1])
    assert [len(rows) for rows in steps] == [
        order.step_rows(number * len(steps) + at, batch) for at in range(len(steps))
    ]


@given(
    shards=SHARDS,
    lanes=LANES,
    batch=st.integers(1, 50),
    step=st.integers(0, 60),
    workers=st.integers(1, 9),
    microbatch=st.integers(1, 9),
)
def test_ranks_divide_the_same_global_batch(
    shards: list[int], lanes: int, batch: int, step: int, workers: int, microbatch: int
) -> None:
    """Each rank asks an order of its own, at once for this step: what a resumed run does."""
    whole = Order(shards, 7, lanes)
    for earlier in range(step):
        whole.positions(earlier, batch)
    parts = [Order(shards, 7, lanes).positions(step, batch, rank, workers) for rank in range(workers)]
    assert np.concatenate(parts).tolist() == whole.positions(step, batch).tolist()
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    # Every rank makes as many passes, and a pass holds no more rows than it may.
    passes = num_microbatches(sum(sizes), workers, microbatch)
    for size in sizes:
        bounds = [share(size, part, passes) for part in range(passes)]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == size
        assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
        assert all(stop - start <= microbatch for start, stop in bounds)


@given(shards=SHARDS, lanes=LANES)
def test_epochs_and_seeds_differ(shards: list[int], lanes: int) -> None:
    shards = [*shards, 200]
    orders = [
        np.concatenate(epoch(Order(shards, seed, lanes), number, 16)).tolist() for seed in (0, 1) for number in (0, 1)
    ]
    assert len({tuple(rows) for rows in orders}) == 4


ATTEMPTS = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 25), st.integers(0, 6)), max_size=4)
"""Workers of an attempt, the steps that it makes, and how many of them are lost with it."""


STORIES = given(shards=SHARDS, lanes=LANES, seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 60), attempts=ATTEMPTS)


@STORIES
def test_resumes_and_resizes_change_no_batch_and_repeat_no_row(
    shards: list[int], lanes: int, seed: int, batch: int, attempts: list[tuple[int, int, int]]
) -> None:
    """Each attempt begins with orders of its own, one for each rank, behind the steps that are kept."""
    num_rows = sum(shards)
    kept: list[np.ndarray] = []
    steps_per_epoch = math.ceil(num_rows / batch)
    for workers, steps, lost in [*attempts, (2, 2 * steps_per_epoch, 0)]:
        orders = [Order(shards, seed, lanes) for _ in range(workers)]
        first = len(kept)
        for step in range(first, first + steps):
            parts = [order.positions(step, batch, rank, workers) for rank, order in enumerate(orders)]
            kept.append(np.concatenate(parts))
        del kept[max(first, len(kept) - lost) :]
    whole = Order(shards, seed, lanes)
    assert all((rows == whole.positions(step, batch)).all() for step, rows in enumerate(kept))
    for start in range(0, len(kept) - steps_per_epoch + 1, steps_per_epoch):
        seen = np.concatenate(kept[start : start + steps_per_epoch])
        assert (np.sort(seen) == np.arange(num_rows)).all()


@pytest.mark.long
def test_a_thousand_resumed_and_resized_runs() -> None:
    settings(max_examples=1_000)(test_resumes_and_resizes_change_no_batch_and_repeat_no_row)()


class Scale:
    """A billion rows on 4,096 ranks: 10,000 shards of about 100,000 rows, none as long as another."""

    ROWS, RANKS, LANES, BATCH = 1_000_000_000, 4_096, 64, 65_536
    SHARDS: ClassVar[list[int]] = [100_000 - 5_000 + number for number in range(10_000)]
    SHARDS[-1] += ROWS - sum(SHARDS)
    STEPS = math.ceil(ROWS / BATCH)


def test_the_windows_of_a_billion_rows_hold_each_row_once() -> None:
    """All windows of an epoch, as the spans of rows that they shuffle: laid side by side they are all rows."""
    order = Order(Scale.SHARDS, 5, Scale.LANES)
    assert order.num_rows == Scale.ROWS
    spans = []
    for lane in range(Scale.LANES):
        window = Window(3, lane, 0)
        while window.epoch == 3:
            spans.append(order.spans(window))
            window = order.after(window)
    first, count = np.concatenate(spans)[np.argsort(np.concatenate(spans)[:, 0])].T
    assert first[0] == 0
    assert (first[1:] == first[:-1] + count[:-1]).all()
    assert first[-1] + count[-1] == Scale.ROWS
    # Each span is in one shard, so a rank knows what to fetch.
    ends = np.cumsum(Scale.SHARDS)
    assert (np.searchsorted(ends, first, side="right") == np.searchsorted(ends, first + count - 1, side="right")).all()


@pytest.mark.parametrize("step", [0, 9_000, Scale.STEPS - 1])
def test_4096_ranks_divide_a_step_of_a_billion_rows(step: int) -> None:
    """The first step, one on the way, and the last and short one."""
    order = Order(Scale.SHARDS, 5, Scale.LANES)
    parts = [order.positions(step, Scale.BATCH, rank, Scale.RANKS) for rank in range(Scale.RANKS)]
    rows = np.concatenate(parts)
    assert (rows == order.positions(step, Scale.BATCH)).all()
    assert len(np.unique(rows)) == len(rows) == order.step_rows(step, Scale.BATCH)
    assert rows.min() >= 0
    assert rows.max() < Scale.ROWS
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    # They are rows of the windows that the step says it reads.
    whole = np.concatenate([order.spans(window) for window in order.windows(step, Scale.BATCH)])
    first, count = whole[np.argsort(whole[:, 0])].T
    inside = np.searchsorted(first, rows, side="right") - 1
    assert (rows < first[inside] + count[inside]).all()


def test_a_rank_of_4096_holds_little_and_keeps_to_its_lanes() -> None:
    order = Order(Scale.SHARDS, 5, Scale.LANES)
    rank = 2_047
    tracemalloc.start()
    windows = set()
    for step in range(0, 2 * Scale.STEPS, 397):  # over two epochs
        order.positions(step, Scale.BATCH, rank, Scale.RANKS)
        windows.update(order.windows(step, Scale.BATCH, rank, Scale.RANKS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({window.lane for window in windows}) <= Scale.LANES // Scale.RANKS + 2
    # Positions of a window are 8 bytes for each of 200,000 rows; sorting it takes as much again, twice.
    assert peak < 16 * 2**20
    spans = np.concatenate([order.spans(window) for window in windows])
    shards = np.unique(np.searchsorted(np.cumsum(Scale.SHARDS), spans[:, 0], side="right"))
    assert len(shards) <= 2 * (len(Scale.SHARDS) // Scale.LANES + 2)


def test_all_of_small_data_is_one_window() -> None:
    """Every row can come first: a first step over many seeds draws from all rows alike."""
    first = [Order([50, 50], seed).positions(0, 1)[0] for seed in range(2_000)]
    counts = np.bincount(first, minlength=100)
    # A binomial count with mean 20 stays within 6 standard deviations.
    assert counts.min() > 0
    assert counts.max() < 20 + 6 * math.sqrt(20)


def test_a_lane_of_large_data_holds_one_window_at_a_time() -> None:
    shards = [100] * 640
    order = Order(shards, 3, 64)
    held = set()
    for step in range(20):
        order.positions(step, 64)
        held.add(max(len(rows) for _, rows in order._held.values()))
    assert held == {200}
    # A rank of many touches few lanes.
    mine = Order(shards, 3, 64)
    for step in range(20):
        mine.positions(step, 64, rank=3, workers=16)
    assert len(mine._held) <= 64 // 16 + 2


@settings(max_examples=20)
@given(shards=SHARDS, batch=st.integers(1, 50))
def test_without_a_seed_rows_stay_in_their_order(shards: list[int], batch: int) -> None:
    assert np.concatenate(epoch(Order(shards, None), 2, batch)).tolist() == list(range(sum(shards)))


def test_the_order_is_written_down() -> None:
    """A version that shuffles otherwise can't resume the runs of this one: raise the format of checkpoints then."""
    assert Order([5, 9, 1, 8], 3).positions(0, 4).tolist() == [19, 11, 15, 20]
    assert Order([5, 9, 1, 8], 3, 2).positions(0, 4).tolist() == [14, 13, 22, 19]


@given(step=st.integers(0, 2**40), rank=st.integers(0, 2**20))
def test_random_seeds_differ_by_step_and_rank(step: int, rank: int) -> None:
    seeds = {random_seed(1, *place) for place in ((step, rank), (step + 1, rank), (step, rank + 1))}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
