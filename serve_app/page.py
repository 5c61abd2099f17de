"""The pages for people: `/`, to try the model on, and `/docs`, which shows how to ask it.

Each is one self-contained file, put together from those in `web/` when a replica starts.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from serve_app.forms import Reply

_WEB = Path(__file__).with_name("web")
_PART = re.compile(r"<!-- ([a-z]+\.(?:css|js|html)) -->\n")


def page(name: str) -> Reply:
    """A page of `web/` with all its parts in it; it may run these, and ask this server alone."""
    html = _PART.sub(lambda part: _source(part[1]), _source(f"{name}.html"))
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    fields = ((b"content-security-policy", policy.encode()), (b"referrer-policy", b"no-referrer"))
    return Reply(html.encode(), b"text/html; charset=utf-8", fields)


def _source(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")
