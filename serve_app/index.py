"""What stands at `/` where several models are served, each under its name: a list of them.

`serve_app.index:build` is an application of its own, so that models come and go without it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ray import serve
from ray.serve.schema import LoggingConfig

from raylway.errors import UserError
from serve_app import keys as api_keys
from serve_app.keys import Keys
from serve_app.problems import HttpProblem

NAME = "_models"
"""Of the application; no job has such a name."""
DEPLOYMENT = "index"
_HTML = b"text/html"
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
)
_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Models</title>
<style>:root {{ color-scheme: light dark }} body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }}</style>
</head>
<body><h1>Models</h1><ul>{items}</ul></body>
</html>
"""  # noqa: E501


class Index:
    """The list as a plain ASGI application: a page for browsers, JSON for all others."""

    def __init__(self, models: list[str], keys: Keys | None = None) -> None:
        self._keys = keys
        listed = [{"name": name, "path": f"/{quote(name)}"} for name in models]
        items = [f'<li><a href="{quote(name)}">{html.escape(name)}</a></li>' for name in models]
        self._json = json.dumps({"models": listed}).encode()
        self._page = _PAGE.format(items="".join(items)).encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "lifespan":
            while (kind := (await receive())["type"]) != "lifespan.shutdown":
                await send({"type": f"{kind}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "http":
            await self._http(scope, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _http(self, scope: dict[str, Any], send: Callable[[Any], Awaitable[None]]) -> None:
        headers = dict(scope["headers"])
        status = 200
        extra: tuple[tuple[bytes, bytes], ...] = ()
        try:
            body, kind = self._reply(scope["path"], scope["method"], headers)
        except HttpProblem as problem:
            status, extra = problem.status, problem.headers
            body, kind = json.dumps(problem.body).encode(), b"application/problem+json"
        fields = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *_SAFE, *extra]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _reply(self, path: str, method: str, headers: dict[bytes, bytes]) -> tuple[bytes, bytes]:
        is_health = path in ("/healthz", "/readyz")
        if self._keys and not is_health:
            self._keys.admit(headers)
        if path != "/" and not is_health:
            raise HttpProblem(404, "this is not here; / lists the models, and each answers below its name")
        if method not in ("GET", "HEAD"):
            raise HttpProblem(405, f"expected GET, HEAD; found {method}", ((b"allow", b"GET, HEAD"),))
        if is_health:
            return b'{"status":"ok"}', b"application/json"
        if _HTML in headers.get(b"accept", b""):
            return self._page, b"text/html; charset=utf-8"
        return self._json, b"application/json"


@serve.deployment(
    name=DEPLOYMENT,
    max_ongoing_requests=64,
    max_surge_percent=100,
    logging_config=LoggingConfig(enable_access_log=False),
)
@serve.ingress()
class Replica:
    """The one replica."""

    def __init__(self, models: list[str], keys: str | None) -> None:
        self._index = Index(models, api_keys.read(Path(keys) if keys else None))

    def __serve_build_asgi_app__(self) -> Index:
        return self._index

    def reconfigure(self, arguments: dict[str, Any]) -> None:
        """Called by Serve, which wants it where there is a `user_config`; the constructor has all that it needs."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application; as `bound`."""
    return bound(args)


def bound(args: dict[str, Any], actor_options: dict[str, Any] | None = None) -> serve.Application:
    """The application, with further options of Ray for its replica.

    Args:
        args: `models`, their names; `keys`, the file of the API keys if there is one.

    Raises:
        UserError: They are others.
    """
    models = args.get("models")
    if args.keys() - {"models", "keys"} or not isinstance(models, list):
        raise UserError(
            "these are not the arguments of the list of models",
            where="serve_app.index:build",
            expected="models, a list of names, and if you like keys",
            found=", ".join(map(str, args)) or "none",
        )
    keys = str(Path(args["keys"]).absolute()) if args.get("keys") else None
    configured: serve.Deployment = Replica.options(  # type: ignore[attr-defined] # the decorator has made it one
        ray_actor_options={"num_cpus": 0, **(actor_options or {})},
        user_config={"models": models} | ({"keys": keys} if keys else {}),  # for whoever gives it other keys
    )
    return configured.bind(models, keys)
