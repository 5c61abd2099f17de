"""The optimizer, and its learning rate as a pure function of the number of updates made."""

from __future__ import annotations

import math

import torch

from raylway.job import schema
from raylway.train.plan import Plan


def optimizer(model: torch.nn.Module, wanted: schema.Optimizer) -> torch.optim.Optimizer:
    """The job's optimizer over the parameters of a model, with torch's own defaults for what the job does not name."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    match wanted.kind:
        case "adam":
            return torch.optim.Adam(parameters, lr=wanted.lr, weight_decay=wanted.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=wanted.lr, weight_decay=wanted.weight_decay)
        case "sgd":
            return torch.optim.SGD(parameters, lr=wanted.lr, momentum=wanted.momentum, weight_decay=wanted.weight_decay)


def learning_rate(train: schema.Train, plan: Plan, updates: int) -> float:
    """The rate of the next update.

    A skipped step makes no update, so the schedule does not move with it. The schedules are those of torch: `step` is
    StepLR, `cosine` is CosineAnnealingLR from the end of the warm-up to the last step (Loshchilov, Hutter 2017); the
    warm-up multiplies by (updates + 1) / warm-up steps, so that no update is wasted on a rate of zero.

    Args:
        train: The job's section.
        plan: Lengths in steps.
        updates: Updates made so far.
    """
    rate = train.optimizer.lr
    if updates < plan.warmup_steps:
        rate *= (updates + 1) / plan.warmup_steps
    match train.schedule.kind:
        case "constant":
            return rate
        case "step":
            assert plan.decay_every_steps is not None
            assert train.schedule.gamma is not None
            return rate * train.schedule.gamma ** (updates // plan.decay_every_steps)
        case "cosine":
            length = max(1, plan.total_steps - plan.warmup_steps)
            return rate * (1 + math.cos(math.pi * max(0, updates - plan.warmup_steps) / length)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
