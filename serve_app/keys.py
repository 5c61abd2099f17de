"""API keys: who may ask, and how often.

A line a key: its name, the key, and if you like how many requests a second it may send, as in

    # who      key                        at most
    webshop    7f1d0c6ae35b4b1f9a2e       200/s
    analysts   c0ffee1f6c1e4c52b7d98a10

The file is read when a replica starts. Keys are kept as digests, and each request is compared with all of them in a
time that does not depend on what it holds.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from raylway.errors import UserError
from serve_app.problems import HttpProblem

if TYPE_CHECKING:
    from serve_app.forms import Headers

VARIABLE = "RAYLWAY_API_KEYS"
"""Of the replica's environment: the same lines, with `;` for the end of a line if that is easier to write."""
_SHORTEST = 16
_LINE = re.compile(rf"(?P<name>[\w.-]+)\s+(?P<key>[!-~]{{{_SHORTEST},}})(?:\s+(?P<rate>\d+(?:\.\d+)?)/s)?")


@dataclass
class _Bucket:
    """A second's worth of requests may come at once."""

    rate: float
    tokens: float = field(init=False)
    filled_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.tokens, self.filled_at = self._size, time.monotonic()

    @property
    def _size(self) -> float:
        return max(1.0, self.rate)

    def wait_s(self) -> float:
        """0 for a request that may come, and is counted; otherwise how long until one may."""
        now = time.monotonic()
        self.tokens = min(self._size, self.tokens + (now - self.filled_at) * self.rate)
        self.filled_at = now
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0.0


@dataclass(frozen=True)
class _Key:
    name: str
    digest: bytes
    bucket: _Bucket | None


class Keys:
    """The keys of one replica.

    Args:
        text: The lines.
        where: Where they stand, for messages, which never show a key.

    Raises:
        UserError: A line can't be read, a name or a key stands there twice, or there is none.
    """

    def __init__(self, text: str, where: str) -> None:
        self._keys: list[_Key] = []
        for number, line in enumerate(re.split("[\n;]", text), start=1):
            stripped = line.strip()
            if stripped and not stripped.startswith("#"):
                self._add(stripped, f"{where}, line {number}")
        if not self._keys:
            raise UserError(
                "there are no API keys", where=where, expected="a line for each: NAME KEY, or NAME KEY 50/s"
            )

    def _add(self, line: str, where: str) -> None:
        found = _LINE.fullmatch(line)
        if found is None or (found["rate"] and not float(found["rate"])):
            raise UserError(
                "this is no API key",
                where=where,
                expected=f"NAME KEY, or NAME KEY 50/s; a key has {_SHORTEST} characters or more, without blanks",
                found=f"a line of {len(line)} characters",
                fix='make a key with: python -c "import secrets; print(secrets.token_urlsafe())"',
            )
        digest = hashlib.sha256(found["key"].encode()).digest()
        if any(each.name == found["name"] or each.digest == digest for each in self._keys):
            raise UserError("this name or key stands there twice", where=where, found=found["name"])
        bucket = _Bucket(float(found["rate"])) if found["rate"] else None
        self._keys.append(_Key(found["name"], digest, bucket))

    def admit(self, headers: Headers) -> str:
        """The name of the key that a request shows, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Raises:
            HttpProblem: 401, it shows none that is known; 429, too many requests showed this one.
        """
        digest = hashlib.sha256(_shown(headers)).digest()
        found = None
        for each in self._keys:  # all of them, whichever it is
            if hmac.compare_digest(each.digest, digest):
                found = each
        if found is None:
            detail = "expected the header Authorization: Bearer KEY, or X-API-Key: KEY, with a key that is known here"
            raise HttpProblem(401, detail, ((b"www-authenticate", b"Bearer"),))
        if found.bucket and (wait_s := found.bucket.wait_s()):
            detail = f"the key {found.name} may send {found.bucket.rate:g} requests a second"
            raise HttpProblem(429, detail, ((b"retry-after", str(math.ceil(wait_s)).encode()),))
        return found.name


def read(file: Path | None) -> Keys | None:
    """The keys of a file, or else of the environment; None if there are none, and everybody may ask.

    Raises:
        UserError: The file or a line of it can't be read.
    """
    if file is not None:
        try:
            return Keys(file.read_text(), str(file))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UserError("the API keys can't be read", where=str(file), found=reason) from None
    text = os.environ.get(VARIABLE)
    return None if text is None else Keys(text, VARIABLE)


def _shown(headers: Headers) -> bytes:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
