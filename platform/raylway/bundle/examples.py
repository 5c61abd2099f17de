"""Made-up rows with a model's answers: serving checks itself against them, and the documents show them.

The rows follow from the signature, the fitted transform and the profile alone (ranges, quantiles, categories, shapes of
other texts); no row of anybody's data is among them. Each value looks as those of the data do: as many decimals, whole
days, and as often as it is found there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from raylway import storage
from raylway.bundle.contents import EXAMPLES
from raylway.bundle.predictor import Predictor
from raylway.bundle.rows import RowReader, Rows
from raylway.errors import RunFailed
from raylway.features import dates
from raylway.features.profile import NumberProfile, Profile
from raylway.features.signature import Input
from raylway.features.transform import Transform

NUM_ROWS = 8
_MOST_DRAWN = 64
"""A function of the user's may have no value for some made-up rows; so many are tried."""
_LOWEST, _USUAL, _HIGHEST = 0.0, 0.5, 1.0
"""Places that are no chance."""
_MOST_DECIMALS = 6
_EXACT = 1 << 53
"""Whole numbers below it are exact as floats."""
_TOLERANCE = 1e-3
"""For probabilities, and for values in spreads of the target. On the machine that made them answers are equal to the
last bit; another processor may round otherwise, a wrong model or transform differs in the first digits."""


class Examples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows: list[dict[str, Any]]
    """As in a request's `rows`."""
    outputs: list[Any]
    """For each row the probabilities of the classes, or the value."""


def rows(predictor: Predictor) -> list[dict[str, Any]]:
    """`NUM_ROWS` rows that the model answers, the most ordinary one first, those of the lowest and the highest values
    last; fewer, or none, if the user's functions have no value for what is made up."""
    rng = np.random.default_rng(0)
    record = predictor.bundle.record
    inputs = [_Drawn.of(each, record.transform, record.profile) for each in record.signature.inputs]
    places = [_USUAL, *rng.random((_MOST_DRAWN, len(inputs))), _LOWEST, _HIGHEST]
    made = [
        {each.name: each.at(float(at)) for each, at in zip(inputs, np.broadcast_to(place, len(inputs)), strict=True)}
        for place in places
    ]
    reasons = predictor.unanswerable(_read(predictor, made).table(record.signature))
    ordinary = [row for row, reason in zip(made[:-2], reasons[:-2], strict=True) if reason is None]
    extreme = [row for row, reason in zip(made[-2:], reasons[-2:], strict=True) if reason is None]
    return ordinary[: NUM_ROWS - len(extreme)] + extreme


def write(folder: Path, predictor: Predictor) -> None:
    """Write `examples.json` with the model's answers.

    Raises:
        NotFinite: An answer is not a finite number.
    """
    made = rows(predictor)
    storage.write_record(folder / EXAMPLES, Examples(made, _outputs(predictor, made).tolist()))


def read(folder: Path) -> Examples:
    """The examples of a bundle's folder.

    Raises:
        UserError: The file is damaged.
    """
    return storage.read_record(folder / EXAMPLES, Examples)


def check(predictor: Predictor) -> None:
    """Compare the model's answers with those in its bundle, and the places of a chunk with each other.

    Raises:
        RunFailed: They differ: this machine or its torch does not compute what the bundle's maker computed.
    """
    examples = read(predictor.bundle.folder)
    found = _outputs(predictor, examples.rows)
    expected = np.array(examples.outputs).reshape(len(examples.rows), *found.shape[1:])
    target = predictor.bundle.record.transform.target
    scale = target.spread if target.task == "regression" else 1.0
    if not np.allclose(found, expected, rtol=0.0, atol=_TOLERANCE * scale):
        raise RunFailed(
            f"{predictor.bundle.folder}: the model's answers to the bundle's own examples differ from those "
            f"recorded with it by up to {np.abs(found - expected).max():.3g}; compare the versions in bundle.json with "
            "those here"
        )
    if not predictor.treats_rows_alike():
        raise RunFailed(
            f"{predictor.bundle.folder}: one row gets different answers at different places of a batch; a model must "
            "answer each row by itself"
        )


def _outputs(predictor: Predictor, made: list[dict[str, Any]]) -> np.ndarray:
    """Through the JSON of a request, as a client would send them."""
    outputs = predictor.outputs(_read(predictor, made))
    predictor.answers(outputs)
    return outputs


def _read(predictor: Predictor, made: list[dict[str, Any]]) -> Rows:
    return RowReader(predictor.signature).read(msgspec.json.encode({"rows": made}))[1]


@dataclass(frozen=True)
class _Drawn:
    """The values of one input, by their place among those of the training rows: 0 the lowest, 1 the highest."""

    name: str
    at: Callable[[float], Any]

    @classmethod
    def of(cls, each: Input, transform: Transform, profile: Profile | None) -> _Drawn:
        """What the transform knows of an input, and the profile where there is one."""
        behind = next((column for column in transform.behind if column.name == each.name), None)
        if each.type == "category":
            known = next((feature for feature in transform.categorical if feature.column == each.name), None)
            names = known.known if known else behind.texts if behind else []
            counts = {found.name: found.counts for found in profile.categories} if profile else {}
            usual = known.most_frequent if known else ""
            return cls(each.name, _Names.of(names or ["text"], counts.get(each.name, {}), usual, each).at)
        part = "seconds" if each.type == "date" else ""
        fitted = (found for found in transform.numeric if (found.column, found.part) == (each.name, part))
        learnt = next(fitted, None) or behind
        low, mean, high = (learnt.minimum, learnt.mean, learnt.maximum) if learnt else (0.0, 1.0, 2.0)
        listed = [date.instants for date in profile.dates] if each.type == "date" and profile else []
        listed += profile.numbers if profile else []
        spread = next((found for found in listed if found.name == each.name and found.edges), None)
        numbers = _Numbers.of(spread) if spread else _Numbers([low, high], [0.0, 1.0], mean)
        if each.type == "number":
            return cls(each.name, numbers.at)
        has_hours = any(found.column == each.name and found.part == "hour" for found in transform.categorical)
        step = 1 if has_hours else 86_400
        return cls(each.name, lambda at: dates.text(int(numbers.exactly(at) // step * step) * 1_000_000))


@dataclass(frozen=True)
class _Numbers:
    """Values between which others lie, ascending, with the share of the rows below each of them."""

    values: list[float]
    shares: list[float]
    usual: float

    @classmethod
    def of(cls, profile: NumberProfile) -> _Numbers:
        values = [profile.minimum, *profile.edges, profile.maximum]
        shares = np.cumsum([0, *profile.counts]) / max(1, sum(profile.counts))
        return cls(values, shares.tolist(), float(np.interp(0.5, shares, values)))

    def exactly(self, at: float) -> float:
        """The value at a place, of any digits."""
        if at in (_LOWEST, _USUAL, _HIGHEST):
            return {_LOWEST: self.values[0], _USUAL: self.usual, _HIGHEST: self.values[-1]}[at]
        return float(np.interp(at, self.shares, self.values))

    def at(self, place: float) -> float | int:
        """The value at a place, with as many decimals as the values have."""
        value = self.exactly(place)
        if self._decimals is None:
            return value if value in (self.values[0], self.values[-1]) else float(f"{value:.6g}")
        rounded = round(value, self._decimals)
        return int(rounded) if self._decimals == 0 and abs(rounded) < _EXACT else rounded

    @cached_property
    def _decimals(self) -> int | None:
        """Those of the value with most of them; None if they are more than anybody writes."""
        # of a frequent value the profile has the next float as an edge as well, which is none of the data
        pairs = pairwise([-math.inf, *self.values])
        known = [value for before, value in pairs if value != math.nextafter(before, math.inf)]
        fitting = (places for places in range(_MOST_DECIMALS + 1) if all(round(each, places) == each for each in known))
        return next(fitting, None)


@dataclass(frozen=True)
class _Names:
    """Categories, with the share of the rows that those up to each of them have."""

    names: list[Any]
    shares: list[float]
    usual: Any

    @classmethod
    def of(cls, names: list[str], counts: dict[str, int], usual: str, each: Input) -> _Names:
        weights = np.array([counts.get(name, 0) for name in names], float)
        shares = np.cumsum(weights if weights.any() else np.ones(len(names)))
        values = [_as_in_data(name, each) for name in names]
        return cls(values, (shares / shares[-1]).tolist(), _as_in_data(usual or names[0], each))

    def at(self, place: float) -> Any:
        if place in (_LOWEST, _USUAL, _HIGHEST):
            return {_LOWEST: self.names[0], _USUAL: self.usual, _HIGHEST: self.names[-1]}[place]
        return self.names[int(np.searchsorted(self.shares, place, side="right"))]


def _as_in_data(name: str, each: Input) -> Any:
    """A category of a column of numbers as a number, of one of booleans as a boolean."""
    if each.values == "text":
        return name
    try:
        return msgspec.json.decode(name, type=bool if each.values == "boolean" else int | float)
    except msgspec.DecodeError:
        return name
