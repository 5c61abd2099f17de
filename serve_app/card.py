"""The card of the model that is served: what it takes, what it was made from, how good it is. The page shows it."""

from __future__ import annotations

from typing import Any

import msgspec

from raylway import __version__
from raylway.bundle import examples
from raylway.bundle.contents import BundleRecord
from raylway.features.profile import NumberProfile
from raylway.features.signature import Input
from raylway.features.texts import MISSING_WORDS
from serve_app.forms import Model

MOST_KNOWN = 2_000
"""Categories of an input that the card lists."""


def card(model: Model, max_body_bytes: int) -> dict[str, Any]:
    """All of it, of what JSON has.

    Args:
        model: What is served.
        max_body_bytes: The largest request body.
    """
    bundle = model.predictor.bundle
    record, signature = bundle.record, model.signature
    target = record.profile.target if record.profile else None
    return {
        "model": model.card,
        "raylway": __version__,
        "task": signature.task,
        "target": {"name": signature.target} | (_numbers(target) if target else {}),
        "classes": signature.classes,
        "inputs": [_input(each, record) for each in signature.inputs],
        "missing": [*MISSING_WORDS, *signature.missing],
        "examples": examples.read(bundle.folder).rows,
        "metrics": record.metrics,
        "data": msgspec.to_builtins(record.data),
        "provenance": msgspec.to_builtins(record.provenance),
        "max_body_bytes": max_body_bytes,
    }


def _input(each: Input, record: BundleRecord) -> dict[str, Any]:
    """An input, with its range or its categories in training where they are known."""
    found: dict[str, Any] = msgspec.to_builtins(each) | {"values": each.values}
    transform = record.transform
    if each.type == "category":
        known = [name for feature in transform.categorical if feature.column == each.name for name in feature.known]
        return found | {"known": known[:MOST_KNOWN], "num_known": len(known)}
    part = "seconds" if each.type == "date" else ""
    for feature in transform.numeric:
        if (feature.column, feature.part) == (each.name, part):
            found |= {"minimum": feature.minimum, "maximum": feature.maximum}
    if each.type == "date":
        found["has_hours"] = any(
            (feature.column, feature.part) == (each.name, "hour") for feature in transform.categorical
        )
    return found


def _numbers(profile: NumberProfile) -> dict[str, Any]:
    return {
        "minimum": profile.minimum,
        "maximum": profile.maximum,
        "edges": profile.edges,
        "counts": profile.counts,
    }
