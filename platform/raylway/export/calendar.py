"""Parts of a date on tensors: what `features.dates.parts` computes with numpy.

Whole numbers are divided through floats that are then put right, with products and comparisons of whole numbers: the
quotient of negative ones is what exporters disagree about.
"""

from __future__ import annotations

import torch

from raylway.features.dates import DAY
from raylway.features.learnt import Part

_HOUR = 3_600_000_000
_EPOCH = 719_468
"""Days from 0000-03-01 to 1970-01-01."""


def parts(instants: torch.Tensor) -> dict[Part, torch.Tensor]:
    """Of N instants in the years 1 to 9999, int64 microseconds since 1970 UTC: int64 each, `seconds` float64.

    The calendar is Howard Hinnant's `civil_from_days` ("chrono-Compatible Low-Level Date Algorithms"), whose years
    begin in March.
    """
    days = _quotient(instants, DAY)
    of_era, era = _rest(days + _EPOCH, 146_097)  # 400 years
    corrected = of_era - _quotient(of_era, 1_460) + _quotient(of_era, 36_524) - _quotient(of_era, 146_096)
    year_of_era = _quotient(corrected, 365)
    leaps = _quotient(year_of_era, 4) - _quotient(year_of_era, 100)
    of_year = of_era - 365 * year_of_era - leaps
    month = _quotient(5 * of_year + 2, 153)  # 0 is March
    is_next = (month >= 10).long()
    return {
        "year": year_of_era + 400 * era + is_next,
        "month": month + 3 - 12 * is_next,
        "day": of_year - _quotient(153 * month + 2, 5) + 1,
        "weekday": _rest(days + 3, 7)[0] + 1,
        "hour": _quotient(instants - days * DAY, _HOUR),
        "seconds": instants.double() / 1_000_000,
    }


def _quotient(numbers: torch.Tensor, divisor: int) -> torch.Tensor:
    """Rounded down."""
    return _rest(numbers, divisor)[1]


def _rest(numbers: torch.Tensor, divisor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rest, from 0 to below the divisor, and the quotient: float64 is off by one at most."""
    near = (numbers.double() / divisor).floor().long()
    rest = numbers - near * divisor
    off = (rest >= divisor).long() - (rest < 0).long()
    return rest - off * divisor, near + off
