"""What the service answers, as types. A field that a later service adds is passed over."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Model(msgspec.Struct, frozen=True):
    """Which model answered."""

    name: str
    version: str
    """Of its bundle: equal versions answer alike."""


class Answers(msgspec.Struct, frozen=True):
    """The answers to N rows, in their order."""

    predictions: list[str] | list[float]
    """Classes, or the values of a regression."""
    probabilities: list[dict[str, float]] | None
    """For each row by class; None for a regression."""
    models: list[Model]
    """Who answered; more than one only where the service changed versions between the requests of one large table."""
    ids: list[str | int] | None = None
    """As they were asked."""


class Input(msgspec.Struct, frozen=True):
    """One column that a row must or may have."""

    name: str
    type: Literal["number", "category", "date"]
    required: bool
    values: str = "text"
    """What a category's column held in training: `text`, `number` or `boolean`."""


class Signature(msgspec.Struct, frozen=True):
    """What the model takes and gives."""

    model: Model
    task: Literal["classification", "regression"]
    target: str
    inputs: list[Input]
    classes: list[str]
    missing: list[str] = []
    """Further texts and numbers that are missing cells."""


class Problem(msgspec.Struct, frozen=True):
    """One mistake in the rows."""

    row: int | None
    """Position among the rows of the call, from 0; None: the whole request."""
    feature: str | None
    reason: str


class RequestFailed(Exception):
    """A call without its answer.

    Args:
        status: Of the last answer; None if there was none.
        detail: What happened, as a sentence.
        problems: Of a refused request (422), each with row and feature.
        request_id: By which the service's access log names the request.
    """

    def __init__(self, status: int | None, detail: str, problems: list[Problem], request_id: str) -> None:
        super().__init__(status, detail, problems, request_id)
        self.status, self.detail, self.problems, self.request_id = status, detail, problems, request_id

    def __str__(self) -> str:
        listed = [f"  row {each.row}: {each.feature or ''} {each.reason}" for each in self.problems]
        head = self.detail if self.status is None else f"{self.status}: {self.detail}"
        return "\n".join([f"{head} (request {self.request_id})" if self.request_id else head, *listed])


class _Answered(msgspec.Struct):
    """The body of a successful answer."""

    predictions: list[str | float]
    model: Model
    probabilities: list[dict[str, float]] | None = None


class _Refused(msgspec.Struct):
    """The body of an error (RFC 9457)."""

    detail: str
    errors: list[Problem] = []


def joined(parts: list[bytes], ids: list[str | int] | None) -> Answers:
    """The answers of one call, of the bodies that answered its parts."""
    found = [msgspec.json.decode(part, type=_Answered) for part in parts]
    predictions: Any = [each for part in found for each in part.predictions]
    probabilities = [each for part in found for each in part.probabilities or ()]
    is_regression = any(part.probabilities is None for part in found)
    models = list(dict.fromkeys(part.model for part in found))
    return Answers(predictions, None if is_regression else probabilities, models, ids)


def failure(status: int, body: bytes, first_row: int, request_id: str) -> RequestFailed:
    """An error's body as an exception.

    Args:
        status: Of the answer.
        body: `application/problem+json`, or whatever a proxy says in its place.
        first_row: Of the call, in this request.
        request_id: Of this request.
    """
    try:
        refused = msgspec.json.decode(body, type=_Refused)
    except (msgspec.DecodeError, UnicodeDecodeError):
        refused = _Refused(body[:200].decode(errors="replace").strip() or "no reason was given")
    problems = [
        Problem(None if each.row is None else each.row + first_row, each.feature, each.reason)
        for each in refused.errors
    ]
    return RequestFailed(status, refused.detail, problems, request_id)
