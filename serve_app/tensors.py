"""The Open Inference Protocol (v2, REST) that Triton, KServe and MLServer speak: `POST /v2/models/NAME/infer`.

Rows come as one tensor a feature, [N] or [N, 1], named as the feature; or all in one tensor [N, features] in the order
of the signature. Tensors hold JSON numbers and texts, or bytes behind the JSON as the protocol's binary data extension
has it, which is what Triton's client sends unless told otherwise (github.com/triton-inference-server/server,
"protocol/extension_binary_data.md"). A float that is NaN is a missing cell: tensors have no null.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import msgspec
import numpy as np

from raylway import __version__
from raylway.bundle.mistakes import InvalidRows, Problem
from raylway.bundle.rows import NotJson, Rows
from raylway.features.signature import Input
from serve_app.forms import Asked, Headers, Model, Reply, unreadable

OCTETS = b"application/octet-stream"
_JSON_BYTES = b"inference-header-content-length"
_DTYPES = {
    "BOOL": "?",
    **{f"INT{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
"""Of elements in binary; those of BYTES have their length in front."""


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str | None = None
    outputs: list[_Output] | None = None
    parameters: dict[str, Any] = {}


class Tensors:
    """See `serve_app.forms.Form`."""

    name = "infer"
    media_types: tuple[bytes, ...] = (OCTETS,)

    def __init__(self, model: Model) -> None:
        self._model = model
        self._names = [each.name for each in model.signature.inputs]
        self._decoder = msgspec.json.Decoder(_Request)
        width = len(model.signature.classes)
        self._outputs = {"predictions": ("BYTES" if width else "FP64", [-1])}
        if width:
            self._outputs["probabilities"] = ("FP32", [-1, width])

    @property
    def path(self) -> str:
        """Of the model; `/infer` and others follow."""
        return f"/v2/models/{self._model.card['name']}"

    @property
    def version(self) -> str:
        """What may follow the path to name this version of the model."""
        return f"/versions/{self._model.card['version']}"

    def example(self, row: dict[str, Any]) -> dict[str, Any]:
        """The body that asks one row."""
        kinds = {each.name: _datatype(each) for each in self._model.signature.inputs}
        return {"inputs": [_described(name, kinds[name], [1]) | {"data": [value]} for name, value in row.items()]}

    def pages(self) -> dict[str, Any]:
        """What is answered to GET, by path, while the model can be asked."""
        name = self._model.card["name"]
        metadata = {
            "name": name,
            "versions": [self._model.card["version"]],
            "platform": "raylway",
            "inputs": [_described(each.name, _datatype(each), [-1]) for each in self._model.signature.inputs],
            "outputs": [_described(name, *kind) for name, kind in self._outputs.items()],
        }
        pages: dict[str, Any] = {
            "/v2": {"name": "raylway", "version": __version__, "extensions": ["binary_tensor_data"]},
            "/v2/health/live": {"live": True},
            "/v2/health/ready": {"ready": True},
        }
        for path in (self.path, self.path + self.version):
            pages |= {path: metadata, f"{path}/ready": {"name": name, "ready": True}}
        return pages

    def read(self, body: bytes, headers: Headers) -> Asked:
        """See there."""
        head, tail = _cut(body, headers.get(_JSON_BYTES))
        try:
            request = self._decoder.decode(head)
        except msgspec.ValidationError as error:
            _refuse(str(error))
        except RecursionError:
            raise NotJson("nested too deeply") from None
        except ValueError as error:
            raise NotJson(str(error)) from None
        rows = self._rows(request.inputs, tail)
        chosen = request.outputs or [_Output(name, {}) for name in self._outputs]
        if unknown := [each.name for each in chosen if each.name not in self._outputs]:
            _refuse(f"there is no output {unknown[0][:40]!r}, only {' and '.join(self._outputs)}")
        binary = request.parameters.get("binary_data_output") is True
        wanted = {each.name: each.parameters.get("binary_data", binary) is True for each in chosen}
        return Asked(rows, lambda outputs: self._reply(outputs, wanted, request.id))

    def _rows(self, tensors: list[_Tensor], tail: bytes) -> Rows:
        """The rows of all tensors, those in binary from the bytes behind the JSON."""
        columns: dict[str, list[Any]] = {}
        for each in tensors:
            size = each.parameters.get("binary_data_size")
            if size is None:
                values = _of_json(each)
            else:
                if type(size) is not int or not 0 <= size <= len(tail):
                    _refuse(f"expected as many bytes as binary_data_size says; found {len(tail)}", each.name)
                values, tail = _of_binary(each, tail[:size]), tail[size:]
            if len(tensors) == 1 and self._is_matrix(each):
                return self._of_matrix(each, values)
            if len(each.shape) > 2 or each.shape[1:] not in ([], [1]):
                _refuse(f"expected the shape [rows] or [rows, 1]; found {each.shape}", each.name)
            columns[each.name] = values
        if tail:
            _refuse(f"{len(tail)} bytes are left over behind the tensors")
        if len(columns) != len(tensors) or len({len(column) for column in columns.values()}) > 1:
            _refuse("expected each tensor once, and all with the same number of rows")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return self._model.reader.convert("rows", rows)

    def _is_matrix(self, tensor: _Tensor) -> bool:
        return len(tensor.shape) == 2 and (tensor.shape[1] != 1 or tensor.name not in self._names)

    def _of_matrix(self, tensor: _Tensor, values: list[Any]) -> Rows:
        width = tensor.shape[1]
        if width != len(self._names):
            _refuse(f"expected the shape [rows, {len(self._names)}]; found {tensor.shape}")
        return self._model.reader.convert("data", [values[at : at + width] for at in range(0, len(values), width)])

    def _reply(self, outputs: np.ndarray, wanted: dict[str, bool], request_id: str | None) -> Reply:
        """The chosen outputs, each in binary or not."""
        labels, listed = self._model.listed(outputs)
        described, tail = [], []
        for name, is_binary in wanted.items():
            datatype, shape = self._outputs[name]
            output = _described(name, datatype, [len(outputs), *shape[1:]])
            if is_binary:
                tail.append(_in_binary(labels) if name == "predictions" and labels is not None else outputs.tobytes())
                output["parameters"] = {"binary_data_size": len(tail[-1])}
            elif name == "predictions":
                output["data"] = listed if labels is None else labels
            else:
                output["data"] = [number for row in listed for number in row]
            described.append(output)
        card = {"model_name": self._model.card["name"], "model_version": self._model.card["version"]}
        named = {} if request_id is None else {"id": request_id}
        head = msgspec.json.encode({**card, **named, "outputs": described})
        if not tail:
            return Reply(head)
        return Reply(b"".join([head, *tail]), OCTETS, ((_JSON_BYTES, str(len(head)).encode()),))


def _cut(body: bytes, declared: bytes | None) -> tuple[bytes, bytes]:
    """The JSON, and what follows it."""
    if declared is None:
        return body, b""
    if not declared.isdigit() or int(declared) > len(body):
        raise unreadable("JSON", f"its header says {declared.decode('latin-1')[:40]} of {len(body)} bytes are JSON")
    return body[: int(declared)], body[int(declared) :]


def _of_json(tensor: _Tensor) -> list[Any]:
    """The elements, which may be nested as the shape is or not at all."""
    values = tensor.data
    if values is None:
        _refuse('expected "data", or "binary_data_size" among the parameters', tensor.name)
    if len(tensor.shape) == 2 and values and type(values[0]) is list:
        values = [each for row in values for each in (row if type(row) is list else [row])]
    _check_size(tensor, len(values))
    return values


def _of_binary(tensor: _Tensor, data: bytes) -> list[Any]:
    if tensor.datatype == "BYTES":
        values = _texts(tensor, data)
    elif dtype := _DTYPES.get(tensor.datatype):
        if len(data) % np.dtype(dtype).itemsize:
            _refuse(f"{len(data)} bytes are no whole number of {tensor.datatype}", tensor.name)
        values = np.frombuffer(data, dtype).tolist()
    else:
        _refuse(f"expected BYTES, {', '.join(_DTYPES)}; found {tensor.datatype[:40]!r}", tensor.name)
    _check_size(tensor, len(values))
    return values


def _texts(tensor: _Tensor, data: bytes) -> list[Any]:
    values, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            _refuse("its last text is cut off", tensor.name)
        try:
            values.append(data[at + 4 : end].decode())
        except UnicodeDecodeError:
            _refuse("expected text in UTF-8", tensor.name, row=len(values))
        at = end
    return values


def _check_size(tensor: _Tensor, count: int) -> None:
    if not 1 <= len(tensor.shape) <= 2 or min(tensor.shape) < 0 or math.prod(tensor.shape) != count:
        _refuse(f"the shape {tensor.shape[:8]} does not hold {count} elements", tensor.name)


def _in_binary(texts: list[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(part for text in encoded for part in (len(text).to_bytes(4, "little"), text))


def _datatype(each: Input) -> str:
    return "FP64" if each.type == "number" else {"number": "FP64", "boolean": "BOOL", "text": "BYTES"}[each.values]


def _described(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _refuse(reason: str, feature: str | None = None, row: int | None = None) -> NoReturn:
    raise InvalidRows([Problem(row, feature and feature[:200], reason)])
