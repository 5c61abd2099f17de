"""Values that carry their unit in the job file: durations (`20 epochs`, `5 min`) and shares (`10%`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_SPELLINGS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "minute", "minutes"), "min"),
    **dict.fromkeys(("h", "hour", "hours"), "h"),
    **dict.fromkeys(("step", "steps"), "steps"),
    **dict.fromkeys(("epoch", "epochs"), "epochs"),
}
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]+)\s*")
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*%\s*")


@dataclass(frozen=True)
class Duration:
    """An amount with its unit; `unit` is one of `steps`, `epochs`, `s`, `min`, `h`."""

    amount: float
    unit: str

    @property
    def seconds(self) -> float:
        """Length in seconds; only for the units of time."""
        return self.amount * _SECONDS[self.unit]

    @property
    def is_time(self) -> bool:
        return self.unit in _SECONDS

    def in_steps(self, steps_per_epoch: int) -> int:
        """Length in optimizer steps, at least one unless it is zero; only for `steps` and `epochs`."""
        steps = self.amount * (steps_per_epoch if self.unit == "epochs" else 1)
        return max(1, round(steps)) if self.amount else 0

    def __str__(self) -> str:
        unit = self.unit[:-1] if self.amount == 1 and self.unit in ("steps", "epochs") else self.unit
        return f"{_shortest(self.amount)} {unit}"


def _shortest(value: float) -> str:
    """A text that reads as exactly the same number: prepared data and runs are told apart by it."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _parse_duration(value: Any, units: tuple[str, ...]) -> Duration:
    if isinstance(value, Duration):
        return value
    wanted = f"a number with a unit ({', '.join(units)}), such as '20 {units[0]}'"
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"expected {wanted}")
    unit = _SPELLINGS.get(match[2].lower())
    if unit not in units:
        raise ValueError(f"expected {wanted}; the unit {match[2]!r} does not fit here")
    amount = float(match[1])
    if not math.isfinite(amount):
        raise ValueError(f"expected {wanted}; the number is too large")
    if unit == "steps" and amount != int(amount):
        raise ValueError("expected a whole number of steps")
    return Duration(amount, unit)


def _parse_share(value: Any) -> float:
    wanted = "expected a percentage such as '10%' or a number between 0 and 1"
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        share = float(match[1]) / 100
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        share = float(value)
    else:
        raise ValueError(wanted)
    if not 0 <= share <= 1:
        raise ValueError(wanted)
    return share


def _share_text(share: float) -> str | float:
    """The percentage, where it reads as exactly the same share; else the number."""
    text = f"{share * 100:g}%"
    return text if _PERCENT.fullmatch(text) and _parse_share(text) == share else share


def _duration_type(*units: str) -> Any:
    return Annotated[
        Duration,
        BeforeValidator(lambda value: _parse_duration(value, units)),
        PlainSerializer(str, return_type=str),
        WithJsonSchema({"type": "string", "pattern": _DURATION.pattern, "examples": [f"20 {units[0]}"]}),
    ]


Progress = _duration_type("epochs", "steps")
"""A length of training that does not depend on the machine."""

Interval = _duration_type("epochs", "steps", "s", "min", "h")
"""How often something happens; may be given in time."""

Share = Annotated[
    float,
    BeforeValidator(_parse_share),
    PlainSerializer(_share_text, return_type=str | float),
    WithJsonSchema({"type": ["string", "number"], "examples": ["10%", 0.1]}),
]
"""A part of a whole, written `10%` or `0.1`; held as a float from 0 to 1."""
