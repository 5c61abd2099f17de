"""The numeric features of a transform on tensors: what `features.encode.Numbers` computes with numpy."""

from __future__ import annotations

import torch
from torch import nn

from raylway.features.encode import LARGEST_SCALED
from raylway.features.learnt import NumericFeature


class Numbers(nn.Module):
    """float64 [N, features], NaN for missing, as float64 [N, inputs]."""

    fill: torch.Tensor
    centre: torch.Tensor
    unit: torch.Tensor
    bound: torch.Tensor
    constant: torch.Tensor
    logged: torch.Tensor

    def __init__(self, features: list[NumericFeature]) -> None:
        super().__init__()
        self._keep("fill", [each.fill for each in features])
        self._keep("centre", [each.centre for each in features])
        self._keep("unit", [each.unit or 1.0 for each in features])
        self.register_buffer("constant", torch.tensor([not each.unit for each in features], dtype=torch.bool))
        logged = [each.scale == "log" and not each.edges for each in features]
        self.register_buffer("logged", torch.tensor(logged, dtype=torch.bool))
        self._has_logged = any(logged)
        ends = [[each.minimum for each in features], [each.maximum for each in features]]
        reached = self._scaled(torch.tensor(ends, dtype=torch.float64).reshape(2, len(features))).abs()
        self._keep("bound", torch.clamp(reached, min=LARGEST_SCALED).amax(dim=0))
        self._curved = [place for place, each in enumerate(features) if each.edges or each.points]
        self._curves = nn.ModuleList(_curve(features[place]) for place in self._curved)
        order = _order(features)
        self._order = None if order == list(range(len(features))) else order

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """See the class."""
        missing = numbers.isnan()
        filled = torch.where(missing, self.fill, numbers)
        scaled = torch.minimum(torch.maximum(self._scaled(filled), -self.bound), self.bound)
        if self._order is None:
            return scaled
        curves = [curve(filled[:, place]) for place, curve in zip(self._curved, self._curves, strict=True)]
        return torch.cat([scaled, missing.double(), *curves], dim=1)[:, torch.tensor(self._order)]

    def _keep(self, name: str, values: list[float] | torch.Tensor) -> None:
        self.register_buffer(name, torch.as_tensor(values, dtype=torch.float64))

    def _scaled(self, filled: torch.Tensor) -> torch.Tensor:
        if self._has_logged:
            filled = torch.where(self.logged, _signed_log(filled), filled)
        return torch.where(self.constant, 0.0, (filled - self.centre) / self.unit)


class _Bins(nn.Module):
    """As `features.encode.piecewise_linear`: [N] to [N, bins]."""

    start: torch.Tensor
    width: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, edges: list[float]) -> None:
        super().__init__()
        edge = torch.tensor(edges, dtype=torch.float64)
        low, high = torch.zeros(len(edge) - 1).double(), torch.ones(len(edge) - 1).double()
        low[0], high[-1] = -LARGEST_SCALED, LARGEST_SCALED
        for name, values in {"start": edge[:-1].clone(), "width": edge.diff(), "low": low, "high": high}.items():
            self.register_buffer(name, values)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """See the class."""
        parts = (numbers[:, None] - self.start) / self.width
        return torch.minimum(torch.maximum(parts, self.low), self.high)


class _Shares(nn.Module):
    """As `features.encode.share_below`: [N] to [N, 1]."""

    points: torch.Tensor

    def __init__(self, points: list[float]) -> None:
        super().__init__()
        self.register_buffer("points", torch.tensor(points, dtype=torch.float64))
        self._last = len(points) - 1

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """See the class."""
        below = (self.points < numbers[:, None]).long().sum(dim=1)
        up_to = (self.points <= numbers[:, None]).long().sum(dim=1)
        low, high = (up_to - 1).clamp(0, self._last), below.clamp(0, self._last)
        inside = low < high
        span = torch.where(inside, self.points[high] - self.points[low], 1.0)
        between = low.double() + (numbers - self.points[low]) / span
        place = torch.where(inside, between, 0.5 * (low + high).double()) / max(1, self._last)
        place = torch.where(numbers >= self.points[-1], 1.0, place)
        return torch.where(numbers <= self.points[0], 0.0, place)[:, None]


def _curve(feature: NumericFeature) -> nn.Module:
    return _Bins(feature.edges) if feature.edges else _Shares(feature.points)


def _order(features: list[NumericFeature]) -> list[int]:
    """For each input its place among the scaled numbers, the indicators of all features, and the curves."""
    order: list[int] = []
    count, start = len(features), 2 * len(features)
    for place, each in enumerate(features):
        if each.edges or each.points:
            order += range(start, start + each.width)
            start += each.width
        else:
            order.append(place)
        if each.indicator:
            order.append(count + place)
    return order


def _signed_log(numbers: torch.Tensor) -> torch.Tensor:
    """sign(x) log(1 + |x|); to the last digits for small numbers too, where runtimes have no such logarithm (Kahan's
    way, as in W. Kahan, "HP-15C Advanced Functions Handbook", appendix)."""
    size = numbers.abs()
    more = 1.0 + size
    exact = torch.where(more == 1.0, 1.0, more - 1.0)
    return numbers.sign() * torch.where(more == 1.0, size, more.log() * (size / exact))
