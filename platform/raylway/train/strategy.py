"""How a plain model becomes one that many workers train: data parallel today; the model itself names no group."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from raylway.errors import UserError

TIMEOUT_S = 300
"""A rank that waits longer than this for its peers gives up; the worker group then starts again."""


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
    """Gloo, for checkpoints: it works beside the other one and from the CPU."""

    @classmethod
    def create(cls) -> Groups:
        """Called by all ranks at once, after `init_process_group`."""
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            dist.new_group(timeout=timeout),
            dist.new_group(timeout=timeout, backend="gloo"),
        )


@dataclass(frozen=True)
class Parallel:
    """A model as the step calls it."""

    module: nn.Module
    """The plain model: its parameters are what is saved."""
    forward: nn.Module
    workers: int

    def sync(self, wanted: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of one microbatch.

        Args:
            wanted: Add up the gradients of all ranks in this backward pass; all ranks must say the same. True for the
                last microbatch of a step only: the sum of the gradients before it then travels once.
        """
        if wanted or not isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()


def parallel(module: nn.Module, groups: Groups) -> Parallel:
    """Wrap a model for data-parallel training. All ranks call it at once; rank 0's weights win."""
    if groups.workers == 1:
        return Parallel(module, module, 1)
    # `find_unused_parameters` also keeps DDP from laying out its buckets anew after the first step. Their layout
    # decides the order in which three or more ranks add, so a resumed run would otherwise differ in its last bits.
    wrapped = nn.parallel.DistributedDataParallel(module, process_group=groups.step, find_unused_parameters=True)
    return Parallel(module, wrapped, groups.workers)


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
