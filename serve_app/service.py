"""The HTTP interface of one bundle, as a plain ASGI application.

A request passes: path and method, media type, size, JSON and types (`raylway.bundle.rows`), the batcher, the answer.
Whatever is wrong with it is found before it meets other requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from raylway.bundle.predictor import NotFinite, Predictor
from raylway.bundle.rows import Form, InvalidRows, NotJson, RowReader
from serve_app import openapi
from serve_app.batching import Batcher, Overloaded
from serve_app.problems import HttpProblem, busy, unprocessable

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Reply = tuple[bytes, bytes]
"""Media type and body."""

MAX_BODY_BYTES = 16 << 20
RETRY_AFTER_S = 1
_JSON = b"application/json"
_LOGGER = logging.getLogger("ray.serve")


class Service:
    """Answers HTTP requests with one model.

    Args:
        predictor: The model.
        max_batch: Most rows in one pass through it.
    """

    def __init__(self, predictor: Predictor, max_batch: int) -> None:
        record = predictor.bundle.record
        self._predictor = predictor
        self._reader = RowReader(predictor.signature)
        self._batcher = Batcher(predictor.outputs, max_batch)
        self._model = {"name": record.name, "version": record.version}
        page = Path(__file__).with_name("docs.html").read_bytes()
        signature = msgspec.json.encode({"model": self._model, **msgspec.structs.asdict(record.signature)})
        document = msgspec.json.encode(openapi.document(predictor.bundle, MAX_BODY_BYTES))
        self._pages: dict[str, Callable[[], Reply]] = {
            "/": lambda: (b"text/html; charset=utf-8", page),
            "/docs": lambda: (b"text/html; charset=utf-8", page),
            "/signature": lambda: (_JSON, signature),
            "/openapi.json": lambda: (_JSON, document),
            "/healthz": lambda: (_JSON, b'{"status":"ok"}'),
            "/readyz": self._ready,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        further: tuple[tuple[bytes, bytes], ...] = ()
        try:
            status, (media_type, body) = 200, await self._reply(scope, receive)
        except HttpProblem as problem:
            status, further = problem.status, problem.headers
            media_type, body = b"application/problem+json", msgspec.json.encode(problem.body)
        length = str(len(body)).encode()
        fields = [(b"content-type", media_type), (b"content-length", length), *further]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _reply(self, scope: Scope, receive: Receive) -> Reply:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        method = scope["method"]
        if path == "/predict":
            _allow(method, "POST")
            return _JSON, await self._predict(await _body(scope, receive))
        if page := self._pages.get(path):
            _allow(method, "GET", "HEAD")
            return page()
        raise HttpProblem(404, f"{path} is not here; POST /predict answers rows, and /docs shows how")

    async def _predict(self, body: bytes) -> bytes:
        try:
            form, rows = self._reader.read(body)
            # in a thread: a function of the user's may take its time
            derives = self._predictor.bundle.record.transform.derive
            if derives and (problems := await asyncio.to_thread(self._predictor.problems, rows)):
                raise InvalidRows(problems)
            outputs = await self._batcher.submit(rows)
            return msgspec.json.encode(self._answer(form, outputs))
        except NotJson as error:
            raise HttpProblem(400, f"the body is not valid JSON: {error}") from None
        except InvalidRows as error:
            raise unprocessable(error) from None
        except Overloaded as error:
            raise busy(str(error), RETRY_AFTER_S) from None
        except NotFinite as error:
            raise HttpProblem(500, str(error)) from None
        except Exception as error:
            # A model of the user's own may raise anything; the client gets a sentence, the log the traceback.
            _LOGGER.exception("the model failed")
            raise HttpProblem(500, f"the model raised {type(error).__name__}") from None

    def _answer(self, form: Form, outputs: np.ndarray) -> Any:
        answers = self._predictor.answers(outputs)
        listed = outputs.tolist()  # float32 as the float64 of the same value: no bit is lost on the way
        if form == "data":
            return listed if answers.labels is not None else [[value] for value in listed]
        if answers.labels is None:
            return {"predictions": listed, "model": self._model}
        classes = self._predictor.signature.classes
        probabilities = [dict(zip(classes, row, strict=True)) for row in listed]
        return {"predictions": answers.labels, "probabilities": probabilities, "model": self._model}

    def _ready(self) -> Reply:
        """The model was loaded and checked before the first request could come; what is left to ask is room."""
        if self._batcher.full:
            raise busy("the queue is full", RETRY_AFTER_S)
        return _JSON, msgspec.json.encode({"status": "ready", "model": self._model})


def _allow(method: str, *allowed: str) -> None:
    if method not in allowed:
        names = ", ".join(allowed)
        raise HttpProblem(405, f"expected {names}; found {method}", ((b"allow", names.encode()),))


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The request's body; refused by its headers before it is read where they say enough."""
    headers = dict(scope["headers"])
    media_type = headers.get(b"content-type", _JSON).partition(b";")[0].strip().lower()
    if media_type != _JSON and not media_type.endswith(b"+json"):
        found = media_type.decode("latin-1")
        raise HttpProblem(415, f"expected the header Content-Type: application/json; found {found}")
    if (coding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
        raise HttpProblem(415, f"expected a body without content coding; found {coding.decode('latin-1')}")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large() -> HttpProblem:
    return HttpProblem(413, f"a request may hold up to {MAX_BODY_BYTES:,} bytes; send the rows in several")


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
