"""Rows in, answers out: the one way in which evaluation, `raylway predict` and serving ask a model.

An answer does not depend on the rows that were asked with it: every forward pass has the same shape, `CHUNK_ROWS` rows
filled up with zeros, on one thread. A matrix product of one shape treats its rows alike; one of another shape may add
in another order and differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from raylway.bundle import code, contents
from raylway.bundle.contents import Bundle
from raylway.bundle.mistakes import MOST_PROBLEMS, Problem
from raylway.bundle.rows import Rows
from raylway.errors import RunFailed, UserError
from raylway.features import dates
from raylway.features.signature import Input, Signature
from raylway.features.transform import Encoder
from raylway.models import registry
from raylway.storage import Place

CHUNK_ROWS = 16
"""Rows of a forward pass. Measured with the 1000-512-256-10 network on one core, milliseconds for a request of 1 row
and one of 64: 4 rows 0.26 and 2.7, 8 rows 0.36 and 1.7, 16 rows 0.56 and 1.3, 32 rows 0.97 and 1.0."""


def shortest(probabilities: np.ndarray) -> np.ndarray:
    """float32 as the float64 with the fewest digits that rounds to it, so that all formats print the same digits."""
    texts = pa.array(probabilities.ravel()).cast(pa.string())
    return texts.cast(pa.float64()).to_numpy().reshape(probabilities.shape)


class NotFinite(RunFailed):
    """The model's answer is NaN or infinite: never passed on."""


@dataclass(frozen=True)
class Answers:
    """The answers to N rows."""

    labels: list[str] | None
    """Classification: the most probable class, the first of equals."""
    values: np.ndarray | None
    """Regression: float64 [N], in the unit of the target."""
    probabilities: np.ndarray | None
    """Classification: float32 [N, K], in the order of the signature's classes."""


class Predictor:
    """A loaded model.

    Args:
        bundle: A bundle, or its folder.

    Raises:
        UserError: The bundle is damaged, or the user's own model in it can't be built.
    """

    def __init__(self, bundle: Bundle | Place) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else contents.load(bundle)
        record = self.bundle.record
        self.signature: Signature = record.signature
        self._target = record.transform.target
        self._direct = _Direct.of(self.bundle)
        with code.importable(self.bundle.code):
            self._encoder = Encoder(record.transform)
            self._model = registry.build(record.model, record.transform)
        _fill(self._model, self.bundle)
        self._model.eval()

    @property
    def model(self) -> torch.nn.Module:
        """The network, in evaluation mode."""
        return self._model

    def predict(self, table: pa.Table) -> Answers:
        """Answer the rows of a typed table that holds the inputs; further columns are ignored.

        Raises:
            UserError: An input is not among the columns, is of another type, or a required one is empty in some row
                (`unanswerable` says in which).
            NotFinite: An answer is not a finite number.
        """
        _check_columns(table, self.signature)
        for row, reason in enumerate(self.unanswerable(table)):
            if reason is not None:
                raise UserError(reason, where=f"row {row + 1}", fix="fill it in, or leave the row out")
        return self.answers(self.outputs_of(table))

    def outputs_of(self, table: pa.Table) -> np.ndarray:
        """The model's outputs, as of `forward`, for a typed table in which `unanswerable` has found nothing."""
        encoded = self._encoder.encode(table)
        return self.forward(encoded.numeric, encoded.categorical)

    def unanswerable(self, table: pa.Table) -> list[str | None]:
        """For each row of a typed table why it can't be answered, or None.

        Raises:
            UserError: As in `predict`, for whole columns.
        """
        _check_columns(table, self.signature)
        reasons: list[str | None] = [None] * table.num_rows
        for each in self.signature.inputs:
            for row, why in _unusable(table[each.name], each).items():
                reasons[row] = reasons[row] or f"{each.name} is {why}"
        for row, (name, why) in self._encoder.unanswerable(table).items():
            reasons[row] = reasons[row] or f"{name} {why}"
        return reasons

    def problems(self, rows: Rows) -> list[Problem]:
        """What keeps checked rows from being answered all the same: a derived feature without a value, where training
        left such rows out, or a function of the user's that fails on a row."""
        if not self.bundle.record.transform.derive:
            return []
        found = self._encoder.unanswerable(rows.table(self.signature))
        return [Problem(row, name, why) for row, (name, why) in sorted(found.items())[:MOST_PROBLEMS]]

    def outputs(self, rows: Rows) -> np.ndarray:
        """The model's outputs, as of `forward`, for rows that `RowReader` has checked."""
        if self._direct is None:
            encoded = self._encoder.encode(rows.table(self.signature))
        else:
            texts = rows.texts()
            chosen = [texts[index] for index in self._direct.categories]
            encoded = self._encoder.encode_raw(rows.numbers[:, self._direct.numbers], chosen)
        return self.forward(encoded.numeric, encoded.categorical)

    def answers(self, outputs: np.ndarray) -> Answers:
        """Outputs as answers.

        Raises:
            NotFinite: One is NaN or infinite.
        """
        if not np.isfinite(outputs).all():
            raise NotFinite("the model's answer is not a finite number; its weights or the row are out of all range")
        if self._target.task == "regression":
            return Answers(None, outputs, None)
        classes = self.signature.classes
        return Answers([classes[code] for code in outputs.argmax(axis=1)], None, outputs)

    def forward(self, numeric: np.ndarray, categorical: np.ndarray) -> np.ndarray:
        """The model's outputs for encoded rows, which may be not finite: the caller checks.

        Args:
            numeric: float32 [N, D].
            categorical: integers [N, C].

        Returns:
            float32 [N, K] probabilities, or float64 [N] values in the unit of the target.
        """
        rows = len(numeric)
        if not rows:
            return self._nothing()
        padded = -(-rows // CHUNK_ROWS) * CHUNK_ROWS
        numbers = np.zeros((padded, numeric.shape[1]), np.float32)
        codes = np.zeros((padded, categorical.shape[1]), np.int64)
        numbers[:rows], codes[:rows] = numeric, categorical
        with torch.inference_mode(), _one_thread():
            chunks = zip(*(torch.from_numpy(each).split(CHUNK_ROWS) for each in (numbers, codes)), strict=True)
            outputs = [self._finished(self._model(*chunk)) for chunk in chunks]
        return torch.cat(outputs)[:rows].numpy()

    def treats_rows_alike(self) -> bool:
        """Whether one row gets the same bits at every place of a chunk, as it must; tried with made-up numbers."""
        transform = self.bundle.record.transform
        numeric = np.random.default_rng(0).standard_normal((1, transform.num_numeric), np.float32)
        categorical = np.minimum(np.ones((1, 1), np.int64), [transform.category_counts])
        outputs = self.forward(numeric.repeat(CHUNK_ROWS, 0), categorical.repeat(CHUNK_ROWS, 0))
        return bool((outputs == outputs[:1]).all())

    def _nothing(self) -> np.ndarray:
        classes = len(self._target.classes)
        return np.zeros((0, classes), np.float32) if classes else np.zeros(0)

    def _finished(self, output: torch.Tensor) -> torch.Tensor:
        if self._target.task == "classification":
            return output.float().softmax(dim=1)  # a model of the user's own may compute in another precision
        return output.reshape(CHUNK_ROWS).double() * self._target.spread + self._target.mean


@dataclass(frozen=True)
class _Direct:
    """Where the model's inputs lie among the columns of `Rows`, when each of them is a raw input as it comes.

    The usual case and the fast one: a thousand features need no thousand Arrow columns.
    """

    numbers: list[int]
    categories: list[int]

    @classmethod
    def of(cls, bundle: Bundle) -> _Direct | None:
        inputs, transform = bundle.record.signature.inputs, bundle.record.transform
        numbers = {name: index for index, name in enumerate(each.name for each in inputs if each.type == "number")}
        texts = {name: index for index, name in enumerate(each.name for each in inputs if each.type != "number")}
        numeric = [feature.column for feature in transform.numeric]
        categorical = [feature.column for feature in transform.categorical]
        if any(each.type == "date" for each in inputs) or not (
            numbers.keys() >= set(numeric) and texts.keys() >= set(categorical)
        ):
            return None
        return cls([numbers[name] for name in numeric], [texts[name] for name in categorical])


@contextmanager
def _one_thread() -> Iterator[None]:
    """With several threads a product may be cut, and so rounded, in another way."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fill(model: torch.nn.Module, bundle: Bundle) -> None:
    try:
        model.load_state_dict(bundle.weights(), strict=True)
    except RuntimeError as error:
        raise UserError(
            "the weights do not fit the model",
            where=str(bundle.folder),
            expected=f"the parameters of {bundle.record.model.kind}",
            found=str(error),
            fix="the model's function must build the same network each time that it is called",
        ) from None


def _check_columns(table: pa.Table, signature: Signature) -> None:
    for each in signature.inputs:
        if each.name not in table.column_names:
            raise UserError(
                f"there is no column {each.name}, which the model needs",
                where="columns",
                expected=", ".join(feature.name for feature in signature.inputs),
                found=", ".join(table.column_names),
            )
        kind = table.schema.field(each.name).type
        if (each.type == "number" and pa.types.is_string(kind)) or (each.type == "date" and not _may_be_dates(kind)):
            expected, found = ("numbers", "text") if each.type == "number" else ("text such as 2013-01-01", str(kind))
            raise UserError(
                f"the column {each.name} does not hold {'numbers' if each.type == 'number' else 'dates'}",
                where=f"column {each.name}",
                expected=f"{expected}, as in training",
                found=found,
            )


def _may_be_dates(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_null(kind)


def _unusable(column: pa.ChunkedArray, each: Input) -> dict[int, str]:
    """By row why its cell can't be used: required and empty, an infinite number, or no date."""
    reasons: dict[int, str] = {}
    if each.required:
        reasons |= dict.fromkeys(np.flatnonzero(column.is_null(nan_is_null=True).to_numpy()).tolist(), "empty")
    if pa.types.is_floating(column.type):
        reasons |= dict.fromkeys(np.flatnonzero(np.isinf(column.to_numpy())).tolist(), "not finite")
    if each.type == "date":
        _, valid = dates.parse(column)
        reasons |= dict.fromkeys(np.flatnonzero(column.is_valid().to_numpy() & ~valid).tolist(), "no date")
    return reasons
