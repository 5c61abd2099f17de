"""`raylway serve RUN --config`: the Serve config file of models, for `serve deploy` and a KubeRay RayService."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from raylway.launch import applications
from raylway.launch.applications import Model

FIRST_LINE = "# For `serve deploy FILE`, or as the serveConfigV2 of a KubeRay RayService (there with host 0.0.0.0)."
"""Tells our own files, which may be written anew, from others."""
_HEAD = f"""\
{FIRST_LINE}
# Every node has Raylway in its image, and sees the bundles.
"""
INDEX = "_models"
"""Of `serve_app.index`, whose module imports Ray."""


def content(models: Sequence[Model], host: str, port: int, keys: Path | None) -> str:
    """The file's text: Ray's own schema (`ray.serve.schema.ServeDeploySchema`), what `raylway serve` would run.

    Args:
        models: Several are served below their names, and listed at `/`.
        host: Address to listen on.
        port: HTTP port.
        keys: The file of the API keys, on every node.
    """
    listed = [
        _application(
            each.name,
            applications.route(each, models),
            "serve_app.app:build",
            applications.arguments(each, keys, cores=None),
        )
        for each in models
    ]
    if len(models) > 1:
        names: dict[str, Any] = {"models": [each.name for each in models]}
        if keys:
            names["keys"] = str(keys.absolute())
        listed.append(_application(INDEX, "/", "serve_app.index:build", names))
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "logging_config": {"log_level": "WARNING"},
        "applications": listed,
    }
    stream = io.StringIO()
    writer = YAML(typ="rt")
    writer.width = 4096
    writer.dump(config, stream)
    return _HEAD + stream.getvalue()


def _application(name: str, route: str, build: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "route_prefix": route, "import_path": build, "args": arguments}
