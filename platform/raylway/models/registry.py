"""From a model's name and arguments to the module: our own kinds, or a function of the user's.

A function of the user's is called as

    function(num_numeric: int, category_counts: list[int], num_outputs: int, **args) -> torch.nn.Module

and its module as `module(numeric, categorical)`: float32 [N, num_numeric] and int64 [N, len(category_counts)], where
feature c has the codes 0 (unknown) to category_counts[c]. It returns [N, num_outputs] logits, one for each class, or
for regression (num_outputs 1) [N] or [N, 1] standardised values. Importing this file imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from raylway.errors import UserError
from raylway.features.transform import Transform
from raylway.job.schema import Model

if TYPE_CHECKING:
    from torch import nn

_WHERE = "model.kind"


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle says about its model."""

    kind: str
    """`mlp`, or `module:function`."""
    arguments: dict[str, Any]


def spec(model: Model) -> ModelSpec:
    """Of the job file's section."""
    if model.kind == "mlp":
        return ModelSpec("mlp", {"hidden": list(model.hidden), "dropout": model.dropout})
    return ModelSpec(model.kind, dict(model.args))


def source(kind: str) -> bytes:
    """The text of the user's module, which is part of what a run is; empty for our own kinds.

    Raises:
        UserError: There is no such module.
    """
    if kind == "mlp":
        return b""
    return _file(kind.partition(":")[0]).read_bytes()


def build(wanted: ModelSpec | Model, transform: Transform) -> nn.Module:
    """The module, with the weights that torch's random numbers give it now.

    Raises:
        UserError: The user's module or function is missing, does not take the arguments, or gives no module whose
            output has the right shape. What the user's code itself raises passes through.
    """
    import torch

    if isinstance(wanted, Model):
        wanted = spec(wanted)
    facts: dict[str, Any] = {
        "num_numeric": transform.num_numeric,
        "category_counts": transform.category_counts,
        "num_outputs": max(1, len(transform.target.classes)),
    }
    if wanted.kind == "mlp":
        from raylway.models.mlp import Mlp

        return Mlp(**facts, **wanted.arguments)
    function = _function(wanted.kind)
    try:
        inspect.signature(function).bind(**facts, **wanted.arguments)
    except TypeError as error:
        raise UserError(
            f"the model's function {wanted.kind} can't be called: {error}",
            where=_WHERE,
            expected=f"a function that takes {', '.join([*facts, *wanted.arguments])}",
            found=f"{function.__name__}{inspect.signature(function)}",
            fix="change the function, or model.args",
        ) from None
    module = function(**facts, **wanted.arguments)
    if not isinstance(module, torch.nn.Module):
        raise UserError(
            f"the model's function {wanted.kind} must return a torch.nn.Module",
            where=_WHERE,
            found=type(module).__name__,
        )
    _check_output(module, wanted.kind, facts)
    return module


def _file(module: str) -> Path:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        raise UserError(
            f"there is no module {module!r}",
            where=_WHERE,
            expected="a Python module beside the job file, in the current folder, or installed",
            fix="check the name before the colon",
        )
    return Path(found.origin)


def _function(kind: str) -> Callable[..., Any]:
    name, _, attribute = kind.partition(":")
    path = _file(name)
    function = getattr(importlib.import_module(name), attribute, None)
    if not callable(function):
        raise UserError(
            f"the module {name!r} has no function {attribute!r}",
            where=_WHERE,
            expected=f"a function of that name in {path}",
            fix="check the name after the colon",
        )
    return function


def _check_output(module: nn.Module, kind: str, facts: dict[str, Any]) -> None:
    """Two rows through the model, before anyone trains it or waits for it."""
    import torch

    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    with torch.no_grad():
        output = module(
            torch.zeros(2, facts["num_numeric"]), torch.zeros(2, len(facts["category_counts"]), dtype=torch.int64)
        )
    for layer, mode in modes:
        layer.training = mode
    width = facts["num_outputs"]
    right = [(2, width), (2,)] if width == 1 else [(2, width)]
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else None
    if shape not in right:
        raise UserError(
            f"the output of the model {kind} has the wrong shape",
            where=_WHERE,
            expected=f"[rows, {width}]" + (" or [rows]" if width == 1 else ""),
            found=f"{list(shape)} for 2 rows" if shape else type(output).__name__,
        )
