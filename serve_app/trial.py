"""Try a bundle before it takes the place of another: on its own examples and on recorded requests.

Nothing is written down, and of a refused request only the feature and what was expected are told, not its value.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np

from raylway import storage
from raylway.bundle import contents, examples
from raylway.bundle.mistakes import InvalidRows
from raylway.bundle.predictor import NotFinite, Predictor
from raylway.bundle.rows import NotJson
from raylway.errors import RunFailed, UserError
from serve_app.forms import Model
from serve_app.problems import HttpProblem, unprocessable
from serve_app.recent import Recorded
from serve_app.service import forms_of


class Trial(msgspec.Struct, frozen=True):
    """What came out."""

    failure: str | None = None
    """Why the bundle must not be served."""
    requests: int = 0
    rows: int = 0
    """Of the recorded requests; all were answered."""
    differences: str = ""
    """How the answers differ from those that were given, in words; empty without recorded rows."""


def attempt(bundle: str, recorded: list[Recorded]) -> Trial:
    """Load a bundle, check it against its examples, and ask it the recorded requests. Raises nothing: a bundle may fail
    in any way, and code of the user's own may raise anything."""
    try:
        predictor = Predictor(contents.load(storage.place(bundle)))
        examples.check(predictor)
    except (UserError, RunFailed) as error:
        return Trial(str(error))
    except Exception as error:  # noqa: BLE001
        return Trial(f"it raised {type(error).__name__}: {error}")
    try:
        return _ask(predictor, recorded)
    except Exception as error:  # noqa: BLE001 - whose words may quote a client's value
        return Trial(f"it raised {type(error).__name__} when it was asked a recorded request")


def _ask(predictor: Predictor, recorded: list[Recorded]) -> Trial:
    forms = {form.name: form for form in forms_of(Model(predictor)).values()}
    before: list[Any] = []
    now: list[Any] = []
    refused: list[str] = []
    for each in recorded:
        try:
            rows = forms[each.form].read(each.body, each.headers).rows
            if problems := predictor.problems(rows):
                raise InvalidRows(problems)
            outputs = predictor.outputs(rows)
            labels = predictor.answers(outputs).labels
        except (HttpProblem, NotJson, InvalidRows, NotFinite) as error:
            refused.append(_reason(error))
            continue
        before += each.answers
        now += outputs.tolist() if labels is None else labels
    if refused:
        return Trial(f"it refuses {len(refused):,} of {len(recorded):,} recorded requests; one of them: {refused[0]}")
    return Trial(None, len(recorded), len(now), _differences(before, now) if now else "")


def _reason(error: Exception) -> str:
    """Without the client's value, which messages tell last, and exceptions of the user's code in their words."""
    sentence = str(unprocessable(error).body["detail"]) if isinstance(error, InvalidRows) else str(error)
    if isinstance(error, HttpProblem):
        sentence = str(error.body["detail"])
    return re.sub(r"(your function raised \w+):.*", r"\1", sentence, flags=re.S).partition("; found")[0]


def _differences(before: list[Any], now: list[Any]) -> str:
    if isinstance(before[0], str) != isinstance(now[0], str):
        return "its answers are of another kind: labels were values, or values labels"
    if isinstance(now[0], str):
        changed = sum(map(str.__ne__, before, now))
        return f"{changed:,} of {len(now):,} rows get another label ({changed / len(now):.1%})"
    apart = np.abs(np.array(now) - np.array(before))
    return f"values differ by {np.median(apart):.3g} in the median, by {apart.max():.3g} at most"
