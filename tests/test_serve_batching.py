"""The batcher alone, without HTTP and Ray: who is computed with whom, in which order, and who fails."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylway.bundle.rows import Rows
from serve_app import batching
from serve_app.batching import Batcher, Overloaded


def rows(*values: float) -> Rows:
    return Rows(np.array(values, np.float64).reshape(-1, 1), [[str(float(value)) for value in values]])


class Model:
    """Doubles its rows; records each batch; the first waits for `gate`, as a busy model does."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, given: Rows) -> np.ndarray:
        values = given.numbers[:, 0]
        self.batches.append(values.tolist())
        assert given.categories == [[str(value) for value in values]]
        assert self.gate.wait(10)
        if (values < 0).any():
            raise ValueError(f"a batch with {values.min()}")
        return values * 2


def run(scenario: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 20))


async def behind_a_busy_model(batcher: Batcher, model: Model, requests: list[Rows]) -> list[Any]:
    """Submit while the model computes another request, so that all of them wait together."""
    model.gate.clear()
    busy = asyncio.create_task(batcher.submit(rows(1000)))
    while not model.batches:
        await asyncio.sleep(0)
    waiting = [asyncio.create_task(batcher.submit(each)) for each in requests]
    await asyncio.sleep(0)
    model.gate.set()
    assert (await busy).tolist() == [2000]
    return await asyncio.gather(*waiting, return_exceptions=True)


def test_requests_that_wait_together_are_computed_together() -> None:
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch=5)
        found = await behind_a_busy_model(batcher, model, [rows(1), rows(2, 3), rows(), rows(4), rows(5, 6)])
        assert [each.tolist() for each in found] == [[2], [4, 6], [], [8], [10, 12]]
        assert model.batches == [[1000], [1, 2, 3, 4, 5], [6]]

    run(scenario)


def test_an_idle_model_waits_for_nobody() -> None:
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch=64)
        for value in (1, 2, 3):
            assert (await batcher.submit(rows(value))).tolist() == [2 * value]
        assert model.batches == [[1], [2], [3]]

    run(scenario)


def test_a_large_request_is_cut_and_lets_small_ones_through() -> None:
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch=4)
        order: list[str] = []

        async def asked(name: str, each: Rows) -> list[float]:
            result = await batcher.submit(each)
            order.append(name)
            return result.tolist()

        model.gate.clear()
        tasks = [asyncio.create_task(asked("large", rows(*range(20)))), asyncio.create_task(asked("small", rows(7)))]
        await asyncio.sleep(0)
        model.gate.set()
        assert await asyncio.gather(*tasks) == [[2.0 * value for value in range(20)], [14.0]]
        assert order == ["small", "large"]
        assert max(map(len, model.batches)) == 4

    run(scenario)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 16))
def test_every_row_once_in_its_place(sizes: list[int], max_batch: int) -> None:
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch)
        starts = np.cumsum([0, *sizes])
        requests = [rows(*range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
        found = await asyncio.gather(*map(batcher.submit, requests))
        assert [each.tolist() for each in found] == [(each.numbers[:, 0] * 2).tolist() for each in requests]
        assert sorted(value for batch in model.batches for value in batch) == list(range(sum(sizes)))
        assert max(map(len, model.batches)) <= max_batch
        assert not batcher.full

    run(scenario)


def test_a_request_that_fails_fails_alone_and_the_next_ones_are_answered() -> None:
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch=64)
        for _ in range(3):
            model.batches.clear()
            found = await behind_a_busy_model(batcher, model, [rows(1), rows(-5), rows(2, 3)])
            assert isinstance(found[1], ValueError)
            assert [found[0].tolist(), found[2].tolist()] == [[2], [4, 6]]
        assert (await batcher.submit(rows(9))).tolist() == [18]

    run(scenario)


def test_a_full_queue_refuses_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_WAITING_BATCHES", 2)
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch=3)
        found = await behind_a_busy_model(batcher, model, [rows(1), rows(*range(5)), rows(2), rows(3)])
        assert found[0].tolist() == [2]
        assert len(found[1]) == 5
        for refused in found[2:]:
            assert isinstance(refused, Overloaded)
            assert "6 rows are waiting" in str(refused)
        assert (await batcher.submit(rows(9))).tolist() == [18]

    run(scenario)


def test_a_deadline_frees_the_queue() -> None:
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch=3)
        model.gate.clear()

        async def impatient(value: int) -> None:
            async with asyncio.timeout(0.05):
                await batcher.submit(rows(value))

        for each in await asyncio.gather(*map(impatient, range(10)), return_exceptions=True):
            assert isinstance(each, TimeoutError)
        model.gate.set()
        assert (await batcher.submit(rows(9))).tolist() == [18]
        assert model.batches == [[0, 1, 2], [9]]  # what nobody waits for is not computed

    run(scenario)


def test_a_client_that_goes_away_is_not_computed() -> None:
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch=64)
        model.gate.clear()
        busy = asyncio.create_task(batcher.submit(rows(1)))
        while not model.batches:
            await asyncio.sleep(0)
        leaving = rows(2)
        leaves = weakref.ref(leaving.numbers)
        gone, stays = asyncio.create_task(batcher.submit(leaving)), asyncio.create_task(batcher.submit(rows(3)))
        del leaving
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        del gone  # and with it the frames that its end has seen
        gc.collect()
        assert leaves() is None  # its rows do not wait for the batch at hand
        model.gate.set()
        assert (await stays).tolist() == [6]
        await busy
        assert model.batches == [[1], [3]]

    run(scenario)


def test_the_event_loop_goes_on_while_the_model_computes() -> None:
    model = Model()

    async def scenario() -> None:
        batcher = Batcher(model, max_batch=64)
        model.gate.clear()
        busy = asyncio.create_task(batcher.submit(rows(1)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not busy.done()
        model.gate.set()
        await busy

    run(scenario)
