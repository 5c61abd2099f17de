"""What a model takes and gives, in words that leave the process: the bundle and `GET /signature` show it."""

from __future__ import annotations

from typing import Literal

import msgspec

from raylway.features.texts import Values

Task = Literal["classification", "regression"]


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One column that a row must or may have.

    `number` takes JSON numbers; `category` takes text, numbers and booleans, compared by the name of the category
    (`texts.category_names`); `date` takes the text of a date or time (`features.dates`).
    """

    name: str
    type: Literal["number", "category", "date"]
    required: bool
    values: Values = "text"
    """What a category's column held in training; it decides which texts name one category (`texts.category_names`)."""


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    task: Task
    target: str
    inputs: list[Input]
    """Raw columns, in the order of the source; what derived features are computed from is among them."""
    classes: list[str]
    """Class names in the order of the model's outputs; empty for regression."""
    missing: list[str] = []
    """Further texts and numbers that are missing cells (`texts.MissingCells`)."""
