"""Transform and model as one torch module: raw columns in, answers out.

It computes what `features.encode` and `bundle.predictor` compute, in the same order and in float64 up to the model, of
operations that every exporter knows. Texts are codes of words here (`Graph.words`); what turns texts into codes and
classes into labels depends on the format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import product

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from raylway.bundle.contents import BundleRecord
from raylway.errors import UserError
from raylway.export import calendar
from raylway.export.columns import MISSING, Number, Text, Truth, Value, compared_words, evaluate, is_finite
from raylway.export.numbers import Numbers
from raylway.features import dates
from raylway.features.derive import Derivation, parsed
from raylway.features.encode import Categories
from raylway.features.expression import Expression
from raylway.features.learnt import CategoricalFeature, NumericFeature, Part
from raylway.features.schema import canonical_text
from raylway.features.signature import Signature
from raylway.features.transform import Transform

REFUSED = -1
"""The index of the class of a row that has no answer."""
NO_INSTANT = int(np.iinfo(np.int64).min)
"""A missing date; numpy's "not a time"."""
_MOST = {"year": 9999, "month": 12, "day": 31, "weekday": 7, "hour": 23}
_SERVE = "serve the model with raylway serve, which computes everything"


class Graph(nn.Module):
    """See the module.

    Args:
        record: Of the bundle.
        model: Its network, in evaluation mode.

    Raises:
        UserError: A derived feature is a function of the user's, or reads the text of a date.
    """

    def __init__(self, record: BundleRecord, model: nn.Module) -> None:
        super().__init__()
        self._signature, self._transform = record.signature, record.transform
        self._derive = _expressions(record)
        self.words = _words(record.signature, record.transform, self._derive.values())
        self._numbers = Numbers(record.transform.numeric)
        self._model = model

    def forward(self, features: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """
        Args:
            features: For each input of the signature a tensor [N]: of a number float64, NaN for missing; of a category
                int64, a place among `words` from 1, 0 for any other text, -1 for missing; of a date int64
                microseconds since 1970 UTC, the smallest integer for missing.

        Returns:
            Classification: the index of the most probable class, int64 [N], and float32 [N, K] probabilities.
            Regression: float64 [N] values. A row that the service would refuse has -1, and NaN for every number.

        Raises:
            UserError: A derived feature does with texts what a graph can't do.
        """
        columns = _Columns(self._signature, features, self.words)
        used = {each.column for each in self._transform.numeric} | {each.column for each in self._transform.categorical}
        for name, expression in self._derive.items():
            missing = columns.derive(name, expression)
            if self._transform.drops_missing and name in used:
                columns.refused = columns.refused | missing
        output = self._model(*self._encoded(columns))
        target = self._transform.target
        if target.task == "regression":
            value = output.reshape(-1).double() * target.spread + target.mean
            return (torch.where(columns.refused | ~is_finite(value), torch.nan, value),)
        probabilities = output.softmax(dim=1).float()
        refused = columns.refused | probabilities.isnan().any(dim=1)
        index = torch.where(refused, REFUSED, probabilities.argmax(dim=1))
        return index, torch.where(refused[:, None], torch.nan, probabilities)

    def _encoded(self, columns: _Columns) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model takes, as `Encoder.encode_raw`: float32 [N, D] and int64 [N, C]."""
        wide = [self._numbers(columns.numbers(self._transform.numeric))]
        codes = []
        for feature in self._transform.categorical:
            code, missing = columns.codes(feature)
            if feature.one_hot:
                wide.append((code[:, None] == torch.arange(1, feature.count + 1)).double())
            else:
                codes.append(code)
            if feature.indicator:
                wide.append(missing[:, None].double())
        categorical = torch.stack(codes, dim=1) if codes else columns.rows.new_zeros((columns.rows.shape[0], 0)).long()
        return torch.cat(wide, dim=1).float(), categorical


class _Columns:
    """The columns of N rows, as far as they are computed.

    Args:
        signature: Its inputs.
        features: As `Graph.forward`.
        words: Of the categories.
    """

    def __init__(
        self, signature: Signature, features: Mapping[str, torch.Tensor], words: Mapping[str, tuple[str, ...]]
    ) -> None:
        self.rows = next(iter(features.values()))
        """Some tensor [N]."""
        self.refused = torch.zeros_like(self.rows, dtype=torch.bool)
        """bool [N]: the rows that have no answer."""
        self._values: dict[str, Value] = {}
        self._dates: dict[str, tuple[dict[Part, torch.Tensor], torch.Tensor]] = {}
        for each in signature.inputs:
            given = features[each.name]
            if each.type == "number":
                missing = given.isnan()
                self._values[each.name] = Number(given, missing)
                self.refused = self.refused | ~(missing | is_finite(given))
            elif each.type == "category":
                text = Text(
                    torch.where((given < MISSING) | (given > len(words[each.name])), 0, given), words[each.name]
                )
                self._values[each.name], missing = text, text.missing
            else:
                missing, beyond = given == NO_INSTANT, (given < dates.FIRST) | (given > dates.LAST)
                self.refused = self.refused | (beyond & ~missing)
                self._dates[each.name] = calendar.parts(torch.where(beyond, 0, given)), missing
            if each.required:
                self.refused = self.refused | missing

    def derive(self, name: str, expression: Expression) -> torch.Tensor:
        """Add a derived column; a raw one of its name stays. Returns where it is missing, bool [N]."""
        if name not in self._values:
            self._values[name] = evaluate(expression, self._values, self.rows)
        return self._values[name].missing

    def numbers(self, features: list[NumericFeature]) -> torch.Tensor:
        """float64 [N, features]; NaN is missing."""
        found = [self._number(feature) for feature in features]
        return torch.stack(found, dim=1) if found else self.rows.new_zeros((self.rows.shape[0], 0)).double()

    def codes(self, feature: CategoricalFeature) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes of a categorical feature, int64 [N], and where its column is missing, bool [N]."""
        names: list[str]
        if feature.part:
            found, missing = self._dates[feature.column]
            places, names = found[feature.part] + 2, [*map(str, range(_MOST[feature.part] + 1))]
        else:
            value = self._values[feature.column]
            missing = value.missing
            if isinstance(value, Text):
                places, names = value.codes + 1, [*value.words]
            elif isinstance(value, Truth):
                places, names = value.values.long() + 2, ["false", "true"]
            else:
                numbers = _numbers_among(feature.known)
                equal = value.values[:, None] == torch.tensor(numbers, dtype=torch.float64)
                places = 1 + ((1 + torch.arange(len(numbers))) * equal.long()).sum(dim=1)
                names = canonical_text(pa.array(numbers, pa.float64())).to_pylist()
        filled, *known = Categories(feature).codes(pa.array([None, *names], pa.string())).tolist()
        table = torch.tensor([filled, 0, *known])
        return table[torch.where(missing, 0, places)], missing

    def _number(self, feature: NumericFeature) -> torch.Tensor:
        if feature.part:
            found, missing = self._dates[feature.column]
            return torch.where(missing, torch.nan, found[feature.part].double())
        value = self._values[feature.column]
        if isinstance(value, Text):
            raise UserError(
                "a number that is computed as text can't be exported",
                where=f"the feature {feature.name}",
                found="text",
                fix=_SERVE,
            )
        return torch.where(value.missing, torch.nan, value.values.double())


def _expressions(record: BundleRecord) -> dict[str, Expression]:
    dates_ = {each.name for each in record.signature.inputs if each.type == "date"}
    found: dict[str, Expression] = {}
    for name, each in parsed(record.transform.derive).items():
        if not isinstance(each, Expression):
            raise UserError(
                "a function of your own can't be exported",
                where=each.where,
                expected="expressions only, which become part of the graph",
                found=each.text,
                fix=_SERVE,
            )
        if read := dates_ & each.columns:
            raise UserError(
                "an expression that reads the text of a date can't be exported",
                where=each.where,
                expected="dates as features only",
                found=f"{each.text}, which reads {', '.join(sorted(read))}",
                fix=_SERVE,
            )
        found[name] = each
    return found


def _words(signature: Signature, transform: Transform, derivations: Iterable[Derivation]) -> dict[str, tuple[str, ...]]:
    """By category what texts of it the graph tells apart, in order."""
    read = {column for each in derivations for column in each.columns}
    words = {}
    for each in (each for each in signature.inputs if each.type == "category"):
        known = [name for feature in transform.categorical if feature.column == each.name for name in _spelt(feature)]
        words[each.name] = tuple(dict.fromkeys(known + (compared_words(derivations) if each.name in read else [])))
    return words


def _spelt(feature: CategoricalFeature) -> list[str]:
    """The categories of a feature in every spelling that means one of them."""
    if Categories(feature).spelt(pa.array(["TRUE"]))[0].as_py() == "TRUE":
        return feature.known
    letters = [[(letter, letter.upper()) for letter in name] for name in ("true", "false")]
    return [*feature.known, *("".join(each) for name in letters for each in product(*name))]


def _numbers_among(names: list[str]) -> list[float]:
    """The numbers of which some of the names are."""
    found = []
    for name in names:
        with suppress(ValueError):
            found.append(float(name))
    return sorted({each for each in found if np.isfinite(each)})
