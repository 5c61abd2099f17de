"""How many rows pass at once: what `train.microbatch: auto` comes to, and what becomes of a pass that does not fit.

Such a pass ends the attempt, on all ranks, because its peers wait for what it will never send. The record says which
microbatch it was, and the next start takes a smaller one: the largest that fits of 1, 2, 4, ... up to half of it, found
by passes over real rows. A GPU's first start looks like this too, up to a worker's share of the batch. A CPU's begins
with the plan's number: memory that it does not have is mostly promised to it all the same, so trying finds no limit
there, and larger passes are no faster. Ranks that hold one copy of the model together exchange something in every pass;
there it is half, and half again, until a start goes on.

The gradient does not depend on any of it (`step.forward_backward`).
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from raylway.errors import UserError
from raylway.job.schema import Job
from raylway.runs.run import Run
from raylway.train import failures
from raylway.train.feed.order import num_microbatches
from raylway.train.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from raylway.train.feed.loader import Microbatch
    from raylway.train.strategy import Groups

_CHOSEN = "microbatch chosen"
_REFUSALS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In a RuntimeError: of torch's allocator for the CPU, of CUDA itself, and of its library for matrices."""
_MOMENTS = 2
"""Adam's: tensors as large as the weights, which a search makes room for because the first step will make them."""
_LESS = "make the model smaller, divide it among workers (train.parallel), or use machines with more memory"


class Chosen(msgspec.Struct, frozen=True):
    """What all ranks begin an attempt with."""

    microbatch: int
    search: bool = False
    """It is the most; the largest that fits is to be found."""


class PassTooLarge(Exception):
    """Memory did not hold the rows of one forward and backward pass."""

    def __init__(self, rows: int, refusal: str) -> None:
        super().__init__(f"{rows:,} rows at once do not fit into memory: {refusal}")
        self.rows, self.refusal = rows, refusal


def refusal(error: BaseException | None) -> str | None:
    """What the allocator said, if that is what an error came of; torch's pipelines raise another error over it."""
    while error is not None and not _is_refusal(error):
        error = error.__cause__
    return None if error is None else next(iter(str(error).splitlines()), type(error).__name__)


def _is_refusal(error: BaseException) -> bool:
    # By its name: torch's own is no class of Python's, and the driver has not imported torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS)


@contextmanager
def passing(rows: int) -> Iterator[None]:
    """Around passes of at most so many rows.

    Raises:
        PassTooLarge: Memory refused something inside.
    """
    try:
        yield
    except Exception as error:
        if (words := refusal(error)) is not None:
            raise PassTooLarge(rows, words) from error
        raise


def first(job: Job, plan: Plan, run: Run, saved: int | None) -> Chosen:
    """What rank 0 tells all ranks to begin with: what the run has, or less if that did not fit.

    Args:
        job: Says whether it is `auto`.
        plan: Of this command.
        run: Its events have what was chosen and what did not fit.
        saved: In the checkpoint that the run goes on from.
    """
    chosen = [found.microbatch for found in failures.events_of(run, _CHOSEN, Chosen)]
    known = chosen[-1] if chosen else saved
    microbatch = known or plan.microbatch
    if plan.division.kind == "pipeline":
        microbatch = min(microbatch, plan.microbatch)  # with fewer passes than stages it does not work
    if job.train.microbatch != "auto":
        return Chosen(microbatch)
    can_search = plan.division.kind == "none"
    failed = [found.microbatch for found in failures.recorded(run) if found.kind == "memory"]
    if failed and min(failed) <= microbatch:
        return Chosen(max(1, min(failed) // 2), can_search)
    return Chosen(microbatch, can_search and known is None and bool(plan.gpus_per_worker))


def keep(run: Run, attempt: int, planned: int, plan: Plan) -> str:
    """Record a plan's microbatch, if it is not the run's already. Called by rank 0 only.

    Args:
        run: The run.
        attempt: That has it.
        planned: The microbatch that the command announced.
        plan: What it came to.

    Returns:
        What the user should hear; nothing if all is as announced.
    """
    chosen = [found.microbatch for found in failures.events_of(run, _CHOSEN, Chosen)]
    if chosen[-1:] == [plan.microbatch]:
        return ""
    run.log(_CHOSEN, attempt=attempt, microbatch=plan.microbatch, accumulation=plan.accumulation)
    if plan.microbatch >= planned:
        return ""
    return f"microbatch {plan.microbatch:,} x {plan.accumulation:,}: more rows at once do not fit into memory"


def with_microbatch(plan: Plan, microbatch: int) -> Plan:
    passes = num_microbatches(plan.global_batch, plan.needed_workers // plan.division.sharers, microbatch)
    return msgspec.structs.replace(plan, microbatch=microbatch, accumulation=passes)


def agreed(
    module: nn.Module,
    most: int,
    sample: Callable[[int], Microbatch],
    step: Callable[[Microbatch], None],
    groups: Groups,
) -> int:
    """The largest microbatch that fits on every rank. All ranks call it at once, before they share the model.

    Args:
        module: On its device; afterwards it is as before.
        most: Rows.
        sample: Any so many rows.
        step: A forward and backward pass through the module.
        groups: All ranks.

    Raises:
        UserError: A rank has no memory for a single row.
    """
    from raylway.train import messages

    found = largest(module, most, sample, step, copies=_MOMENTS + (groups.workers > 1))
    least = min(int(each) for each in messages.gathered(str(found).encode(), groups.save))
    if not least:
        raise not_even_one()
    return least


def largest(
    module: nn.Module, most: int, sample: Callable[[int], Microbatch], step: Callable[[Microbatch], None], copies: int
) -> int:
    """The largest of 1, 2, 4, ... and `most` rows whose pass fits into memory beside some copies of the weights; 0 if
    not one row does. Gradients stay from pass to pass, as they do under accumulation."""
    import torch

    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    room: list[torch.Tensor] = []
    found, size = 0, 1
    try:
        with passing(size):
            room.extend(torch.empty_like(weight) for weight in module.parameters() for _ in range(copies))
            while found < most:
                size = min(size, most)
                step(sample(size))
                found, size = size, 2 * size
    except PassTooLarge as error:
        traceback.clear_frames(error.__cause__.__traceback__)  # type: ignore[union-attr]  # it always has one
    room.clear()
    module.zero_grad(set_to_none=True)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def not_even_one() -> UserError:
    return UserError(
        "the memory is not enough to train this model on a single row at a time",
        where="train.microbatch",
        expected="room for weights, gradients, the optimizer's state and one row's pass",
        fix=_LESS,
    )


def as_users(error: Exception) -> Exception:
    """What the user is told about memory that was not enough, in a pass or elsewhere; of another error, itself."""
    if not isinstance(error, PassTooLarge):
        words = refusal(error)
        return (
            error
            if words is None
            else UserError(
                "the memory is not enough for the weights, the gradients and the optimizer's state",
                where="train",
                found=words,
                fix=_LESS,
            )
        )
    if error.rows == 1:
        return not_even_one()
    return UserError(
        f"the memory is not enough for a pass of {error.rows:,} rows",
        where="train.microbatch",
        found=error.refusal,
        fix="lower train.microbatch, or leave it out (auto): the global batch and its gradient stay the same",
    )
