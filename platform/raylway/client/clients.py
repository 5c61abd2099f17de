"""The two clients: the same questions, asked by a thread that waits or by a task that awaits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx
import msgspec

from raylway.client.answers import Answers, Signature, joined
from raylway.client.bodies import bodies, records
from raylway.client.exchange import Action, Outcome, Request, Send, Wait, exchange

if TYPE_CHECKING:
    from raylway.client.bodies import Rows

TIMEOUT_S = 60.0
_READY_S = 5.0
Answer = TypeVar("Answer")
Conversation = Generator[Action, Outcome, Answer]


class _Questions:
    """What both clients ask.

    Args:
        url: Of the service, such as `http://127.0.0.1:8000`; a path behind it stays.
        key: The API key, if the service asks for one.
        timeout_s: How long one call may take with all its requests, tries and waits.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._options: dict[str, Any] = {"base_url": url, "headers": headers}

    def _predict(self, rows: Rows, ids: Sequence[str | int] | None) -> Conversation[Answers]:
        found = records(rows)
        if ids is not None and len(ids) != len(found):
            raise ValueError(f"expected an id for each of {len(found)} rows; found {len(ids)}")
        deadline = time.monotonic() + self._timeout_s
        parts = []
        for body in bodies(found, ids):
            parts.append((yield from exchange(Request("POST", "/predict", body.content, body.first_row), deadline)))
        return joined(parts, None if ids is None else list(ids))

    def _signature(self) -> Conversation[Signature]:
        body = yield from exchange(Request("GET", "/signature"), time.monotonic() + self._timeout_s)
        return msgspec.json.decode(body, type=Signature)

    def _ready(self) -> Conversation[bool]:
        outcome = yield Send(Request("GET", "/readyz"), {}, _READY_S)
        return isinstance(outcome, httpx.Response) and outcome.is_success


class Client(_Questions):
    """Asks a service and waits; use it in a `with`, or close it. Threads may share it.

    Args:
        url: Of the service, such as `http://127.0.0.1:8000`; a path behind it stays.
        key: The API key, if the service asks for one.
        timeout_s: How long one call may take with all its requests, tries and waits.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(url, key, timeout_s)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, rows: Rows, ids: Sequence[str | int] | None = None) -> Answers:
        """Answer rows, of any number: a large table is sent in several requests, one after the other.

        Args:
            rows: Mappings of feature to value, or a table of pandas, Arrow, Polars or whatever else gives Arrow data.
                None, NaN and NaT are missing cells; an index is no column.
            ids: What the rows are called, if the answers are to say so.

        Raises:
            RequestFailed: There is no answer, with the mistakes in the rows if there are any.
        """
        return self._run(self._predict(rows, ids))

    def signature(self) -> Signature:
        """What the model takes and gives.

        Raises:
            RequestFailed: There is no answer.
        """
        return self._run(self._signature())

    def ready(self) -> bool:
        """Whether the service takes requests now; asks once."""
        return self._run(self._ready())

    def _run(self, conversation: Conversation[Answer]) -> Answer:
        outcome: Outcome = None
        while True:
            try:
                action = conversation.send(outcome)
            except StopIteration as done:
                return done.value
            if isinstance(action, Wait):
                time.sleep(action.seconds)
                continue
            try:
                outcome = _sent(self._http, action)
            except httpx.TransportError as error:
                outcome = error


class AsyncClient(_Questions):
    """`Client` for asyncio: the same methods, each to be awaited; use it in an `async with`. Tasks may share it.

    Args:
        url: As of `Client`.
        key: As of `Client`.
        timeout_s: As of `Client`.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(url, key, timeout_s)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(self, rows: Rows, ids: Sequence[str | int] | None = None) -> Answers:
        """See `Client.predict`."""
        return await self._run(self._predict(rows, ids))

    async def signature(self) -> Signature:
        """See `Client.signature`."""
        return await self._run(self._signature())

    async def ready(self) -> bool:
        """See `Client.ready`."""
        return await self._run(self._ready())

    async def _run(self, conversation: Conversation[Answer]) -> Answer:
        outcome: Outcome = None
        while True:
            try:
                action = conversation.send(outcome)
            except StopIteration as done:
                return done.value
            if isinstance(action, Wait):
                await asyncio.sleep(action.seconds)
                continue
            try:
                async with asyncio.timeout(action.timeout_s):
                    outcome = await self._http.send(_built(self._http, action))
            except TimeoutError:
                outcome = httpx.ReadTimeout("no answer in time")
            except httpx.TransportError as error:
                outcome = error


def _sent(http: httpx.Client, action: Send) -> httpx.Response:
    """The whole answer within the time; httpx's own limit is one for connecting and for each read."""
    until = time.monotonic() + action.timeout_s
    parts = []
    with closing(http.send(_built(http, action), stream=True)) as answer:
        for part in answer.iter_bytes():
            parts.append(part)
            if time.monotonic() > until:
                raise httpx.ReadTimeout("no answer in time")
    coded = {"content-encoding", "content-length", "transfer-encoding"}
    headers = [(name, value) for name, value in answer.headers.multi_items() if name not in coded]
    return httpx.Response(answer.status_code, headers=headers, content=b"".join(parts), request=answer.request)


def _built(http: httpx.Client | httpx.AsyncClient, action: Send) -> httpx.Request:
    asked = action.request
    return http.build_request(
        asked.method, asked.path, content=asked.content, headers=action.headers, timeout=action.timeout_s
    )
