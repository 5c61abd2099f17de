"""One request until it is answered: when to ask again, how long to wait, when to give up. It sends and waits nothing
itself, so that the client that blocks and the one that awaits share it."""

from __future__ import annotations

import math
import random
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass

import httpx

from raylway.client.answers import RequestFailed, failure

BUSY = (429, 502, 503, 504)
"""Nothing is wrong with the request: a full queue, a key that asks too often, a proxy without its server."""
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0
_MOST_PATIENCE_MS = 300_000
"""That the service lets a client ask for."""


@dataclass(frozen=True)
class Request:
    """What is to be sent."""

    method: str
    path: str
    content: bytes | None = None
    first_row: int = 0
    """Of the call, in this request."""


@dataclass(frozen=True)
class Send:
    """Send the request, and come back with the response or with what went wrong."""

    request: Request
    headers: dict[str, str]
    timeout_s: float


@dataclass(frozen=True)
class Wait:
    """Come back when so much time has passed."""

    seconds: float


Action = Send | Wait
Outcome = httpx.Response | httpx.TransportError | None
Exchange = Generator[Action, Outcome, bytes]


def exchange(request: Request, deadline: float) -> Exchange:
    """Ask until there is an answer; its body is the result.

    Asked again: an answer of `BUSY`, not before its Retry-After, and a connection that could not be made or broke
    without an answer, since asking twice changes nothing. A wait grows from try to try and is drawn, so that many
    clients do not come again at once.

    Args:
        request: What is asked.
        deadline: Of `time.monotonic()`, for all tries together. The service hears how much of it is left.

    Raises:
        RequestFailed: Another error, or no answer by the deadline.
    """
    request_id = uuid.uuid4().hex
    tries = 0
    while True:
        left_s = deadline - time.monotonic()
        headers = {
            "X-Request-ID": request_id,
            "X-Request-Timeout-Ms": str(max(1, min(_MOST_PATIENCE_MS, int(left_s * 1000)))),
        }
        outcome = yield Send(request, headers, max(0.001, left_s))
        wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**tries) * random.uniform(0.5, 1.0)
        if isinstance(outcome, httpx.Response):
            if outcome.is_success:
                return outcome.content
            failed = failure(outcome.status_code, outcome.content, request.first_row, request_id)
            if outcome.status_code not in BUSY:
                raise failed
            wait_s = max(wait_s, _retry_after_s(outcome))
        else:
            assert outcome is not None
            failed = RequestFailed(None, f"no answer: {_named(outcome)}", [], request_id)
            if isinstance(outcome, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
                raise failed
        if time.monotonic() + wait_s >= deadline:
            raise failed
        yield Wait(wait_s)
        tries += 1


def _retry_after_s(response: httpx.Response) -> float:
    """What the header says in seconds; its other form, a date, is not ours."""
    try:
        found = float(response.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return found if math.isfinite(found) else 0.0


def _named(error: httpx.TransportError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
