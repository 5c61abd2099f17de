"""How a plain model becomes one that many workers train; the model itself names no group.

Whole copies (DDP) are made here; `split` divides a copy by weights or by layers' columns, `pipelined` by layers.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from raylway.errors import UserError
from raylway.train.division import Division
from raylway.train.feed.loader import Microbatch
from raylway.train.plan import Plan
from raylway.train.precision import Precision

TIMEOUT_OVER_LIMIT = 1.25
"""A rank that waits so many times the watchdog's limit for its peers gives up; the worker group then starts again."""

Loss = Callable[[torch.Tensor, Microbatch], torch.Tensor]
"""From the output for a microbatch and the microbatch to the scalar whose gradient is wanted."""


@dataclass(frozen=True)
class Groups:
    """The ranks of this run, in process groups of their own.

    Not the default group: importing torch._dynamo keeps a reference to that one, so that it outlives its destruction,
    and the peers of a rank that failed would wait for the timeout instead of failing at once.
    """

    rank: int
    workers: int
    step: dist.ProcessGroup
    """For gradients and what goes with them."""
    save: dist.ProcessGroup
    """Gloo, for the threads that write checkpoints (`saving`); for others only while none is being written."""
    division: Division
    parts: dist.ProcessGroup | None
    """The ranks of this copy of the model; None where each rank has a whole one."""
    copies: dist.ProcessGroup | None
    """The ranks that hold the same part of other copies; None where there is one copy only, or no parts."""

    @classmethod
    def create(cls, division: Division, hang_limit_s: float) -> Groups:
        """Called by all ranks at once, after `init_process_group`."""
        timeout = datetime.timedelta(seconds=TIMEOUT_OVER_LIMIT * hang_limit_s)
        rank, workers, count = dist.get_rank(), dist.get_world_size(), division.parts
        step, save = dist.new_group(timeout=timeout), dist.new_group(timeout=timeout, backend="gloo")
        parts = copies = None
        # Every rank takes part in making every group, in one order.
        for first in range(0, workers if count > 1 else 0, count):
            made = dist.new_group(list(range(first, first + count)), timeout=timeout)
            parts = made if first <= rank < first + count else parts
        for part in range(count if 1 < count < workers else 0):
            made = dist.new_group(list(range(part, workers, count)), timeout=timeout)
            copies = made if rank % count == part else copies
        return cls(rank, workers, step, save, division, parts, copies)

    @property
    def part(self) -> int:
        """Which part of a copy this rank holds."""
        return self.rank % self.division.parts

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank sees."""
        return self.rank // self.division.sharers

    @property
    def counts_rows(self) -> bool:
        """Of ranks that see the same rows one counts them."""
        return self.rank % self.division.sharers == 0

    @property
    def random_rank(self) -> int:
        """Ranks that compute one layer together draw the same random numbers, all others their own."""
        return self.data_rank if self.division.kind == "tensor" else self.rank


@dataclass(frozen=True)
class Parallel:
    """A model as the step calls it."""

    module: nn.Module
    """What this rank holds of the model, under the names of the whole one: its parameters are trained and saved."""
    forward: nn.Module
    shapes: dict[str, torch.Size]
    """Of the whole model's parameters and buffers."""
    groups: Groups
    precision: Precision
    alive: Callable[[], None]
    """Called before each forward pass; of the watchdog."""
    mean_over: int = 1
    """The exchange of gradients divides by this."""

    def accumulate(self, microbatches: Sequence[Microbatch], loss: Loss) -> None:
        """Forward and backward passes over a step: leaves the sum of the gradients of all ranks in the parameters.

        Args:
            microbatches: This rank's, as many as on every other rank.
            loss: Called once for each microbatch, on the ranks that have the model's output.
        """
        for index, rows in enumerate(microbatches):
            self.alive()
            with self.sync(index == len(microbatches) - 1):
                with self.precision.autocast():
                    output = self.forward(rows.numeric, rows.categorical)
                loss(output, rows).backward()
        self.add_copies()

    def sync(self, wanted: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of one microbatch.

        Args:
            wanted: Add up the gradients of all ranks in this backward pass; all ranks must say the same. True for the
                last microbatch of a step only: the sum of the gradients before it then travels once.
        """
        if wanted or not isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def add_copies(self) -> None:
        """Add up the gradients of the same part of other copies, where nothing else did."""
        if self.groups.copies is None or self.groups.division.sharers == 1:
            return
        gradients = [local(parameter.grad) for parameter in self.module.parameters() if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together, group=self.groups.copies)
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def output(self, rows: Microbatch) -> torch.Tensor | None:
        """The output without gradients; None on ranks whose peer has it. The peers of one copy call it at once."""
        self.alive()
        # The plain module: DDP's forward talks to the other copies, which may have fewer passes to make.
        with self.precision.autocast():
            output = self.module(rows.numeric, rows.categorical)
        return output if self.has_loss else None

    @property
    def has_loss(self) -> bool:
        """Of ranks that compute the same output one counts it."""
        return self.groups.division.kind != "tensor" or self.groups.part == 0

    def gradient_norm(self) -> torch.Tensor:
        """The 2-norm over all gradients of the whole model, equal on all ranks."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        if self.groups.parts is None:
            return nn.utils.get_total_norm(gradients)
        divided = [local(gradient) for gradient in gradients if self._is_divided(gradient)]
        common = [local(gradient) for gradient in gradients if not self._is_divided(gradient)]
        square = nn.utils.get_total_norm(divided).double().square()
        dist.all_reduce(square, group=self.groups.parts)
        return (square + nn.utils.get_total_norm(common).double().square()).sqrt()

    def _is_divided(self, tensor: torch.Tensor) -> bool:
        placements = getattr(tensor, "placements", None)
        # Under HSDP the shards are the last dimension of the mesh; a pipeline's tensors are plain, and its own.
        return placements is None or placements[-1].is_shard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that ranks share, or the tensor; they share memory."""
    # By its method: importing DTensor's module takes time that a plain run need not spend.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def parallel(
    module: nn.Module, groups: Groups, plan: Plan, precision: Precision, alive: Callable[[], None]
) -> Parallel:
    """Wrap a model for training by all ranks; they call it at once, each with the same whole model.

    Args:
        module: On its device. What it becomes takes its place: use the result's `module` from here on.
        groups: This run's.
        plan: Its division says how.
        precision: For the forward passes.
        alive: Called before each of them.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    match groups.division.kind:
        case "pipeline":
            from raylway.train.pipelined import pipelined

            return pipelined(module, shapes, groups, plan, precision, alive)
        case "shard" | "tensor" as kind:
            from raylway.train import split

            (split.shard if kind == "shard" else split.tensor)(module, groups)
            return Parallel(module, module, shapes, groups, precision, alive)
    forward = _compiled(module) if plan.compile else module
    if groups.workers == 1:
        return Parallel(module, forward, shapes, groups, precision, alive)
    # `find_unused_parameters` also keeps DDP from laying out its buckets anew after the first step. Their layout
    # decides the order in which three or more ranks add, so a resumed run would otherwise differ in its last bits.
    wrapped = nn.parallel.DistributedDataParallel(forward, process_group=groups.step, find_unused_parameters=True)
    return Parallel(module, wrapped, shapes, groups, precision, alive, mean_over=groups.workers)


def _compiled(module: nn.Module) -> nn.Module:
    from raylway.train.compiled import Compiled

    return Compiled(module)


def refuse_batch_norm(module: nn.Module) -> None:
    """Batch normalisation mixes the rows of a microbatch, so no split of a batch would give the batch's gradient.

    Raises:
        UserError: A layer would learn from batch statistics; one that the builder left in eval mode is frozen and fine.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise UserError(
                "batch normalisation makes the result depend on how a batch is divided",
                where=f"layer {name!r} of the model",
                expected="LayerNorm or GroupNorm, or a BatchNorm that is frozen: layer.eval() where the model is built",
                found=type(layer).__name__,
            )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each layer is in its own mode again, so frozen layers stay frozen."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, mode in modes:
            layer.training = mode
