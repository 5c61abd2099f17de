"""One copy of the model on several ranks: its weights in shards (FSDP2), or its layers by columns and rows.

Both turn parameters into DTensors, which know their place in the whole; checkpoints are written and read by that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from raylway.models.mlp import Mlp
from raylway.train.strategy import Groups


def shard(module: nn.Module, groups: Groups) -> None:
    """Leave on each rank its part of every parameter (ZeRO stage 3: Rajbhandari et al. 2020; torch's FSDP2).

    A layer's weights are gathered when it runs. Gradients are added up after each microbatch, so no rank ever holds
    those of the whole model; with more ranks than shards each shard has copies.
    """
    mesh = _mesh(module, groups)
    for layer in [*(layer for layer in module.modules() if isinstance(layer, nn.Linear)), module]:
        sharded = fully_shard(layer, mesh=mesh)
        # Sums, not means over ranks: the loss is already divided by the rows of the step. Gloo knows no other way.
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)


def tensor(module: nn.Module, groups: Groups) -> None:
    """Divide each pair of linear layers: columns of the first, rows of the second (Megatron-LM: Shoeybi et al. 2019).

    What lies between them stays on its rank, so a pair costs one exchange in each direction. A last layer without a
    partner is divided by rows. Embeddings are whole on every rank.
    """
    assert isinstance(module, Mlp)
    assert groups.parts is not None
    mesh = DeviceMesh.from_group(groups.parts, _device(module).type)
    styles: dict[str, ParallelStyle] = {}
    layers = dict(module.layers.named_children())
    last, is_divided = list(layers)[-1], False
    for name, layer in layers.items():
        if isinstance(layer, nn.Dropout) and is_divided:
            setattr(module.layers, name, PartOfDropout(layer.p, groups.part, groups.division.parts))
        elif isinstance(layer, nn.Linear) and is_divided:
            styles[name], is_divided = RowwiseParallel(), False
        elif isinstance(layer, nn.Linear) and name == last:
            styles[name] = RowwiseParallel(input_layouts=Replicate())
        elif isinstance(layer, nn.Linear):
            styles[name], is_divided = ColwiseParallel(), True
    parallelize_module(module.layers, mesh, styles)
    for embedding in module.embeddings:
        distribute_module(embedding, mesh, input_fn=_everywhere, output_fn=_as_plain)  # type: ignore[arg-type]


class PartOfDropout(nn.Module):
    """Dropout of a layer whose columns are divided: each rank draws for the whole layer and uses its own columns.

    So ranks that share their random numbers drop what one process would, and no unit is dropped together with another.

    Args:
        share: Share of units that is dropped in training.
        part: Which of the parts this rank has.
        parts: In how many equal parts the columns are.
    """

    def __init__(self, share: float, part: int, parts: int) -> None:
        super().__init__()
        self._share, self._part, self._parts = share, part, parts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden: [N, width / parts]
        """
        if not self.training:
            return hidden
        whole = hidden.new_ones(len(hidden), hidden.shape[1] * self._parts)
        return hidden * F.dropout(whole, self._share).chunk(self._parts, dim=1)[self._part]


def _mesh(module: nn.Module, groups: Groups) -> DeviceMesh:
    """Over the ranks of a copy, or copies by parts (HSDP)."""
    assert groups.parts is not None
    device = _device(module).type
    if groups.copies is None:
        return DeviceMesh.from_group(groups.parts, device)
    ranks = torch.arange(groups.workers).view(-1, groups.division.parts)
    return DeviceMesh.from_group([groups.copies, groups.parts], device, mesh=ranks, mesh_dim_names=("copies", "parts"))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _everywhere(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    return tuple(DTensor.from_local(each, mesh, [Replicate()], run_check=False) for each in inputs)


def _as_plain(module: nn.Module, output: Any, mesh: DeviceMesh) -> torch.Tensor:
    found: torch.Tensor = output.to_local()
    return found
