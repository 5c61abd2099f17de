"""Writing checkpoints beside training: the loop stops for the copy of its tensors to host memory, and for no more.

    loop      settle the one before   copy   next steps ...              settle: well, or not
    thread                                   write and checksum, move   gather   manifest   tidy

Every rank has its thread, and the threads have a process group of their own. One checkpoint is in flight; the next
waits for it. A rank can tell by itself that a thread has ended, but not when its peers see that: so the loop takes the
outcome at steps that all ranks have agreed on, and it is the same on all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.runs.run import Run
from raylway.train import chunks, failures, messages
from raylway.train.checkpoint import (
    AVERAGE,
    FORMAT,
    MANIFEST,
    MODEL,
    NAME,
    STATE,
    Checkpoint,
    Manifest,
    State,
    candidates,
    name,
    opened,
    replaced_by,
)
from raylway.train.chunks import File, Part, place_of
from raylway.train.progress import Progress
from raylway.train.strategy import Groups, local

if TYPE_CHECKING:
    from raylway.train.worker import Start

_REFUSALS = (OSError, UserError, RunFailed)
"""What a storage says that is full, out of reach, or closed to us. All else is a fault."""
_LINGER_S = 60.0
"""How long a run that ends in an error lets the checkpoint in flight be finished."""


@dataclass(frozen=True)
class Ended:
    """What became of a checkpoint; the same on all ranks, but for the seconds."""

    name: str
    step: int
    error: str
    """Why it could not be written; empty: it is whole."""
    in_a_row: int
    """How many could not be written, this one included."""
    kept: Progress
    """In the newest checkpoint that is whole."""
    waited_s: float
    """That the loop waited for it."""


class _Message(msgspec.Struct, frozen=True):
    """What a rank has written, or why not."""

    files: list[File] = []
    error: str = ""
    not_finite: str = ""


msgspec.json.Decoder(_Message)  # before threads do, as in `failures`


@dataclass
class _Flight:
    """A checkpoint that is being written."""

    name: str
    state: State
    parts: dict[str, Part]
    thread: threading.Thread | None = None
    error: str = ""
    fault: BaseException | None = None
    took_s: float = field(default=0.0)


class Checkpoints:
    """Writes the checkpoints of one attempt.

    Args:
        run: Its folder `checkpoints` is written; its record tells whether a later attempt has begun. Workers whose
            driver was killed may live on for a moment, and must not remove what their successors are reading.
        keep: How many of the newest stay; the best one always stays.
        start: Of this attempt. What it found broken is removed after the first save.
        groups: All ranks.
        progress: Where this attempt begins.
        sync: Puts what the metrics have so far on the disk.
    """

    def __init__(
        self, run: Run, keep: int, start: Start, groups: Groups, progress: Progress, sync: Callable[[], None]
    ) -> None:
        self._run, self._keep, self._start, self._groups, self._sync = run, keep, start, groups, sync
        self._kept = progress
        self._memory: dict[str, torch.Tensor] = {}
        self._flight: _Flight | None = None
        self._failed: _Flight | None = None
        self._failures = 0
        self._took_s = float("inf")
        self._stalled_s = 0.0
        self._went_on_at = time.monotonic()
        self.written = start.checkpoint
        """The newest folder that is whole; empty for none."""

    def save(self, tensors: dict[str, torch.Tensor], state: State) -> None:
        """Begin to write one checkpoint. All ranks call it at the same step, with none in flight.

        Returns when the tensors may change again. Rank 0 writes the manifest after all parts are there, and removes
        old checkpoints after that.

        The first of a start is waited for, so that a storage that can't be written shows at once; and so is one if the
        last took longer than the steps since: to go on would gain nothing, and a kill would cost more than the steps
        between two.

        Args:
            tensors: From `tensors_of`.
            state: As of this step; rank 0's is written.
        """
        assert self._flight is None
        started_at = time.monotonic()
        trained_s = started_at - self._went_on_at - self._stalled_s
        parts = self._copied(_share(tensors, self._groups))
        self._send(_Flight(name(state.progress.step, self._start.attempt), state, parts))
        if self._took_s > trained_s:
            self._wait()
        self._went_on_at = time.monotonic()
        self._stalled_s += self._went_on_at - started_at

    def settle(self) -> Ended | None:
        """What became of the checkpoint in flight, after it has ended; None if there is none.

        All ranks call it at the same step.

        Raises:
            RunFailed: The weights are not finite.
            Exception: A fault: a peer is lost, or a later attempt has taken over this run.
        """
        flight = self._flight
        if flight is None:
            return None
        waited_s = self._wait()
        self._stalled_s += waited_s
        self._flight, self._took_s = None, flight.took_s
        if flight.fault is not None:
            raise flight.fault
        if flight.error:
            self._failed, self._failures = flight, self._failures + 1
        else:
            self._failed, self._failures = None, 0
            self._kept, self.written = flight.state.progress, flight.name
        step = flight.state.progress.step
        return Ended(flight.name, step, flight.error, self._failures, self._kept, waited_s)

    def again(self) -> bool:
        """Begin once more with what could not be written; False if all is well. All ranks call it at once."""
        flight, self._failed = self._failed, None
        if flight is None:
            return False
        self._send(_Flight(flight.name, flight.state, flight.parts))
        return True

    @property
    def has_ended(self) -> bool:
        """The one in flight is waiting to be settled."""
        thread = self._flight.thread if self._flight else None
        return thread is not None and not thread.is_alive()

    def stalled_s(self) -> float:
        """Seconds that the loop stood still for checkpoints since this was asked last."""
        stalled_s, self._stalled_s = self._stalled_s, 0.0
        return stalled_s

    def close(self) -> None:
        """Let the one in flight be finished, if it can be: the run ends, and perhaps with an error."""
        if self._flight and self._flight.thread:
            self._flight.thread.join(_LINGER_S)

    def opened(self, name: str) -> Checkpoint:
        """One of this run's checkpoints, after it was found to be whole."""
        return opened(self._run.checkpoints / name)

    def name_of(self, step: int) -> str:
        """The folder that `save` makes for a step."""
        return name(step, self._start.attempt)

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
        """Copies in host memory, which is used again by the next save."""
        parts = {}
        for key, tensor in tensors.items():
            source = local(tensor).detach()
            held = self._memory.get(key)
            if held is None or (held.shape, held.dtype) != (source.shape, source.dtype):
                held = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._memory[key] = held
            held.copy_(source, non_blocking=True)
            parts[key] = Part(held, [start for start, _ in place_of(tensor)])
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return parts

    def _send(self, flight: _Flight) -> None:
        # A daemon: a process that must end does not wait for a storage that answers no more.
        flight.thread = threading.Thread(target=self._fly, args=(flight,), name="checkpoint", daemon=True)
        self._flight = flight
        flight.thread.start()

    def _wait(self) -> float:
        assert self._flight and self._flight.thread
        started_at = time.monotonic()
        self._flight.thread.join()
        return time.monotonic() - started_at

    def _fly(self, flight: _Flight) -> None:
        started_at = time.monotonic()
        try:
            flight.error = self._write(flight)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that settles
            flight.fault = error
        flight.took_s = time.monotonic() - started_at

    def _write(self, flight: _Flight) -> str:
        """In the threads of all ranks at once: write a checkpoint; returns why it could not be, on all alike."""
        final, rank = self._run.checkpoints / flight.name, self._groups.rank
        mine = msgspec.json.encode(self._write_mine(final, flight.parts))
        heard = [msgspec.json.decode(each, type=_Message) for each in messages.gathered(mine, self._groups.save)]
        bad = next((each.not_finite for each in heard if each.not_finite), "")
        error = next((each.error for each in heard if each.error), "")
        if rank == 0 and not bad and not error:
            error = self._finish(final, flight.state, [file for each in heard for file in each.files])
        if rank == 0 and (bad or error):
            with suppress(*_REFUSALS):
                _remove(final)
        error = messages.from_rank_0(error.encode(), self._groups.save).decode()
        if bad:
            raise RunFailed(
                f"training stopped after step {flight.state.progress.step}: {bad} is not finite, so the next loss "
                f"would be nan; no checkpoint was written. Lower train.optimizer.lr, set train.clip, or add a warm-up"
            )
        if rank == 0:
            with suppress(*_REFUSALS):  # what is left goes the next time
                if error:
                    self._run.log("checkpoint failed", checkpoint=flight.name, reason=error)
                else:
                    self._tidy(flight.state.progress)
        return error

    def _write_mine(self, final: storage.Place, parts: dict[str, Part]) -> _Message:
        """Write this rank's part under a name of its own, then move it into the checkpoint's folder."""
        rank = self._groups.rank
        if bad := not_finite({key: part.tensor for key, part in parts.items()}):
            return _Message(not_finite=bad)
        try:
            if rank == 0 and self._taken_over():
                raise RuntimeError("a later attempt has taken over this run")
            if not parts:
                return _Message()
            with storage.scratch(self._run.checkpoints, f"{final.name}-r{rank}") as folder:
                staged = folder / f"rank-{rank:05d}.safetensors"
                file = chunks.write(staged, parts)
                storage.move(staged, final / staged.name)
        except _REFUSALS as error:
            return _Message(error=_words(error))
        return _Message([file])

    def _finish(self, final: storage.Place, state: State, files: list[File]) -> str:
        """Write the rest, the manifest last; returns why it could not be."""
        try:
            self._sync()
            with storage.scratch(self._run.checkpoints, f"{final.name}-state") as folder:
                staged = folder / STATE
                storage.write_record(staged, state)
                files = [*files, File(STATE, staged.stat().st_size, storage.checksum(staged))]
                storage.move(staged, final / STATE)
            record = Manifest(FORMAT, state.progress.step, self._start.attempt, files)
            storage.write_record(final / MANIFEST, record)
            if isinstance(self._run.checkpoints, Path):
                storage.sync_folder(self._run.checkpoints)
        except _REFUSALS as error:
            return _words(error)
        return ""

    def _tidy(self, progress: Progress) -> None:
        """Remove old checkpoints and what earlier attempts left unfinished. Only after that of `progress` is whole.

        What a later attempt writes is not touched, nor the next checkpoint, which the peers may have begun.
        """
        if self._taken_over():
            return
        folder, starts = self._run.checkpoints, failures.starts(self._run)
        whole = [path.name for path in candidates(folder) if (path / MANIFEST).exists()]
        good = [found for found in whole if found not in self._start.broken and replaced_by(found, starts) is None]
        kept = {progress.best_checkpoint, progress.anchor, *good[-self._keep :]}
        for path in storage.children(folder):
            match = NAME.search(path.name)
            is_old = match and (int(match[2]), int(match[1])) <= (self._start.attempt, progress.step)
            if is_old and path.name not in kept:
                _remove(path)

    def _taken_over(self) -> bool:
        return failures.latest(self._run) > self._start.attempt


def not_finite(tensors: dict[str, torch.Tensor]) -> str:
    """The first weight that is no finite number, or nothing.

    A finite gradient can still overflow the weights (a learning rate of 1e30); such weights are never kept.
    """
    for key, tensor in tensors.items():
        is_weight = key.startswith((MODEL, AVERAGE)) and tensor.is_floating_point() and tensor.numel()
        # Ten times as fast as `isfinite` of each number; what is no number wins against all others.
        if is_weight and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            return key.removeprefix(MODEL)
    return ""


def _share(tensors: dict[str, torch.Tensor], groups: Groups) -> dict[str, torch.Tensor]:
    """What this rank writes: of ranks that hold the same part of a tensor one does, and each has about as many bytes.

    Equal for all ranks, so nobody has to ask another.
    """
    copies, copy = groups.workers // groups.division.parts, groups.rank // groups.division.parts
    is_apart = groups.part == 0 or groups.division.kind == "pipeline"
    mine = {key: tensor for key, tensor in tensors.items() if is_apart or _is_divided(tensor)}
    loads = [0] * copies
    share = {}
    for key in sorted(mine, key=lambda key: (-local(mine[key]).nbytes, key)):
        lightest = loads.index(min(loads))
        loads[lightest] += local(mine[key]).nbytes
        if lightest == copy:
            share[key] = mine[key]
    return share


def _is_divided(tensor: torch.Tensor) -> bool:
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def _remove(folder: storage.Place) -> None:
    """Without its manifest a half-removed folder is no checkpoint."""
    storage.remove(folder / MANIFEST)
    storage.remove(folder)


def _words(error: Exception) -> str:
    return f"{error.what}: {error.found}" if isinstance(error, UserError) else str(error)
