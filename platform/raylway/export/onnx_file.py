"""The graph as an ONNX file: texts of the categories and of the classes are looked up in the graph."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from raylway import __version__
from raylway.errors import UserError
from raylway.export.columns import MISSING, OTHER
from raylway.export.graph import Graph
from raylway.features.signature import Signature

METADATA = "raylway"
ROWS = "rows"
"""The first axis of everything."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MOST_BYTES = (1 << 31) - (1 << 22)
"""Of weights; a protocol buffer holds less than 2 GiB."""
_ML = "ai.onnx.ml"
_ML_VERSION = 3
"""In which `LabelEncoder` maps text to whole numbers and back; runtimes know it since 2019."""


def require_packages() -> None:
    """
    Raises:
        UserError: The extra is not installed.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            "the packages that write ONNX are not installed",
            where="--format onnx",
            expected=", ".join(_PACKAGES),
            found=f"no {' and no '.join(missing)}",
            fix='install them with: pip install "raylway[export]"',
        )


def content(program: torch.export.ExportedProgram, graph: Graph, signature: Signature, about: str) -> bytes:
    """The file.

    Args:
        program: Of the graph.
        graph: What it was made of.
        signature: Its inputs name those of the file.
        about: What the file says about itself.

    Raises:
        UserError: An operation of the model has no counterpart in ONNX, an input has the name of an output, or the
            weights are too large for one file.
    """
    outputs = ["predictions", "probabilities"][: 1 + bool(signature.classes)]
    _check(program, [each.name for each in signature.inputs], outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            found = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:  # noqa: BLE001 - what an operation of the user's model makes of it
            raise UserError(
                "the model can't be written as ONNX",
                where="--format onnx",
                expected="operations that ONNX has",
                found=f"{type(error).__name__}: {error}",
                fix="use others in the model, or export it with --format torch-export",
            ) from None
    assert found is not None
    model: Any = found.model
    found.rename_axes({model.graph.inputs[0].shape[0]: ROWS})
    return _with_texts(model, graph, signature, outputs, about)


def answers(file: bytes, columns: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime answers; texts for labels.

    Args:
        file: As `content` gives it.
        columns: By input float64 [N], int64 [N] of a date, or texts [N] of a category, `""` for missing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(columns))


def _check(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if taken := sorted(set(inputs) & set(outputs)):
        raise UserError(
            f"an input has the name of an output: {taken[0]}",
            where="--format onnx",
            expected=f"inputs not called {' or '.join(outputs)}",
            found=taken[0],
            fix="rename the column, or export with --format torch-export",
        )
    size = sum(each.numel() * each.element_size() for each in program.state_dict.values())
    if size > _MOST_BYTES:
        raise UserError(
            "the weights are too large for one ONNX file",
            where="--format onnx",
            expected="less than 2 GiB",
            found=f"{size:,} bytes",
            fix="export with --format torch-export",
        )


def _with_texts(model: Any, graph: Graph, signature: Signature, outputs: Sequence[str], about: str) -> bytes:
    """The model of the numbers with the signature's names, and texts where it has codes of them."""
    from onnxscript import ir

    names = {*(each.name for each in signature.inputs), *outputs}
    inner = model.graph
    for value in [each for node in inner.all_nodes() for each in node.outputs] + [*inner.initializers.values()]:
        if value.name in names:
            value.name = f"/{value.name}"
    for place, each in enumerate(signature.inputs):
        value = inner.inputs[place]
        value.name = each.name if each.type != "category" else f"/code of {each.name}"
        if each.type == "category":
            words = graph.words[each.name]
            table = {"": MISSING, **{word: code for code, word in enumerate(words, 1)}}
            text = ir.Value(name=each.name, type=ir.TensorType(ir.DataType.STRING), shape=value.shape)
            inner.inputs[place] = text
            inner.insert_before(inner[0], _lookup(text, value, table))
    for place, name in enumerate(outputs):
        value = inner.outputs[place]
        if name == "predictions" and signature.classes:
            value.name = "/class"
            label = ir.Value(name=name, type=ir.TensorType(ir.DataType.STRING), shape=value.shape)
            inner.outputs[place] = label
            inner.append(_lookup(value, label, dict(enumerate(signature.classes))))
        else:
            value.name = name
    model.opset_imports[_ML] = _ML_VERSION
    model.metadata_props[METADATA] = about
    model.producer_name, model.producer_version = "raylway", __version__
    return ir.to_proto(model).SerializeToString()


def _lookup(given: Any, found: Any, table: Mapping[Any, Any]) -> Any:
    """The node that turns texts into codes (`OTHER` for those that are not in the table), or codes into texts (the
    empty one for `graph.REFUSED`)."""
    from onnxscript import ir

    keys, values = list(table), list(table.values())
    if isinstance(keys[0], str):
        attributes = [
            ir.AttrStrings("keys_strings", keys),
            ir.AttrInt64s("values_int64s", values),
            ir.AttrInt64("default_int64", OTHER),
        ]
    else:
        attributes = [
            ir.AttrInt64s("keys_int64s", keys),
            ir.AttrStrings("values_strings", values),
            ir.AttrString("default_string", ""),
        ]
    return ir.Node(_ML, "LabelEncoder", [given], attributes, outputs=[found])
