"""Questions to web servers: one file or a range of it, asked again when the connection fails."""

from __future__ import annotations

import functools
import netrc
import os
import re
import ssl
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, SSLError

from raylway import __version__
from raylway.data.location import Location, was_changed
from raylway.errors import UserError

Found = TypeVar("Found")
_TIMEOUT = urllib3.Timeout(connect=10, read=30)
_WAITS_S = (0.0, 0.5, 1.0, 2.0)
"""Before each try."""
_LONGEST_WAIT_S = 20.0
"""So long a server may ask to be left alone."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = 5
_DRAINED_BYTES = 1 << 16
_MOST_CONNECTIONS = 64
CHECKSUM = "xxh3:"
"""Begins the stamp of a file of which the server says neither ETag nor Last-Modified."""


def ask(location: Location, span: Callable[[], str | None], use: Callable[[urllib3.BaseHTTPResponse], Found]) -> Found:
    """Ask for a file and use the answer; when the connection fails, in use too, try again.

    Args:
        location: The file.
        span: The range to ask for, such as `bytes=0-99`; None for the whole file.
        use: Takes an answer with the status 200, 206 or 416; its body may fail with `HTTPError`.

    Raises:
        UserError: The server refuses, is not to be trusted, or failed several times in turn.
    """
    failure, pause = "", 0.0
    for wait in _WAITS_S:
        time.sleep(max(wait, pause))
        try:
            with closing(_followed(location, span())) as answer:
                if answer.status in (200, 206, 416):
                    return use(answer)
                failure = f"{answer.status} {answer.reason or ''}".strip()
                if answer.status not in _PASSING:
                    raise _refused(location, answer.status, failure)
                pause = _asked_pause(answer)
        except SSLError as error:
            if isinstance(error.args[0], ssl.SSLCertVerificationError):
                raise _untrusted(location, error.args[0]) from None
            failure = str(error)
        except HTTPError as error:
            failure = str(error)
    raise UserError(
        "the file can't be read from its server",
        where=location.name,
        found=f"{failure[:300]} ({len(_WAITS_S)} tries)",
        fix="give the command again later, or copy the file to a folder or bucket",
    )


def size_of(answer: urllib3.BaseHTTPResponse) -> int | None:
    """Bytes of the whole file; None if the server does not say."""
    if answer.status == 200:
        length = answer.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None
    found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def stamp_of(answer: urllib3.BaseHTTPResponse) -> str:
    """What tells that the file is another one; empty if the server does not say."""
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def refuse_other(location: Location, answer: urllib3.BaseHTTPResponse) -> None:
    """Raises:
    UserError: The answer is about another file than the one that was found.
    """
    size = size_of(answer)
    is_stamped = not location.stamp.startswith(CHECKSUM)
    if (size is not None and size != location.length) or (is_stamped and stamp_of(answer) != location.stamp):
        raise was_changed(location)


def _followed(location: Location, span: str | None) -> urllib3.BaseHTTPResponse:
    """The answer at the end of the redirects. Where they lead is not told: it may hold a signature."""
    address = location.path
    for _ in range(_REDIRECTS + 1):
        headers = {"Accept-Encoding": "identity", "User-Agent": f"raylway/{__version__}"}
        if span:
            headers["Range"] = span
        if urlsplit(address)[:2] == urlsplit(location.path)[:2]:
            headers |= _login(address)
        answer = _pool(_proxy(address)).request(
            "GET",
            address,
            headers=headers,
            timeout=_TIMEOUT,
            redirect=False,
            retries=False,  # urllib3's own are logged with the whole address
            preload_content=False,
            decode_content=False,
        )
        target = answer.get_redirect_location()
        if not target:
            return answer
        if int(answer.headers.get("Content-Length") or _DRAINED_BYTES) < _DRAINED_BYTES:
            answer.drain_conn()
        answer.close()
        address = _led_to(location, address, target)
    raise UserError("the address leads on and on", location.name, f"at most {_REDIRECTS} redirects")


def _led_to(location: Location, address: str, target: str) -> str:
    try:
        address, before = urljoin(address, target), urlsplit(address).scheme
        scheme = urlsplit(address).scheme
        urllib3.util.parse_url(address)
    except ValueError:
        raise UserError("the address leads to one that is none", location.name) from None
    if scheme not in ("https", before):
        raise UserError(
            "the address leads to one that is not encrypted", location.name, "https:// to the end", f"{scheme}://"
        )
    return address


@functools.lru_cache
def _pool(proxy: str | None) -> urllib3.PoolManager:
    trusted = ssl.create_default_context()
    if proxy is None:
        return urllib3.PoolManager(ssl_context=trusted, maxsize=_MOST_CONNECTIONS)
    user = urllib3.util.parse_url(proxy).auth
    headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers, ssl_context=trusted, maxsize=_MOST_CONNECTIONS)


def _proxy(address: str) -> str | None:
    parts = urlsplit(address)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _login(address: str) -> dict[str, str]:
    """What the user's netrc file has for a host, as a header; nothing goes out unencrypted."""
    parts = urlsplit(address)
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if parts.scheme != "https" or not path.is_file():
        return {}
    try:
        found = netrc.netrc(path).authenticators(parts.hostname or "")
    except (netrc.NetrcParseError, OSError) as error:
        raise UserError("the netrc file can't be read", where=str(path), found=f"{error}"[:200]) from None
    return urllib3.make_headers(basic_auth=f"{found[0]}:{found[2]}") if found else {}


def _asked_pause(answer: urllib3.BaseHTTPResponse) -> float:
    asked = answer.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_WAIT_S) if asked.isdecimal() else 0.0


def _refused(location: Location, status: int, found: str) -> UserError:
    if status in (404, 410):
        return UserError("the source is not there", where=location.name, found=found, fix="check the address")
    if status in (401, 403):
        return UserError(
            "the server refuses",
            where=location.name,
            expected="a file that all may read, or a login for its host in ~/.netrc (or the file that NETRC names)",
            found=found,
        )
    return UserError("the server does not give the file", where=location.name, found=found)


def _untrusted(location: Location, error: ssl.SSLCertVerificationError) -> UserError:
    return UserError(
        "the server's certificate is not trusted",
        where=location.name,
        expected="a certificate of an authority that this machine knows",
        found=error.verify_message,
        fix="name a file with your own authority's certificate in SSL_CERT_FILE",
    )
