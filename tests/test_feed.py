"""From shards on disk to the tensors of a rank: which shards it opens, when, and what it makes of their rows."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

from raylway.errors import RunFailed
from raylway.features import prepared as prepared_module
from raylway.features.prepared import Prepared, Rows
from raylway.train.feed.loader import Feed, Share
from raylway.train.feed.order import Order

ROWS, BATCH, LANES, RANKS = 3_200, 64, 8, 8
STEPS = ROWS // BATCH


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """32 shards of 100 rows."""
    return ranks.prepared(tmp_path_factory.mktemp("prepared"), ROWS)


def feed(prepared: Prepared, rank: int) -> tuple[Feed, Rows, Order]:
    rows = prepared.rows("train", verify=True)
    order = Order([shard.rows for shard in prepared.shards("train")], 3, LANES)
    target = prepared.manifest.transform.target
    return Feed(rows, order, Share(rank, RANKS, BATCH, 3), target, torch.device("cpu")), rows, order


def files(prepared: Prepared, spans: np.ndarray) -> set[str]:
    shards = prepared.shards("train")
    ends = np.cumsum([shard.rows for shard in shards])
    return {shards[index].file for index in np.searchsorted(ends, spans[:, 0], side="right")}


def test_a_rank_opens_the_shards_of_its_own_lanes_only(prepared: Prepared) -> None:
    every, _, _, ids = prepared.rows("train").take(np.arange(ROWS))
    seen: list[np.ndarray] = []
    for rank in range(RANKS):
        mine, rows, order = feed(prepared, rank)
        for step in range(STEPS):
            seen += [part.numeric.numpy() for part in mine.step(step).microbatches]
        windows = {window for step in range(STEPS) for window in order.windows(step, BATCH, rank, RANKS)}
        lanes = {window.lane for window in windows}
        assert len(lanes) <= LANES // RANKS + 2
        ahead = {order.after(window) for window in windows}
        allowed = set.union(*(files(prepared, order.spans(window)) for window in windows | ahead))
        assert set(rows.opened) <= allowed
        # A lane's 400 rows are in 4 shards, or in 5 where it begins or ends within one.
        assert len(rows.opened) <= 5 * len(lanes) < len(prepared.shards("train"))
    found = np.concatenate(seen)
    assert len(ids) == len(found)
    assert (np.sort(found, axis=0) == np.sort(every, axis=0)).all()


def test_the_shards_of_the_next_window_are_opened_ahead(prepared: Prepared) -> None:
    mine, rows, order = feed(prepared, 2)
    mine.step(0)
    ahead = [order.spans(order.after(window)) for window in order.windows(0, BATCH, 2, RANKS)]
    wanted = set.union(*(files(prepared, spans) for spans in ahead))
    assert not wanted <= set.union(*(files(prepared, order.spans(w)) for w in order.windows(0, BATCH, 2, RANKS)))
    deadline = time.monotonic() + 60
    while not wanted <= set(rows.opened):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_few_shards_stay_open(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_module, "MOST_OPEN", 4)
    rows = prepared.rows("train", verify=True)
    everything = prepared.rows("train").take(np.arange(ROWS)[::-1])
    for found, expected in zip(rows.take(np.arange(ROWS)[::-1]), everything, strict=True):
        assert (found == expected).all()
    assert len(rows.opened) == 4


def test_a_damaged_shard_is_told_when_its_rows_are_needed(tmp_path: Path) -> None:
    made = ranks.prepared(tmp_path, 400)
    victim = tmp_path / made.shards("train")[2].file
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    rows = made.rows("train", verify=True)
    rows.take(np.arange(200))
    with pytest.raises(RunFailed, match="damaged"):
        rows.take(np.array([250]))
    victim.unlink()
    with pytest.raises(RunFailed, match="missing"):
        made.rows("train").take(np.array([250]))
