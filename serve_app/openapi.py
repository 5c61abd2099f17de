"""The OpenAPI 3.1 document of one bundle, made from its signature."""

from __future__ import annotations

import sys
from typing import Any

from raylway import __version__
from raylway.bundle import examples
from raylway.bundle.contents import Bundle
from raylway.bundle.mistakes import INT64
from raylway.features.signature import Input, Signature
from serve_app.forms import Model
from serve_app.problems import TITLES
from serve_app.tensors import Tensors

Schema = dict[str, Any]
_JSON = "application/json"
_PATIENCE = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "schema": {"type": "integer", "minimum": 1, "maximum": 300_000, "default": 30_000},
    "description": "how long the client waits",
}
_PROBLEMS = (400, 401, 408, 413, 415, 422, 429, 500, 503)
_LARGEST = sys.float_info.max
_MOST_CATEGORIES = 50
"""Named in the description of a feature; `GET /signature` and the bundle have them all."""


def document(model: Model, tensors: Tensors, max_body_bytes: int) -> dict[str, Any]:
    """The whole document.

    Args:
        model: What is served.
        tensors: The Open Inference Protocol's way of asking it.
        max_body_bytes: The largest request body.
    """
    bundle = model.predictor.bundle
    record = bundle.record
    made = examples.read(bundle.folder).rows[:1]
    answers = _ref("Answers")
    limit = f"Up to {max_body_bytes:,} bytes; no rows are answered with no answers."
    paths = {
        "/predict": _operation(
            "predict",
            "Answer rows",
            "Either `rows`, objects with a value for each feature, and `ids` beside them if you like, or `data`, lists "
            f"of values in the order of `/signature`. {limit}",
            {"oneOf": [_ref("RowsRequest"), _ref("DataRequest")]},
            {"rows": {"rows": made}, "data": {"data": [list(row.values()) for row in made]}},
            {"oneOf": [answers, _ref("NestedList")]},
        ),
        "/invocations": _operation(
            "invocations",
            "Answer rows as MLflow's scoring server does",
            "`inputs` may also hold a list of values for each feature; "
            f"`text/csv` with a line of names is taken too, and `params` if they are empty. {limit}",
            _ref("InvocationsRequest"),
            {
                "dataframe_records": {"dataframe_records": made},
                "dataframe_split": {
                    "dataframe_split": {
                        "columns": [each.name for each in record.signature.inputs],
                        "data": [list(row.values()) for row in made],
                    }
                },
            },
            answers,
        ),
        f"{tensors.path}/infer": _operation(
            "infer",
            "Answer rows by the Open Inference Protocol",
            "A tensor for each feature, or one of all features in the order of `/signature`; with the binary data "
            f"extension. {limit}",
            _ref("InferRequest"),
            {"tensors": tensors.example(made[0])} if made else {},
            _ref("InferAnswer"),
        ),
        "/signature": _page("What the model takes and gives", "application/json"),
        "/card": _page("What the model was made from, and how good it is", "application/json"),
        "/healthz": _page("The process is alive", "application/json"),
        "/readyz": _page("The model is loaded, has checked itself, and has room", "application/json", 503),
        "/openapi.json": _page("This document", "application/json"),
        "/docs": _page("A page that shows how to ask", "text/html"),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": record.name,
            "version": record.version,
            "description": f"Predicts `{record.signature.target}`; served by Raylway {__version__}.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas(record.signature, bundle),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(
    name: str, summary: str, description: str, body: Schema, examples: dict[str, Any], answer: Schema
) -> dict[str, Any]:
    """A POST that answers rows."""
    content: dict[str, Any] = {"schema": body}
    content["examples"] = {title: {"value": value} for title, value in examples.items()}
    answered = {"description": "One answer a row, in the order of the rows", "content": {_JSON: {"schema": answer}}}
    return {
        "post": {
            "summary": summary,
            "description": description,
            "operationId": name,
            "parameters": [_PATIENCE],
            "requestBody": {"required": True, "content": {_JSON: content}},
            "responses": {
                "200": answered,
                **{str(status): _problem(status) for status in _PROBLEMS},
            },
        }
    }


def schemas(signature: Signature, bundle: Bundle) -> dict[str, Schema]:
    """JSON Schemas (draft 2020-12) of requests, answers and errors."""
    categories = {feature.column: feature.known for feature in bundle.record.transform.categorical}
    values = {each.name: _value(each, categories.get(each.name, [])) for each in signature.inputs}
    row = {
        "type": "object",
        "properties": values,
        "required": [each.name for each in signature.inputs if each.required],
        "additionalProperties": False,
    }
    listed = {
        "type": "array",
        "prefixItems": list(values.values()),
        "minItems": len(values),
        "maxItems": len(values),
        "description": "values in the order of the signature",
    }
    model = _object({"name": {"type": "string"}, "version": {"type": "string"}})
    answers: dict[str, Schema] = {"predictions": {"type": "array", "items": {"type": "number"}}, "model": model}
    if signature.classes:
        of_one_row = _object({name: {"type": "number", "minimum": 0, "maximum": 1} for name in signature.classes})
        answers["predictions"] = {"type": "array", "items": {"enum": signature.classes}}
        answers["probabilities"] = {"type": "array", "items": of_one_row}
    width = max(1, len(signature.classes))
    output = {"type": "array", "items": {"type": "number"}, "minItems": width, "maxItems": width}
    text: Schema = {"type": "string"}
    each_id = {"type": ["string", "integer"], "minimum": -INT64, "maximum": INT64 - 1}
    ids: Schema = {"type": "array", "items": each_id, "description": "one for each row"}
    mistake = {"row": {"type": ["integer", "null"]}, "feature": {"type": ["string", "null"]}, "reason": text}
    problem = _object({"type": text, "title": text, "status": {"type": "integer"}, "detail": text})
    problem["properties"]["errors"] = {"type": "array", "items": _object(mistake)}
    problem["properties"]["error"] = text | {"description": "under /v2 the detail again, where that protocol has it"}
    return {
        "Row": row,
        "RowsRequest": _object({"rows": {"type": "array", "items": _ref("Row")}}, ids=ids),
        "Listed": listed,
        "DataRequest": _object({"data": {"type": "array", "items": _ref("Listed")}}),
        **_invocations([each.name for each in signature.inputs]),
        **_tensors(),
        "Answers": _object(answers, ids=ids),
        "NestedList": {
            "type": "array",
            "items": output,
            "description": "For `data`: for each row the probabilities, in the order of the classes, or [value]",
        },
        "Problem": problem,
    }


def _invocations(names: list[str]) -> dict[str, Schema]:
    """The JSON forms of MLflow's scoring server."""
    rows, lists = ({"type": "array", "items": _ref(name)} for name in ("Row", "Listed"))
    columns = {"type": "array", "items": {"type": "string", "enum": names}, "uniqueItems": True}
    columns |= {"minItems": len(names), "maxItems": len(names)}
    cells = {"type": "array", "items": {"type": "array", "items": {}, "description": "values in the order of columns"}}
    bodies = {
        "dataframe_records": rows,
        "dataframe_split": _ref("Frame"),
        "instances": {"oneOf": [rows, lists]},
        "inputs": {"oneOf": [rows, lists]},
    }
    frame = _object({"columns": columns, "data": cells}, index={"type": "array", "items": {}})
    return {"Frame": frame, "InvocationsRequest": {"oneOf": [_object({key: body}) for key, body in bodies.items()]}}


def _tensors() -> dict[str, Schema]:
    """The JSON of the Open Inference Protocol."""
    text: Schema = {"type": "string"}
    free: Schema = {"type": "object"}
    tensor = _object(
        {"name": text, "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}}, "datatype": text}
    )
    tensor["properties"] |= {"data": {"type": "array", "items": {}}, "parameters": free}
    asked = _object({"inputs": {"type": "array", "items": _ref("Tensor")}}, id=text, parameters=free)
    asked["properties"]["outputs"] = {"type": "array", "items": _object({"name": text}, parameters=free)}
    answer = {"model_name": text, "model_version": text, "outputs": {"type": "array", "items": _ref("Tensor")}}
    return {"Tensor": tensor, "InferRequest": asked, "InferAnswer": _object(answer, id=text)}


def _value(each: Input, categories: list[str]) -> Schema:
    kinds = {"number": ["number"], "category": ["string", "number", "boolean"], "date": ["string"]}[each.type]
    schema: Schema = {"type": kinds if each.required else [*kinds, "null"]}
    if each.type == "number":
        schema |= {"minimum": -_LARGEST, "maximum": _LARGEST}
    elif each.type == "category":
        schema |= {"minimum": -INT64, "maximum": INT64 - 1}  # of a number among its texts
    if each.required and each.type != "number":
        schema["minLength"] = 1  # an empty text is a missing cell
    if each.type == "date":
        schema["description"] = "a date or time in ISO 8601, such as 2013-01-01T05:00:00Z; without a zone it is UTC"
    elif categories:
        shown = ", ".join(categories[:_MOST_CATEGORIES]) + (", …" if len(categories) > _MOST_CATEGORIES else "")
        schema["description"] = f"known: {shown}; another one is accepted as unknown"
    return schema


def _object(properties: dict[str, Schema], **optional: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties | optional,
        "required": list(properties),
        "additionalProperties": False,
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _problem(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": TITLES[status],
        "content": {"application/problem+json": {"schema": _ref("Problem")}},
    }
    if status in (429, 503):
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return response


def _page(summary: str, media_type: str, *problems: int) -> dict[str, Any]:
    kind = "string" if media_type == "text/html" else "object"
    responses: dict[str, Any] = {"200": {"description": summary, "content": {media_type: {"schema": {"type": kind}}}}}
    return {"get": {"summary": summary, "responses": responses | {str(each): _problem(each) for each in problems}}}
