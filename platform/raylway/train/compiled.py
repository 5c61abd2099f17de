"""`model.compile`: the forward and backward pass of a copy of the model as one compiled graph, or a reason why not.

The graph is made before the first step, from rows that count nothing, so that no step waits for the compiler. All
microbatches have one shape (`feed.loader.Share.padded`), so it is made once. Dropout draws what it draws without
compiling, where no microbatch is filled up. What can't be compiled runs as it is, on all ranks alike, and the run says
so. Validation is not compiled: its passes have other shapes and no gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raylway.train import messages
from raylway.train.feed.loader import Microbatch
from raylway.train.strategy import Parallel

_USERS_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


class Compiled(nn.Module):
    """Calls a module through its compiled graph, until that does not work.

    Args:
        module: Stays as it is; its parameters are those of the graph.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.reason = ""
        """Why the graph was given up; empty while it is used."""
        self.tell: Callable[[str], None] = _nobody

        def call(*inputs: torch.Tensor) -> torch.Tensor:
            return module(*inputs)

        # Without its own draws for dropout the compiler gives what the plain module gives.
        self._graph: Any = torch.compile(call, fullgraph=True, dynamic=False, options={"fallback_random": True})

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the module gives."""
        if not self.reason:
            try:
                return self._graph(*inputs)
            except _failures() as error:
                self.give_up(_why(error))
        return self.module(*inputs)

    def give_up(self, reason: str) -> None:
        """From now on call the module itself."""
        self.reason = reason
        self.tell(reason)


def warm_up(model: Parallel, rows: Microbatch, tell: Callable[[str], None]) -> None:
    """Compile forward and backward pass; if that fails on any rank, all of them do without. All ranks call it at once.

    Args:
        model: Its weights, buffers and gradients stay as they are.
        rows: Of the shape of all microbatches.
        tell: Called with the reason where the graph is given up: on rank 0 now, on a rank of its own at a later step.
    """
    found = next(module for module in model.forward.modules() if isinstance(module, Compiled))
    buffers = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    try:
        with model.sync(False):
            with model.precision.autocast():
                output = model.forward(rows.numeric, rows.categorical)
            output.sum().backward()
    except _failures() as error:  # the graph of the backward pass is made by the first one
        found.give_up(_why(error))
    model.module.zero_grad()
    for name, buffer in model.module.named_buffers():
        buffer.copy_(buffers[name])
    reasons = [reason.decode() for reason in messages.gathered(found.reason.encode(), model.groups.save)]
    if any(reasons):
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        found.give_up(reason if model.groups.workers == 1 else f"rank {rank}: {reason}")
        if model.groups.rank == 0:
            tell(found.reason)
    found.tell = tell


def _nobody(reason: str) -> None:
    pass


def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def _why(error: Exception) -> str:
    """The first line of the compiler's message, and where in the user's model it was."""
    text = str(error).strip() or type(error).__name__
    frames = _USERS_FRAME.findall(text.partition("from user code")[2])
    place = f" ({frames[-1][0]}:{frames[-1][1]} in {frames[-1][2]})" if frames else ""
    return text.splitlines()[0].rstrip(".") + place
