"""One copy of the model on several ranks, each with some of its layers; microbatches pass through them in turn.

The schedules are torch's: GPipe (Huang et al. 2019) makes all forward passes, then all backward passes; 1F1B (Narayanan
et al. 2019, as in PipeDream-Flush) follows each forward pass with a backward pass as soon as it can, and so holds no
more activations than there are stages. Both compute the same sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from raylway.models.mlp import Mlp, Stage
from raylway.train.feed.loader import Microbatch
from raylway.train.feed.order import num_microbatches, share
from raylway.train.plan import Plan
from raylway.train.precision import Precision
from raylway.train.strategy import Groups, Loss, Parallel

_SCHEDULES: dict[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


def pipelined(
    module: nn.Module,
    shapes: dict[str, torch.Size],
    groups: Groups,
    plan: Plan,
    precision: Precision,
    alive: Callable[[], None],
) -> Parallel:
    """This rank's stage of a model; the layers are divided evenly by their number.

    Args:
        module: The whole model.
        shapes: Of all its parameters.
        groups: This run's.
        plan: Schedule, and rows and number of microbatches.
        precision: For the forward passes.
        alive: Called before each of them.
    """
    assert isinstance(module, Mlp)
    count = sum(isinstance(layer, nn.Linear) for layer in module.layers)
    stage = Stage(module, *share(count, groups.part, groups.division.parts))
    passes = num_microbatches(plan.global_batch, plan.data_ranks, plan.microbatch)
    rows = -(-plan.global_batch // plan.data_ranks)
    flow = _Flow(stage, groups, _Passed(stage, precision, alive), passes, -(-rows // passes))
    return Pipelined(stage, stage, shapes, groups, precision, alive, flow=flow)


@dataclass(frozen=True)
class Pipelined(Parallel):
    """A stage as the step calls it."""

    flow: _Flow | None = None

    def accumulate(self, microbatches: Sequence[Microbatch], loss: Loss) -> None:
        assert self.flow is not None
        self.flow.step(microbatches, loss)
        self.add_copies()

    def output(self, rows: Microbatch) -> torch.Tensor | None:
        assert self.flow is not None
        return self.flow.forward(rows)


class _Flow:
    """The passes of a stage among its peers.

    Every step makes the same number of passes over the same number of rows, because peers lay out their buffers once:
    short microbatches are filled up with rows of zeros, short steps with microbatches of them, which no loss sees.

    Args:
        stage: This rank's.
        groups: This run's.
        passed: The stage, for the forward passes.
        passes: Microbatches in a step.
        rows: In a microbatch.
    """

    def __init__(self, stage: Stage, groups: Groups, passed: _Passed, passes: int, rows: int) -> None:
        self._stage, self._groups, self._passed = stage, groups, passed
        self._passes, self._rows = passes, rows
        self._schedule: Any = None
        self._loss: Loss | None = None
        self._microbatches: Sequence[Microbatch] = ()

    @property
    def _is_first(self) -> bool:
        return self._groups.part == 0

    @property
    def _is_last(self) -> bool:
        return self._groups.part == self._groups.division.parts - 1

    def step(self, microbatches: Sequence[Microbatch], loss: Loss) -> None:
        """All passes of one step. All ranks of the copy call it at once, with the same microbatches."""
        self._microbatches, self._loss = microbatches, loss
        inputs = self._inputs(microbatches)
        if self._schedule is None:
            self._schedule = self._begun([part[: self._rows] for part in inputs])
        target = torch.arange(self._passes) if self._is_last else None
        self._schedule.step(*(inputs if self._is_first else ()), target=target, return_outputs=False)

    def forward(self, rows: Microbatch) -> torch.Tensor | None:
        """The output for one microbatch on the last stage, None on the others."""
        part, parts = self._groups.part, self._groups.parts
        inputs: tuple[torch.Tensor, ...] = (rows.numeric, rows.categorical)
        if not self._is_first:
            inputs = (rows.numeric.new_empty(len(rows.target), self._stage.width_in, dtype=self._stage.dtype),)
            dist.recv(inputs[0], group=parts, group_src=part - 1)
        output: torch.Tensor = self._passed(*inputs)
        if self._is_last:
            return output
        dist.send(output, group=parts, group_dst=part + 1)
        return None

    def _inputs(self, microbatches: Sequence[Microbatch]) -> list[torch.Tensor]:
        """Numbers and categories of the step, [passes * rows, ...], filled up with zeros."""
        filled = []
        for parts in ([rows.numeric for rows in microbatches], [rows.categorical for rows in microbatches]):
            even = torch.cat([F.pad(part, (0, 0, 0, self._rows - len(part))) for part in parts])
            filled.append(F.pad(even, (0, 0, 0, self._passes * self._rows - len(even))))
        return filled

    def _begun(self, first: list[torch.Tensor]) -> Any:
        """The schedule. Shapes are told and not found out: else peers would send them to one another as pickles.

        Args:
            first: The inputs of a microbatch as the first stage has them.
        """
        shape, dtype, device = self._stage, self._stage.dtype, first[0].device

        def between(width: int) -> torch.Tensor:
            return torch.empty(self._rows, width, dtype=dtype, device=device, requires_grad=True)

        stage = PipelineStage(
            self._passed,
            self._groups.part,
            self._groups.division.parts,
            device,
            input_args=tuple(first) if self._is_first else (between(shape.width_in),),
            output_args=(between(shape.width_out),),
            group=self._groups.parts,
        )
        schedule = _SCHEDULES[self._groups.division.schedule]
        return schedule(stage, self._passes, loss_fn=self._loss_of, scale_grads=False)

    def _loss_of(self, output: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Of one microbatch, by its index: torch hands a loss function no more than one tensor beside the output."""
        assert self._loss is not None
        place = int(index)
        if place >= len(self._microbatches):
            return output.sum() * 0
        rows = self._microbatches[place]
        return self._loss(output[: len(rows.target)], rows)


class _Passed(nn.Module):
    """A stage with the number format of its forward pass only: a schedule makes backward passes in between."""

    def __init__(self, stage: Stage, precision: Precision, alive: Callable[[], None]) -> None:
        super().__init__()
        self._stage, self._precision, self._alive = stage, precision, alive

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self._alive()
        with self._precision.autocast():
            output: torch.Tensor = self._stage(*inputs)
        return output
