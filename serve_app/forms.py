"""The ways of asking: each reads a body into the same rows and writes the same outputs in its own words.

One internal path lies between (`serve_app.service`), so all of them are checked, batched and answered alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from raylway.bundle.predictor import Predictor, shortest
from raylway.bundle.rows import NotJson, RowReader, Rows
from serve_app.problems import HttpProblem

JSON = b"application/json"
Headers = Mapping[bytes, bytes]
"""By name in lower case."""


@dataclass(frozen=True)
class Reply:
    """A successful answer."""

    body: bytes
    media_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a request asks."""

    rows: Rows
    reply: Callable[[np.ndarray], Reply]
    """The answer made of the model's outputs for the rows; raises `NotFinite`."""


class Form(Protocol):
    """One way of asking."""

    name: str
    """In metrics and in the access log."""
    media_types: tuple[bytes, ...]
    """What is accepted beside JSON."""

    def read(self, body: bytes, headers: Headers) -> Asked:
        """Check a body.

        Raises:
            HttpProblem: It can't be read at all.
            NotJson: It should be JSON and is not.
            InvalidRows: It can be read and holds mistakes.
        """


class Model:
    """What all forms need of a bundle."""

    def __init__(self, predictor: Predictor) -> None:
        record = predictor.bundle.record
        self.predictor, self.signature = predictor, predictor.signature
        self.reader = RowReader(predictor.signature)
        self.card = {"name": record.name, "version": record.version}

    def listed(self, outputs: np.ndarray) -> tuple[list[str] | None, list[Any]]:
        """Labels and probabilities of N rows, or None and the values.

        Of probabilities the digits that `raylway predict` writes; read as float32 no bit is lost on the way.

        Raises:
            NotFinite: One is NaN or infinite.
        """
        labels = self.predictor.answers(outputs).labels
        return labels, (outputs if labels is None else shortest(outputs)).tolist()

    def answer(self, outputs: np.ndarray) -> dict[str, Any]:
        """The answer in our own words, for rows that were asked by name."""
        labels, listed = self.listed(outputs)
        if labels is None:
            return {"predictions": listed, "model": self.card}
        classes = self.signature.classes
        probabilities = [dict(zip(classes, row, strict=True)) for row in listed]
        return {"predictions": labels, "probabilities": probabilities, "model": self.card}


class Plain:
    """`POST /predict`: `{"rows": [{"feature": value}]}`, or the article's `{"data": [[value]]}`."""

    name = "predict"
    media_types: tuple[bytes, ...] = ()

    def __init__(self, model: Model) -> None:
        self._model = model

    def read(self, body: bytes, headers: Headers) -> Asked:
        """See `Form`."""
        form, rows, ids = self._model.reader.read(body)
        if form == "data":
            return Asked(rows, self._nested)
        if ids is None:
            return Asked(rows, lambda outputs: Reply(msgspec.json.encode(self._model.answer(outputs))))
        return Asked(rows, lambda outputs: Reply(msgspec.json.encode({"ids": ids, **self._model.answer(outputs)})))

    def _nested(self, outputs: np.ndarray) -> Reply:
        labels, listed = self._model.listed(outputs)
        return Reply(msgspec.json.encode([[value] for value in listed] if labels is None else listed))


def decoded(body: bytes) -> Any:
    """Any JSON.

    Raises:
        NotJson: It is none, or nested too deeply.
    """
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise NotJson("nested too deeply") from None
    except ValueError as error:  # msgspec's DecodeError and UnicodeDecodeError are ValueErrors
        raise NotJson(str(error)) from None


def unreadable(what: str, why: object) -> HttpProblem:
    """400 for a body that is not of its format."""
    return HttpProblem(400, f"the body is not valid {what}: {why}")
