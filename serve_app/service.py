"""The HTTP interface of one bundle, as a plain ASGI application.

A request passes: path and method, media type, size, its form and types (`serve_app.forms`), the batcher, the answer.
Whatever is wrong with it is found before it meets other requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from raylway import __version__
from raylway.bundle.mistakes import InvalidRows
from raylway.bundle.predictor import NotFinite, Predictor
from raylway.bundle.rows import NotJson
from serve_app import openapi
from serve_app.batching import Batcher, Overloaded
from serve_app.forms import JSON, Form, Headers, Model, Plain, Reply, unreadable
from serve_app.invocations import Invocations
from serve_app.problems import HttpProblem, busy, unprocessable
from serve_app.tensors import Tensors

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
MAX_BODY_BYTES = 16 << 20
RETRY_AFTER_S = 1
_LOGGER = logging.getLogger("ray.serve")


class Service:
    """Answers HTTP requests with one model.

    Args:
        predictor: The model.
        max_batch: Most rows in one pass through it.
    """

    def __init__(self, predictor: Predictor, max_batch: int) -> None:
        self._predictor = predictor
        self._batcher = Batcher(predictor.outputs, max_batch)
        model = Model(predictor)
        tensors = Tensors(model)
        self._forms: dict[str, Form] = {
            "/predict": Plain(model),
            "/invocations": Invocations(model),
            f"{tensors.path}/infer": tensors,
            f"{tensors.path}{tensors.version}/infer": tensors,
        }
        self._pages = _pages(model, tensors)
        self._ready = {"/readyz": Reply(msgspec.json.encode({"status": "ready", "model": model.card}))}
        for path, content in tensors.pages().items():
            chosen = self._ready if path.endswith("/ready") else self._pages
            chosen[path] = Reply(msgspec.json.encode(content))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        try:
            status, reply = 200, await self._reply(path, scope, receive)
        except HttpProblem as problem:
            status, reply = problem.status, _as_reply(problem, path)
        length = str(len(reply.body)).encode()
        fields = [(b"content-type", reply.media_type), (b"content-length", length), *reply.headers]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})

    async def _reply(self, path: str, scope: Scope, receive: Receive) -> Reply:
        method = scope["method"]
        if form := self._forms.get(path):
            _allow(method, "POST")
            headers = dict(scope["headers"])
            _check_headers(headers, form)
            return await self._answer(form, await _body(receive), headers)
        if page := self._pages.get(path):
            _allow(method, "GET", "HEAD")
            return page
        if ready := self._ready.get(path):
            _allow(method, "GET", "HEAD")
            # the model was loaded and checked before the first request could come; what is left to ask is room
            if self._batcher.full:
                raise busy("the queue is full", RETRY_AFTER_S)
            return ready
        raise HttpProblem(404, f"{path[:200]} is not here; POST /predict answers rows, and /docs shows how")

    async def _answer(self, form: Form, body: bytes, headers: Headers) -> Reply:
        try:
            asked = form.read(body, headers)
            # in a thread: a function of the user's may take its time
            derives = self._predictor.bundle.record.transform.derive
            if derives and (problems := await asyncio.to_thread(self._predictor.problems, asked.rows)):
                raise InvalidRows(problems)
            return asked.reply(await self._batcher.submit(asked.rows))
        except HttpProblem:
            raise
        except NotJson as error:
            raise unreadable("JSON", error) from None
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


def _pages(model: Model, tensors: Tensors) -> dict[str, Reply]:
    """What is answered to GET, by path, whatever the state of the queue."""
    page = Reply(Path(__file__).with_name("docs.html").read_bytes(), b"text/html; charset=utf-8")
    signature = {"model": model.card, **msgspec.structs.asdict(model.signature)}
    alive = Reply(b'{"status":"ok"}')
    return {
        "/": page,
        "/docs": page,
        "/signature": Reply(msgspec.json.encode(signature)),
        "/openapi.json": Reply(msgspec.json.encode(openapi.document(model, tensors, MAX_BODY_BYTES))),
        **dict.fromkeys(("/healthz", "/ping", "/health"), alive),
        "/version": Reply(__version__.encode(), b"text/plain; charset=utf-8"),
    }


def _as_reply(problem: HttpProblem, path: str) -> Reply:
    # clients of the Open Inference Protocol look for the sentence under "error"
    body = problem.body | {"error": problem.body["detail"]} if path.startswith("/v2/") else problem.body
    return Reply(msgspec.json.encode(body), b"application/problem+json", problem.headers)


def _allow(method: str, *allowed: str) -> None:
    if method not in allowed:
        names = ", ".join(allowed)
        raise HttpProblem(405, f"expected {names}; found {method}", ((b"allow", names.encode()),))


def _check_headers(headers: Headers, form: Form) -> None:
    """Refuse a body by what its headers say, before it is read."""
    media_type = headers.get(b"content-type", JSON).partition(b";")[0].strip().lower()
    if media_type != JSON and not media_type.endswith(b"+json") and media_type not in form.media_types:
        allowed = b" or ".join((JSON, *form.media_types)).decode()
        found = media_type.decode("latin-1")[:200]
        raise HttpProblem(415, f"expected the header Content-Type: {allowed}; found {found}")
    if (coding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
        raise HttpProblem(415, f"expected a body without content coding; found {coding.decode('latin-1')[:200]}")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()


async def _body(receive: Receive) -> bytes:
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
