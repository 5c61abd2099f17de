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
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import msgspec
import pyarrow as pa

from raylway.errors import RunFailed, UserError

FEW = 4
"""So many tasks are done here: starting Ray's workers takes longer than the work."""
ALL = 1 << 62
"""All tasks are done here."""
MOST_THREADS = 8
"""So many threads of one Python process keep as many CPUs busy; each needs memory for what it works on."""
Item = TypeVar("Item")
Output = TypeVar("Output")


class Named(Protocol):
    """A msgspec record that people know by a name: that of its files."""

    @property
    def name(self) -> str: ...


Argument = TypeVar("Argument", bound=Named)
Result = TypeVar("Result", bound=msgspec.Struct)
_MOST_TRIES = 4
"""So often is work begun whose worker or node is lost."""
_TASKS_PER_CPU = 8
"""Ray Data takes 0.1 to 0.2 s from the end of a task to the beginning of the next, so a task does several arguments; so
few that the last ones end together."""
_ONE: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}


class _Failure(msgspec.Struct, frozen=True):
    """A `UserError` or `RunFailed` on its way to the driver: as a value, for Ray wraps what is raised."""

    is_users: bool
    said: list[str]

    def error(self) -> UserError | RunFailed:
        return UserError(*self.said) if self.is_users else RunFailed(*self.said)


def is_enough_here() -> bool:
    """Whether threads of this process keep all CPUs of this machine busy."""
    return len(os.sched_getaffinity(0)) <= MOST_THREADS


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
        RunFailed: The function raised it, or workers died of one argument again and again.
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


def run_on_actors(
    make: Callable[[], Callable[[Argument], Result]], arguments: Sequence[Argument], result: type[Result]
) -> Iterator[Result]:
    """Apply a function that is costly to make to every argument, by processes of Ray that each make it once.

    It is made with the first argument: what ends the process that makes it counts as a try (`_MOST_TRIES`), too.

    Args:
        make: Returns the function.
        arguments: As in `run`.
        result: As in `run`.

    Yields:
        The results in any order.

    Raises:
        UserError, RunFailed: As in `run`.
    """
    from ray.data import ActorPoolStrategy

    pool = ActorPoolStrategy(min_size=1, max_size=len(arguments))
    told = {"make": make, "kind": type(arguments[0]), "key": secrets.token_hex(8)}
    dataset = _source(arguments, len(arguments)).map_batches(
        _Actor, fn_constructor_kwargs=told, compute=pool, num_cpus=1, **_ONE
    )
    yield from (each for _, each in _results(dataset, result))


def _on_ray(
    function: Callable[[Argument], Result], arguments: Sequence[Argument], result: type[Result]
) -> Iterator[tuple[int, Result]]:
    import ray

    tasks = _TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = partial(_task, function=function, kind=type(arguments[0]), key=secrets.token_hex(8))
    yield from _results(_source(arguments, min(len(arguments), tasks)).map_batches(task, **_ONE), result)


def _source(arguments: Sequence[Named], blocks: int) -> Any:
    import ray

    configure()
    rows = [{"at": at, "record": msgspec.msgpack.encode(argument)} for at, argument in enumerate(arguments)]
    return ray.data.from_items(rows, override_num_blocks=blocks)


def _results(dataset: Any, result: type[Result]) -> Iterator[tuple[int, Result]]:
    for row in dataset.iter_rows():
        if row["failed"]:
            raise msgspec.msgpack.decode(row["record"], type=_Failure).error()
        yield row["at"], msgspec.msgpack.decode(row["record"], type=result)


def configure() -> None:
    """What Raylway needs of Ray Data."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # our own progress line is shown
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class _Actor:
    """A process that has made its function once."""

    def __init__(self, make: Callable[[], Callable[[Any], msgspec.Struct]], kind: type, key: str) -> None:
        self._make, self._kind, self._key = make, kind, key

    @cached_property
    def _function(self) -> Callable[[Any], msgspec.Struct]:
        return self._make()

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _task(batch, self._applied, self._kind, self._key)

    def _applied(self, argument: Any) -> msgspec.Struct:
        return self._function(argument)


def _task(batch: pa.Table, function: Callable[[Any], msgspec.Struct], kind: type, key: str) -> pa.Table:
    """In a task: the function of one argument."""
    argument: Any = msgspec.msgpack.decode(batch["record"][0].as_py(), type=kind)
    record: msgspec.Struct
    failed = False
    try:
        with _counting_tries(argument.name, f"{key} {batch['at'][0]}"):
            record = function(argument)
    except (UserError, RunFailed) as error:
        record, failed = _Failure(isinstance(error, UserError), list(error.args)), True
    pa.default_memory_pool().release_unused()
    return pa.table(
        {
            "at": batch["at"],
            "failed": pa.array([failed]),
            "record": pa.array([msgspec.msgpack.encode(record)], pa.large_binary()),
        }
    )


@contextmanager
def _counting_tries(name: str, key: str) -> Iterator[None]:
    """Around some work in a worker: end it if it was begun again and again and no worker came to its end.

    Ray Data runs a task without end whose worker dies. The count lies in the store of the cluster's head, for which Ray
    has no public name: it outlives workers and nodes, and needs no folder that all of them see.

    Args:
        name: Of what is worked on, for the message.
        key: This work's, and no other's.

    Raises:
        RunFailed: It was begun `_MOST_TRIES` times.
    """
    from ray.experimental import internal_kv

    key = f"raylway tries {key}"
    tries = int(internal_kv._internal_kv_get(key) or 0)
    try:
        if tries == _MOST_TRIES:
            raise RunFailed(
                f"{name}: {tries} workers died one after the other while they worked on the same part of it; their "
                "memory may be too small for it, or the job's own code or model ends its process"
            )
        internal_kv._internal_kv_put(key, str(tries + 1))
        yield
    finally:
        internal_kv._internal_kv_del(key)
