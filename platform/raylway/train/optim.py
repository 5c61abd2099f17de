"""The optimizer, and its learning rate as a pure function of the number of updates made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raylway.errors import UserError
from raylway.job import training
from raylway.train.plan import Plan

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
"""The last one is the base of batch and instance normalisation."""
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_FUSED_ON = ("cpu", "cuda")


def optimizer(model: nn.Module, wanted: training.Optimizer) -> torch.optim.Optimizer:
    """The job's optimizer over the parameters of a model, with torch's own defaults for what the job does not name.

    Weight decay is for the weights of layers: parameters of two dimensions or more, outside norms and embeddings. What
    norms and biases learn is no size to be kept small, and decay that is apart from the gradient would shrink the
    embedding of a category in every step, the more the rarer it is (as in the optimizers of OLMo 2, arXiv 2501.00656,
    and of rtdl, arXiv 2106.11959). There are always as many groups, even if one has no parameter.

    Raises:
        UserError: This torch has no such optimizer.
    """
    weights, others = _groups(model)
    fused = _fused([*weights, *others])

    def groups(decayed: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]

    match wanted.kind:
        case "adam":
            return torch.optim.Adam(groups(weights), wanted.lr, weight_decay=wanted.weight_decay, fused=fused)
        case "adamw":
            return torch.optim.AdamW(groups(weights), wanted.lr, weight_decay=wanted.weight_decay, fused=fused)
        case "sgd":
            return torch.optim.SGD(
                groups(weights), wanted.lr, wanted.momentum, weight_decay=wanted.weight_decay, fused=fused
            )
        case "muon":
            matrices = [parameter for parameter in weights if parameter.ndim == 2]
            rest = [parameter for parameter in weights if parameter.ndim != 2]
            # Its steps are as long as AdamW's (arXiv 2502.16982), so that one rate and decay fit both.
            muon = _muon()([{"params": matrices}], wanted.lr, wanted.weight_decay, adjust_lr_fn="match_rms_adamw")
            return MuonWithAdamW(
                muon, torch.optim.AdamW(groups(rest), wanted.lr, weight_decay=wanted.weight_decay, fused=fused)
            )


class MuonWithAdamW(torch.optim.Optimizer):
    """Optimizers of different parameters as one: their groups and their state are those of the whole."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of each part; a closure is not for this."""
        assert closure is None
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


def _groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters with weight decay, and those without."""
    spared = {
        parameter
        for layer in model.modules()
        if isinstance(layer, _NORMS + _EMBEDDINGS)
        for parameter in layer.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trained if parameter.ndim >= 2 and parameter not in spared]
    others = [parameter for parameter in trained if parameter.ndim < 2 or parameter in spared]
    return weights, others


def _fused(parameters: list[nn.Parameter]) -> bool | None:
    """True where torch updates all parameters in one kernel; else None, and torch takes `foreach` where the device has
    it. Parameters that are divided among ranks have no such kernel for every optimizer."""
    plain = all(
        parameter.device.type in _FUSED_ON and parameter.is_floating_point() and type(parameter.data) is torch.Tensor
        for parameter in parameters
    )
    return plain or None


def _muon() -> Any:
    found = getattr(torch.optim, "Muon", None)
    if found is None:
        raise UserError(
            "this torch has no muon",
            where="train.optimizer.kind",
            expected="adam, adamw or sgd, or torch 2.9 or later",
            found=f"torch {torch.__version__}",
        )
    return found


def clip(parameters: list[nn.Parameter], largest: float, norm: torch.Tensor) -> None:
    """Scale gradients down to a norm, as torch's `clip_grads_with_norm_` does it; those that are below it are not
    touched, where torch multiplies each number by 1.

    Args:
        parameters: Their gradients are scaled in place.
        largest: The norm that is allowed.
        norm: Of all gradients.
    """
    if largest / (norm + 1e-6) < 1:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def learning_rate(train: training.Train, plan: Plan, updates: int) -> float:
    """The rate of the next update.

    A skipped step makes no update, so the schedule does not move with it. The schedules are those of torch: `step` is
    StepLR, `cosine` is CosineAnnealingLR (Loshchilov, Hutter 2017) and `linear` LinearLR to 0, both from the end of the
    warm-up to the last step; `wsd` (warm-up, stable, decay; arXiv 2404.06395) is LinearLR to 0 over its last steps. The
    warm-up multiplies by (updates + 1) / warm-up steps, so that no update is wasted on a rate of zero.

    Args:
        train: The job's section.
        plan: Lengths in steps.
        updates: Updates made so far.
    """
    rate = train.optimizer.lr
    if updates < plan.warmup_steps:
        rate *= (updates + 1) / plan.warmup_steps
    length = max(1, plan.total_steps - plan.warmup_steps)
    done = max(0, updates - plan.warmup_steps)
    match train.schedule.kind:
        case "constant":
            return rate
        case "step":
            assert plan.decay_every_steps is not None
            assert train.schedule.gamma is not None
            return rate * train.schedule.gamma ** (updates // plan.decay_every_steps)
        case "cosine":
            return rate * (1 + math.cos(math.pi * done / length)) / 2
        case "linear":
            return rate * (1 - done / length)
        case "wsd":
            assert plan.decay_steps is not None
            return rate * min(1.0, (plan.total_steps - updates) / plan.decay_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
