"""Ray Data runs the passes: every pass maps one function over items or pieces. The one file here that imports ray.

A piece travels as one row: its facts, small, which the driver reads, and its table, which stays in the object store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa

from raylway.data import items
from raylway.data.items import Facts, Item, Piece, Reading
from raylway.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

Progress = Callable[[int], None]
"""Called with the number of pieces (reading) or rows (later passes) that were just finished."""
Argument = TypeVar("Argument", bound=msgspec.Struct)
Result = TypeVar("Result", bound=msgspec.Struct)
_ONE: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
_BLOCK_BYTES = 1 << 20
"""Any piece is larger, so each becomes a block of its own and passes run on as many CPUs as there are pieces."""


class _Failure(msgspec.Struct, frozen=True):
    """A `UserError` on its way to the driver: as a value, for Ray wraps what is raised."""

    what: str
    where: str
    expected: str
    found: str
    fix: str


def configure() -> None:
    """What Raylway needs of Ray Data, once, before the first dataset."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # our own progress line is shown
    context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def spread(
    function: Callable[[Argument], msgspec.Struct], arguments: list[Argument], result: type[Result]
) -> list[Result]:
    """Apply a function to small arguments in tasks; the results in the arguments' order.

    Raises:
        UserError: The function raised it.
    """
    dataset = _dataset(arguments).map_batches(partial(_spread, function=function, kind=type(arguments[0])), **_ONE)
    found = {row["at"]: msgspec.msgpack.decode(row["facts"], type=result) for row in _rows(dataset)}
    return [found[index] for index in range(len(arguments))]


class Pieces:
    """All pieces of the data, in the object store.

    Args:
        todo: The items.
        reading: How to read them.
        progress: Called as pieces come in, with their number.
    """

    def __init__(self, todo: list[Item], reading: Reading, progress: Progress) -> None:
        import ray

        dataset = _dataset(todo).map_batches(partial(_read, reading=reading), **_ONE)
        blocks = []
        for bundle in dataset.iter_internal_ref_bundles():
            blocks += bundle.block_refs
            progress(len(bundle.block_refs))
        self._dataset = ray.data.from_arrow_refs(blocks)
        shown = self._dataset.select_columns(["at", "number", "facts", "failed"])
        facts = [msgspec.msgpack.decode(row["facts"], type=Facts) for row in _rows(shown)]
        self.facts = sorted(facts, key=lambda fact: (fact.item, fact.number))
        """In the order of the rows."""

    def map(
        self,
        function: Callable[..., msgspec.Struct],
        result: type[Result],
        progress: Progress,
        sides: list[np.ndarray] | None = None,
    ) -> list[Result]:
        """Apply a function to every piece, in tasks; the results in the order of the pieces.

        Args:
            function: Takes the piece, and its `sides` if there are any.
            result: What the function returns.
            progress: Called as pieces are done, with their rows.
            sides: By piece, an array over its rows.

        Raises:
            UserError: The function raised it.
        """
        import ray

        keys = [(fact.item, fact.number) for fact in self.facts]
        # one object for all tasks of a node, mapped and not copied
        known = [ray.put(dict(zip(keys, sides, strict=True)))] if sides else []
        found = {}
        for row in _rows(self._dataset.map_batches(partial(_on_piece, function=function, known=known), **_ONE)):
            found[row["at"], row["number"]] = msgspec.msgpack.decode(row["facts"], type=result)
            progress(row["rows"])
        return [found[key] for key in keys]


def _dataset(arguments: Sequence[Any]) -> Dataset:
    import ray

    rows = [{"at": index, "facts": msgspec.msgpack.encode(argument)} for index, argument in enumerate(arguments)]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for row in dataset.iter_rows():
        if row["failed"]:
            raise UserError(*msgspec.structs.astuple(msgspec.msgpack.decode(row["facts"], type=_Failure)))
        yield row


def _read(batch: pa.Table, reading: Reading) -> Iterator[pa.Table]:
    """In a task: from an item to its pieces."""
    item = msgspec.msgpack.decode(batch["facts"][0].as_py(), type=Item)
    try:
        for piece in items.read(item, reading):
            yield _row(item.index, piece.facts.number, piece.facts, piece.facts.rows, piece.table)
    except UserError as error:
        yield _failed(item.index, error)


def _on_piece(batch: pa.Table, function: Callable[..., msgspec.Struct], known: list[Any]) -> pa.Table:
    """In a task: a function of a piece."""
    import ray

    at, number = batch["at"][0].as_py(), batch["number"][0].as_py()
    facts = msgspec.msgpack.decode(batch["facts"][0].as_py(), type=Facts)
    table = pa.ipc.open_stream(batch["table"][0].as_buffer()).read_all()
    sides = [ray.get(ref)[at, number] for ref in known]
    try:
        return _row(at, number, function(Piece(table, facts), *sides), facts.rows)
    except UserError as error:
        return _failed(at, error)


def _spread(batch: pa.Table, function: Callable[[Any], msgspec.Struct], kind: type) -> pa.Table:
    """In a task: a function of one small argument."""
    at = batch["at"][0].as_py()
    try:
        return _row(at, 0, function(msgspec.msgpack.decode(batch["facts"][0].as_py(), type=kind)), 0)
    except UserError as error:
        return _failed(at, error)


def _row(at: int, number: int, facts: msgspec.Struct, rows: int, table: pa.Table | None = None) -> pa.Table:
    return _as_row(at, number, facts, rows, pa.py_buffer(b"") if table is None else _ipc(table), False)


def _failed(at: int, error: UserError) -> pa.Table:
    return _as_row(at, 0, _Failure(*error.args), 0, pa.py_buffer(b""), True)


def _as_row(at: int, number: int, facts: msgspec.Struct, rows: int, table: pa.Buffer, failed: bool) -> pa.Table:
    edges = pa.py_buffer(np.array([0, table.size], np.int64))
    return pa.table(
        {
            "at": pa.array([at], pa.int64()),
            "number": pa.array([number], pa.int64()),
            "rows": pa.array([rows], pa.int64()),
            "failed": pa.array([failed]),
            "facts": pa.array([msgspec.msgpack.encode(facts)], pa.large_binary()),
            "table": pa.Array.from_buffers(pa.large_binary(), 1, [None, edges, table]),
        }
    )


def _ipc(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
