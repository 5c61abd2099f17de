"""The HTTP interface of one bundle, as a plain ASGI application.

A request passes: path and method, media type, size, its form and types (`serve_app.forms`), the batcher, the answer.
Whatever is wrong with it is found before it meets other requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np

from raylway import __version__
from raylway.bundle.mistakes import InvalidRows
from raylway.bundle.predictor import NotFinite, Predictor
from raylway.bundle.rows import NotJson, Rows
from serve_app import openapi
from serve_app.batching import Batcher, Overloaded
from serve_app.card import card
from serve_app.forms import JSON, Form, Headers, Model, Plain, Reply, unreadable
from serve_app.invocations import Invocations
from serve_app.keys import Keys
from serve_app.page import page
from serve_app.problems import HttpProblem, busy, unprocessable
from serve_app.recent import Recent
from serve_app.tensors import Tensors
from serve_app.watch import Note, Watch

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
MAX_BODY_BYTES = 16 << 20
PATIENCE_S = 30.0
"""A request without its answer by then gets none; its client has most likely gone."""
MOST_PATIENCE_MS = 300_000
STUCK_S = 60.0
"""A batch that takes longer is taken for one that never ends."""
RETRY_AFTER_S = 1
_LONGEST = 200
"""Characters of a client's own text in an answer or the log."""
_OPEN = {"/", "/docs", "/healthz", "/readyz", "/ping", "/health", "/v2/health/live", "/v2/health/ready"}
"""Paths that need no key: they say nothing of the model, and whoever watches the process has none."""
_SAFE = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
"""Headers of every answer."""
_LOGGER = logging.getLogger("ray.serve")


class Service:
    """Answers HTTP requests with one model.

    Args:
        predictor: The model.
        max_batch: Most rows in one pass through it.
        keys: Who may ask; everybody if None.
        watch: Who is told of every request.
        metrics: Gives what `GET /metrics` answers, if there is such a path.
    """

    def __init__(
        self,
        predictor: Predictor,
        max_batch: int,
        keys: Keys | None = None,
        watch: Watch | None = None,
        metrics: Callable[[], bytes] | None = None,
    ) -> None:
        self._predictor, self._keys, self._metrics = predictor, keys, metrics
        self._watch = watch or Watch(predictor.bundle.record)
        self._batcher = Batcher(self._outputs, max_batch)
        self._watch.waiting = self._batcher.waiting
        self.recent = Recent(predictor)
        model = Model(predictor)
        tensors = Tensors(model)
        self._forms = forms_of(model)
        self._pages = _pages(model, tensors)
        self._ready = {"/readyz": Reply(msgspec.json.encode({"status": "ready", "model": model.card}))}
        for path, content in tensors.pages().items():
            chosen = self._ready if path.endswith("/ready") else self._pages
            chosen[path] = Reply(msgspec.json.encode(content))

    def check_health(self) -> None:
        """Raise if the model is stuck: no client waits for a batch as long as that.

        Raises:
            RuntimeError: See there.
        """
        if (busy_s := self._batcher.busy_s) > STUCK_S:
            raise RuntimeError(f"the model has been at one batch for {busy_s:.0f} s")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send, self._watch.close)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        headers = dict(scope["headers"])
        note = Note(scope["method"], path[:_LONGEST], headers.get(b"x-request-id", b"").decode("latin-1")[:_LONGEST])
        try:
            reply = await self._reply(path, scope["method"], headers, receive, note)
            note.status = 200
        except HttpProblem as problem:
            note.status, reply = problem.status, _as_reply(problem, path)
        finally:
            self._watch.ended(note)
        note.sent = len(reply.body)
        length = str(len(reply.body)).encode()
        fields = [(b"content-type", reply.media_type), (b"content-length", length), *_SAFE, *reply.headers]
        await send({"type": "http.response.start", "status": note.status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})

    async def _reply(self, path: str, method: str, headers: Headers, receive: Receive, note: Note) -> Reply:
        if self._keys and path not in _OPEN:
            note.key = self._keys.admit(headers)
        if form := self._forms.get(path):
            _allow(method, "POST")
            note.form = form.name
            _check_headers(headers, form)
            return await self._in_time(form, receive, headers, note)
        if found := self._pages.get(path):
            _allow(method, "GET", "HEAD")
            return found
        if ready := self._ready.get(path):
            _allow(method, "GET", "HEAD")
            # the model was loaded and checked before the first request could come; what is left to ask is room
            if self._batcher.full:
                raise busy("the queue is full", RETRY_AFTER_S)
            return ready
        if path == "/metrics" and self._metrics:
            _allow(method, "GET", "HEAD")
            return Reply(await asyncio.to_thread(self._metrics), b"text/plain; version=0.0.4; charset=utf-8")
        raise HttpProblem(404, f"{path[:_LONGEST]} is not here; POST /predict answers rows, and /docs shows how")

    async def _in_time(self, form: Form, receive: Receive, headers: Headers, note: Note) -> Reply:
        patience_s = _patience_s(headers)
        body = None
        try:
            async with asyncio.timeout(patience_s):
                body = await _body(receive)
                note.received = len(body)
                return await self._answer(form, body, headers, note)
        except TimeoutError:
            if body is None:
                raise HttpProblem(408, f"the body was not here within {patience_s:g} s") from None
            raise busy(f"no answer within {patience_s:g} s", RETRY_AFTER_S) from None

    async def _answer(self, form: Form, body: bytes, headers: Headers, note: Note) -> Reply:
        try:
            asked = form.read(body, headers)
            note.rows = len(asked.rows)
            # in a thread: a function of the user's may take its time
            derives = self._predictor.bundle.record.transform.derive
            if derives and (problems := await asyncio.to_thread(self._predictor.problems, asked.rows)):
                raise InvalidRows(problems)
            self._watch.asked(asked.rows)
            outputs = await self._batcher.submit(asked.rows)
            reply = asked.reply(outputs)
            self.recent.add(form.name, headers, body, outputs)
            return reply
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

    def _outputs(self, rows: Rows) -> np.ndarray:
        self._watch.computed(len(rows))
        return self._predictor.outputs(rows)


def forms_of(model: Model) -> dict[str, Form]:
    """The ways of asking a model, by path."""
    tensors = Tensors(model)
    return {
        "/predict": Plain(model),
        "/invocations": Invocations(model),
        f"{tensors.path}/infer": tensors,
        f"{tensors.path}{tensors.version}/infer": tensors,
    }


def _pages(model: Model, tensors: Tensors) -> dict[str, Reply]:
    """What is answered to GET, by path, whatever the state of the queue."""
    signature = {"model": model.card, **msgspec.structs.asdict(model.signature)}
    alive = Reply(b'{"status":"ok"}')
    return {
        "/": page("page"),
        "/docs": page("docs"),
        "/card": Reply(msgspec.json.encode(card(model, MAX_BODY_BYTES))),
        "/signature": Reply(msgspec.json.encode(signature)),
        "/openapi.json": Reply(msgspec.json.encode(openapi.document(model, tensors, MAX_BODY_BYTES))),
        **dict.fromkeys(("/healthz", "/ping", "/health"), alive),
        "/version": Reply(__version__.encode(), b"text/plain; charset=utf-8"),
    }


def _as_reply(problem: HttpProblem, path: str) -> Reply:
    # clients of the Open Inference Protocol look for the sentence under "error"
    body = problem.body | {"error": problem.body["detail"]} if path.startswith("/v2") else problem.body
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
        found = media_type.decode("latin-1")[:_LONGEST]
        raise HttpProblem(415, f"expected the header Content-Type: {allowed}; found {found}")
    if (coding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
        raise HttpProblem(415, f"expected a body without content coding; found {coding.decode('latin-1')[:_LONGEST]}")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()


def _patience_s(headers: Headers) -> float:
    """How long the client waits."""
    text = headers.get(b"x-request-timeout-ms")
    if text is None:
        return PATIENCE_S
    if not text.isdigit() or not 0 < int(text[:9]) <= MOST_PATIENCE_MS:
        found = text.decode("latin-1")[:40]
        raise HttpProblem(400, f"expected X-Request-Timeout-Ms from 1 to {MOST_PATIENCE_MS:,}; found {found}")
    return int(text) / 1000


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


async def _lifespan(receive: Receive, send: Send, close: Callable[[], None]) -> None:
    while True:
        kind = (await receive())["type"]
        if kind == "lifespan.shutdown":
            close()
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
