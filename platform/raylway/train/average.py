"""The exponential moving average of the weights: what is validated, evaluated and served where the job asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Averaged weights beside those in training, on their device; every rank has its own, and they are equal.

    It is torch's `AveragedModel` with `get_ema_multi_avg_fn`: after the first update the weights themselves, after each
    later one decay * average + (1 - decay) * weights. Buffers are not averaged.

    Args:
        module: The model in training.
        decay: Share of the average that stays at an update; None: there is no average, and all of this does nothing.
    """

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        self._parameters = [] if decay is None else [parameter.detach() for parameter in module.parameters()]
        names = [] if decay is None else [name for name, _ in module.named_parameters()]
        self.weights = {name: weight.clone() for name, weight in zip(names, self._parameters, strict=True)}
        """By parameter name."""
        self._move = get_ema_multi_avg_fn(0.0 if decay is None else decay)

    def update(self, updates: int) -> None:
        """Follow an update of the weights.

        Args:
            updates: Updates made, this one included.
        """
        if updates == 1:
            self._copy(self._parameters, list(self.weights.values()))
        elif self.weights:
            self._move(list(self.weights.values()), self._parameters, updates)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model in training has the averaged weights."""
        kept = [weight.clone() for weight in self._parameters]
        self._copy(list(self.weights.values()), self._parameters)
        try:
            yield
        finally:
            self._copy(kept, self._parameters)

    def _copy(self, source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
        for one, other in zip(source, target, strict=True):
            other.copy_(one)
