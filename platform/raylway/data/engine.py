"""One function over many small arguments: as tasks of Ray Data, or on threads of this process.

Threads where there are few arguments, or where the whole cluster is one small machine: numpy and pyarrow let threads
run side by side, and 600 MB are prepared there in two thirds of the time that Ray Data takes with its processes and its
0.2 s between tasks. Both give the same bytes.

Arguments and results are small records; rows go from pass to pass through files (`pieces`). A task that is lost with
its worker or node is run again by Ray, so functions must give the same when run twice. The one file here that imports
ray.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import msgspec
import pyarrow as pa

from raylway.errors import UserError

FEW = 4
"""So many tasks are done here: starting Ray's workers takes longer than the work."""
ALL = 1 << 62
"""All tasks are done here."""
MOST_THREADS = 8
"""So many threads of one Python process keep as many CPUs busy; each needs memory for what it works on."""
Item = TypeVar("Item")
Output = TypeVar("Output")
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
    few: int | None = None,
) -> Iterator[Result]:
    """Apply a function to every argument.

    Args:
        function: Takes one argument; large constants are bound to it with `functools.partial`.
        arguments: msgspec records of one type.
        result: What the function returns.
        few: At most so many arguments are done on threads of this process; `FEW` if left out.

    Yields:
        The results in the order of the arguments, while others are still worked on.

    Raises:
        UserError: The function raised it.
    """
    if len(arguments) <= (FEW if few is None else few):
        yield from side_by_side(function, arguments)
        return
    waiting: dict[int, Result] = {}
    turn = 0
    for at, each in _on_ray(function, arguments, result):
        waiting[at] = each
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1


def side_by_side(function: Callable[[Item], Output], items: Iterable[Item]) -> Iterator[Output]:
    """The function of each item, in their order, on threads; a few results wait for their turn at most.

    Numpy and pyarrow let threads run at once; what holds the interpreter does not.
    """
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    waiting: deque[Future[Output]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
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
