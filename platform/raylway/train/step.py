"""The parts of one step: loss over rows, accumulated gradients, and the one exchange in which all ranks agree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from raylway.features.signature import Task
from raylway.train.clock import Clock, Own
from raylway.train.feed.loader import Batch, Microbatch
from raylway.train.memory import passing
from raylway.train.strategy import Groups, Parallel


class Wish(NamedTuple):
    """What a rank would like to happen after this step; one rank's wish is enough."""

    save: bool = False
    stop: bool = False
    settle: bool = False
    """The checkpoint that was being written has ended, well or not."""


class Agreed(NamedTuple):
    """What all ranks know after the exchange; equal on all of them."""

    loss: float
    """Sum over the rows of the global batch, each with its weight, divided by their number."""
    finite: bool
    """The loss and the gradient's norm are finite numbers on every rank."""
    wish: Wish
    batch: int
    """Tells which rows the global batch had (`feed.loader.Batch.digest`)."""
    own: np.ndarray
    """float64 [workers, 2]: each rank's `clock.Own`."""

    def times(self) -> dict[str, float]:
        """Of a step, for its line: the longest wait for rows, and with several ranks the one that worked longest."""
        wait, work = self.own.T
        found = {"data_s": float(wait.max())}
        if len(work) > 1:
            slowest = int(work.argmax())
            found |= {
                "slowest_rank": slowest,
                "slowest_s": float(work[slowest]),
                "median_s": float(np.sort(work)[(len(work) - 1) // 2]),
            }
        return found


def seed_random(device: torch.device, seed: int) -> None:
    """Seed what dropout draws from. Not by `torch.manual_seed`: that formats a stack trace for each kind of device that
    is not there, 0.8 ms a call."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def row_losses(task: Task, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Loss of each row, at least float32.

    Args:
        task: Cross-entropy for classification, squared error for regression.
        output: [N, K] logits, or [N] or [N, 1] standardised values.
        target: int64 [N] class codes, or float64 [N] standardised values.
    """
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if task == "classification":
        return F.cross_entropy(output, target, reduction="none")
    return F.mse_loss(output.reshape(target.shape), target.to(output.dtype), reduction="none")


def forward_backward(model: Parallel, batch: Batch, task: Task, clock: Clock) -> torch.Tensor:
    """Leave in the parameters the (scaled) gradient of the global batch's loss; return this rank's sum of losses.

    The loss is sum(weight * loss of the row) / rows of the step, without `data.balance` the mean over the rows.
    DDP takes the mean over ranks of what each rank has, so each rank's sum is multiplied by workers / rows of the whole
    step; the other strategies add. That makes it the gradient of the one big batch, however its rows are divided. All
    ranks must call it: they exchange gradients, and wait for a missing rank until the timeout.

    Returns:
        float64 scalar on the model's device; of ranks that share their rows one has the sum, the others 0.

    Raises:
        PassTooLarge: Memory did not hold a microbatch.
    """
    total = torch.zeros((), dtype=torch.float64, device=batch.microbatches[0].target.device)

    def loss(output: torch.Tensor, rows: Microbatch) -> torch.Tensor:
        losses = (row_losses(task, output, rows.target) * rows.weight).sum()
        if model.has_loss:
            total.add_(losses.detach())
        if model.groups.parts is None:  # ranks that hold parts of one copy wait for one another within a pass
            clock.worked()
        return model.precision.scaler.scale(losses * (model.mean_over / batch.num_rows))

    with passing(max(len(rows.target) for rows in batch.microbatches)):
        model.accumulate(batch.microbatches, loss)
    return total


def agree(
    groups: Groups, loss_sum: torch.Tensor, norm: torch.Tensor, num_rows: int, digest: int, wish: Wish, own: Own
) -> Agreed:
    """One small all-reduce: afterwards every rank decides the same. All ranks call it once a step.

    Args:
        groups: All ranks.
        loss_sum: This rank's, float64 scalar.
        norm: Of the gradient.
        num_rows: Rows of the step over all ranks.
        digest: Of this rank's rows (`feed.loader.Batch`); of ranks that share their rows one has it, the others 0.
        wish: This rank's.
        own: This rank's time.
    """
    finite = torch.isfinite(loss_sum) & torch.isfinite(norm)
    mine = torch.tensor([*wish, digest, *own], dtype=torch.float64, device=loss_sum.device)
    count = 3 + len(wish)
    facts = torch.zeros(count + 2 * groups.workers, dtype=torch.float64, device=loss_sum.device)
    facts[0], facts[1], facts[2:count] = loss_sum, ~finite, mine[:-2]
    facts[count + 2 * groups.rank :][:2] = mine[-2:]
    if groups.workers > 1:
        dist.all_reduce(facts, group=groups.step)
    facts = facts.cpu()
    loss, not_finite, *wishes, digest = facts[:count].tolist()
    table = facts[count:].numpy().reshape(-1, 2)
    return Agreed(loss / num_rows, not not_finite, Wish(*map(bool, wishes)), int(digest), table)
