"""Made-up rows with a model's answers: serving checks itself against them, and the documents show them.

The rows follow from the signature and the fitted transform alone (means, ranges, categories, shapes of other texts); no
row of anybody's data is among them.
"""

from __future__ import annotations

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
from raylway.features.signature import Input
from raylway.features.transform import Transform

NUM_ROWS = 8
_MOST_DRAWN = 64
"""A function of the user's may have no value for some made-up rows; so many are tried."""
_TOLERANCE = 1e-3
"""For probabilities, and for values in spreads of the target. On the machine that made them answers are equal to the
last bit; another processor may round otherwise, a wrong model or transform differs in the first digits."""


class Examples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows: list[dict[str, Any]]
    """As in a request's `rows`."""
    outputs: list[Any]
    """For each row the probabilities of the classes, or the value."""


def rows(predictor: Predictor) -> list[dict[str, Any]]:
    """`NUM_ROWS` rows that the model answers, the most ordinary one first; fewer, or none, if the user's functions have
    no value for what is made up."""
    rng = np.random.default_rng(0)
    signature, transform = predictor.signature, predictor.bundle.record.transform
    places = range(_MOST_DRAWN)
    made = [{each.name: _value(each, transform, place, rng) for each in signature.inputs} for place in places]
    reasons = predictor.unanswerable(_read(predictor, made).table(signature))
    return [row for row, reason in zip(made, reasons, strict=True) if reason is None][:NUM_ROWS]


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


def _value(each: Input, transform: Transform, place: int, rng: np.random.Generator) -> Any:
    """The input's value in the row at `place`: 0 the usual one, 1 the lowest, 2 the highest, then any."""
    behind = next((column for column in transform.behind if column.name == each.name), None)
    if each.type == "date":
        return _date(each.name, transform, place, rng)
    if each.type == "number":
        feature = next((feature for feature in transform.numeric if feature.column == each.name), None)
        found = feature or behind
        low, mean, high = (found.minimum, found.mean, found.maximum) if found else (0.0, 1.0, 2.0)
        drawn = float(low + (high - low) * rng.random())
        return [float(f"{mean:.6g}"), low, high][place] if place < 3 else float(f"{drawn:.6g}")
    known = next((feature for feature in transform.categorical if feature.column == each.name), None)
    names = known.known if known else behind.texts if behind else []
    if not names:
        return "text"
    drawn_name = names[int(rng.integers(len(names)))]
    usual = known.most_frequent if known else names[0]
    return [usual, names[0], names[-1]][place] if place < 3 else drawn_name


def _date(name: str, transform: Transform, place: int, rng: np.random.Generator) -> str:
    """As `_value`; a whole day where the training rows never tell an hour."""
    instant = next(each for each in transform.numeric if each.column == name and each.part == "seconds")
    step = 1 if any(each.column == name and each.part == "hour" for each in transform.categorical) else 86_400
    drawn = instant.minimum + (instant.maximum - instant.minimum) * rng.random()
    seconds = [instant.mean, instant.minimum, instant.maximum][place] if place < 3 else drawn
    return dates.text(int(seconds // step * step) * 1_000_000)
