"""Files of web servers: `https://host/path/file.csv`, one address a file.

A file is read in ranges where the server gives them and says, by ETag or Last-Modified, when it is another one. Else it
is copied to the temporary folder of each process that reads it, as far as it is read; a file of which the server says
neither is copied whole and known by its checksum.

The answer to every request is compared with what was found at first, and no answer that ends early is taken for whole.
Credentials come from `~/.netrc`, or the file that `NETRC` names, and go to that host over https only; a proxy from
`HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`; certificates are those of the system, or of `SSL_CERT_FILE`. `http://` is
read as well, but an https address may not lead there.
"""

from __future__ import annotations

import functools
import re
from typing import BinaryIO
from urllib.parse import urlsplit

import msgspec
import urllib3

from raylway.data import ranged, web_copy
from raylway.data.location import Format, Location, format_of, path_of, unknown_format, was_changed
from raylway.data.web_ask import ask, refuse_other, size_of, stamp_of
from raylway.errors import UserError

_STEP = 1 << 20


def find(text: str, where: str, declared: Format | None) -> list[Location]:
    """The one file that an address names.

    Args:
        text: The address, as the job writes it.
        where: The key, for messages.
        declared: The format that the job names.

    Raises:
        UserError: It names no single file, or the server does not give it.
    """
    address = text.partition("#")[0]
    try:
        urllib3.util.parse_url(address)
        path, host = urlsplit(address).path, urlsplit(address).hostname
    except ValueError:
        raise UserError("this is no address", where=where, expected="https://host/path/file.csv", found=text) from None
    if re.search(r"[*\[]", path):
        raise UserError(
            "a web server can't be searched",
            where=where,
            expected="the address of one file, or a list of such addresses",
            found=text,
            fix="name each file (a * or [ in a name is written %2A or %5B); s3:// and gs:// take globs",
        )
    if not host or path in ("", "/") or path.endswith("/"):
        raise UserError(
            "the address names no file: folders of a web server can't be listed",
            where=where,
            expected="the address of one file, or a list of such addresses",
            found=text,
            fix="name each file; s3:// and gs:// take folders",
        )
    if not declared and format_of(address) is None:
        raise unknown_format(text, where)
    location = Location(address, address, declared=declared)
    found = ask(location, lambda: "bytes=0-0", functools.partial(_known, location))
    is_known = found.length is not None and found.stamp
    return [found if is_known else web_copy.identified(found)]


def opened(location: Location) -> BinaryIO:
    """The file's bytes, to be read from any position.

    Raises:
        UserError: It is gone, or was changed since it was found; so do reads.
    """
    fetch = functools.partial(_fetch, location) if location.has_ranges else web_copy.of(location).fetch
    return ranged.buffered(location.size, fetch)


def _known(location: Location, answer: urllib3.BaseHTTPResponse) -> Location:
    """The location with what the server says of the file."""
    kind = (answer.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if kind == "text/html" and not location.declared:
        raise UserError(
            "the server answers with a web page",
            where=location.name,
            expected="the file itself",
            found="Content-Type: text/html, such as a page to log in or to choose a download",
            fix="take the address of the download itself; if this is it, name data.read.format",
        )
    packing = answer.headers.get("Content-Encoding", "").strip().lower() or "identity"
    if packing not in ("identity", "gzip", "x-gzip"):
        raise UserError("the server packs the file", where=location.name, expected="gzip at most", found=packing)
    # of a file called .gz some servers say this of the file itself
    is_gzip = packing != "identity" and not path_of(location.path).lower().endswith(".gz")
    size, stamp = size_of(answer), stamp_of(answer)
    return msgspec.structs.replace(
        location,
        length=size,
        stamp=stamp,
        packing="gz" if is_gzip else "",
        has_ranges=answer.status != 200 and size is not None and bool(stamp),
    )


def _fetch(location: Location, view: memoryview, position: int) -> None:
    """Fill a view with the file's bytes from a position on; what a cut connection brought is kept."""
    filled = 0

    def span() -> str:
        return f"bytes={position + filled}-{position + len(view) - 1}"

    def take(answer: urllib3.BaseHTTPResponse) -> None:
        nonlocal filled
        refuse_other(location, answer)
        begin = f"bytes {position + filled}-"
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(begin):
            raise was_changed(location)
        while filled < len(view):
            chunk = answer.read(min(_STEP, len(view) - filled))
            if not chunk:
                raise urllib3.exceptions.ProtocolError("the answer ended early")
            view[filled : filled + len(chunk)] = chunk
            filled += len(chunk)

    ask(location, span, take)
