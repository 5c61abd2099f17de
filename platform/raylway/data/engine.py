"""One function over many small arguments: on threads of this process if they are few, else as tasks of Ray Data.

Arguments and results are small records; rows go from pass to pass through files (`pieces`). A task that is lost with
its worker or node is run again by Ray, so functions must give the same when run twice. The one file here that imports
ray.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import msgspec
import pyarrow as pa

from raylway.errors import UserError

FEW = 4
"""So many tasks are done here: starting Ray's workers takes longer than the work."""
Argument = TypeVar("Argument", bound=msgspec.Struct)
Result = TypeVar("Result", bound=msgspec.Struct)
_TASKS_PER_CPU = 8
"""Ray Data takes 0.1 to 0.2 s from the end of a task to the beginning of the next, so a task does several arguments; so
few that the last ones end together."""
_ONE: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}


class _Failure(msgspec.Struct, frozen=True):
    """A `UserError` on its way to the driver: as a value, for Ray wraps what is raised."""

    what: str
    where: str
    expected: str
    found: str
    fix: str


def run(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    result: type[Result],
    done: Callable[[Result], None] = lambda _: None,
    few: int | None = None,
) -> list[Result]:
    """Apply a function to every argument.

    Args:
        function: Takes one argument; large constants are bound to it with `functools.partial`.
        arguments: msgspec records of one type.
        result: What the function returns.
        done: Called with each result as it comes in, in any order.
        few: At most so many arguments are done on threads of this process, `FEW` if left out.

    Returns:
        The results in the order of the arguments.

    Raises:
        UserError: The function raised it.
    """
    found: dict[int, Result] = {}
    on_threads = len(arguments) <= (FEW if few is None else few)
    stream = _on_threads(function, arguments) if on_threads else _on_ray(function, arguments, result)
    for at, each in stream:
        found[at] = each
        done(each)
    return [found[at] for at in range(len(arguments))]


def _on_threads(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> Iterator[tuple[int, Result]]:
    cpus = max(1, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(min(cpus, len(arguments) or 1)) as pool:
        waiting = [pool.submit(function, argument) for argument in arguments]
        try:
            for at, future in enumerate(waiting):
                yield at, future.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


def _on_ray(
    function: Callable[[Argument], Result], arguments: Sequence[Argument], result: type[Result]
) -> Iterator[tuple[int, Result]]:
    import ray

    configure()
    rows = [{"at": at, "record": msgspec.msgpack.encode(argument)} for at, argument in enumerate(arguments)]
    tasks = _TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    source = ray.data.from_items(rows, override_num_blocks=min(len(rows), tasks))
    dataset = source.map_batches(partial(_task, function=function, kind=type(arguments[0])), **_ONE)
    for row in dataset.iter_rows():
        if row["failed"]:
            raise UserError(*msgspec.structs.astuple(msgspec.msgpack.decode(row["record"], type=_Failure)))
        yield row["at"], msgspec.msgpack.decode(row["record"], type=result)


def configure() -> None:
    """What Raylway needs of Ray Data."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # our own progress line is shown
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _task(batch: pa.Table, function: Callable[[Any], msgspec.Struct], kind: type) -> pa.Table:
    """In a task: the function of one argument."""
    record: msgspec.Struct
    failed = False
    try:
        record = function(msgspec.msgpack.decode(batch["record"][0].as_py(), type=kind))
    except UserError as error:
        record, failed = _Failure(*error.args), True
    pa.default_memory_pool().release_unused()
    return pa.table(
        {
            "at": batch["at"],
            "failed": pa.array([failed]),
            "record": pa.array([msgspec.msgpack.encode(record)], pa.large_binary()),
        }
    )
