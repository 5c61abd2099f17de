"""The applications of Ray Serve in the connected Ray: what runs there, and starting some more."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.storage import Place

if TYPE_CHECKING:
    from raylway.job.schema import Serve

_READY_TIMEOUT_S = 60
_LOOK_TIMEOUT_S = 60


class Model(NamedTuple):
    """What is to be served."""

    name: str
    """Of the application, and below which it answers where it is not alone."""
    bundle: Place
    options: Serve
    """Replicas and batch size, from the job file."""


class Running(NamedTuple):
    """An application that runs."""

    name: str
    route: str
    arguments: dict[str, Any]
    """Of `serve_app.app:build`, or of `serve_app.index:build`; empty if it was built by something else."""
    actor_options: dict[str, Any]
    """Ray's, of its replicas: what each needs, and its runtime environment."""
    replicas: int
    """That take requests."""
    is_declared: bool
    """By a Serve config file."""

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Of its replicas."""
        return self.actor_options.get("runtime_env") or {}


def arguments(model: Model, keys: Path | str | None, cores: int | None) -> dict[str, Any]:
    """The arguments of `serve_app.app:build`.

    Args:
        model: What is to be served.
        keys: The file of the API keys.
        cores: Of a machine that has nothing else to do; None on a cluster.
    """
    most = model.options.replicas.max
    given = {
        "bundle": str(model.bundle),
        "min_replicas": model.options.replicas.min,
        "max_replicas": most if cores is None else max(model.options.replicas.min, min(most, cores)),
        "max_batch": model.options.max_batch,
    }
    if cores is not None:
        given["cpus"] = 0  # what Ray counts of a machine of our own must not keep a new version from starting
    return given | ({"keys": str(Path(keys).absolute())} if keys else {})


def route(model: Model, models: Sequence[Model]) -> str:
    """Where a model answers: at `/` alone, below its name with others."""
    return "/" if len(models) == 1 else f"/{model.name}"


def running() -> dict[str, Running]:
    """The applications of the connected Ray by name; none if Serve does not run."""
    from ray import serve
    from ray.serve.context import _get_global_client

    from serve_app import index
    from serve_app.app import DEPLOYMENT

    if not serve.status().applications:
        return {}
    found: Any = _get_global_client()
    applications = {}
    for name, each in found.get_serve_details()["applications"].items():
        deployment = each["deployments"].get(index.DEPLOYMENT if name == index.NAME else DEPLOYMENT, {})
        config = deployment.get("deployment_config", {})
        applications[name] = Running(
            name,
            each["route_prefix"] or "",
            config.get("user_config") or {},
            config.get("ray_actor_options") or {},
            sum(replica["state"] == "RUNNING" for replica in deployment.get("replicas", [])),
            each["source"] == "declarative",
        )
    return applications


@contextmanager
def deployed(
    models: Sequence[Model], http: dict[str, Any], keys: Path | None = None, cores: int | None = None
) -> Iterator[str]:
    """Serve models in the connected Ray while the body runs; yields the address once they answer.

    Args:
        models: Several are served below their names, and listed at `/`.
        http: `host` and `port`, for a Serve that is not running yet.
        keys: The file of the API keys.
        cores: As of `arguments`.

    Raises:
        UserError: An application of this name, or at this path, is served already.
        RunFailed: A model does not start.
    """
    from ray import serve

    from serve_app import index
    from serve_app.app import build

    _be_quiet()
    serve.start(http_options=http, logging_config={"log_level": "WARNING"})
    targets = [serve.RunTarget(build(arguments(each, keys, cores)), each.name, route(each, models)) for each in models]
    if len(models) > 1:
        listed = {"models": [each.name for each in models]} | ({"keys": str(keys)} if keys else {})
        targets.append(serve.RunTarget(index.build(listed), index.NAME, "/"))
    _require_free({target.name: str(target.route_prefix) for target in targets})
    try:
        try:
            serve.run_many(targets)
        except RuntimeError as error:
            raise RunFailed(_why([each.name for each in models], error)) from None
        url = address()
        for each in models:
            wait_until_ready(url + route(each, models).rstrip("/"))
        yield url
    finally:
        # Waits for requests that are being answered. A cluster's Serve may hold other people's applications, and an
        # embedded one goes with its Ray.
        for blocking in (False, True):  # all at once, and then until the last is gone
            for target in targets:
                serve.delete(target.name, _blocking=blocking)


def put(old: Running, given: dict[str, Any], code_version: str | None = None, wait: bool = True) -> None:
    """Give an application that runs other arguments, so that its replicas are exchanged one after another.

    What a replica needs of a machine stays, whoever has said it: a Serve config file may have overruled the arguments.

    Args:
        old: The application.
        given: Its arguments from now on.
        code_version: As of `code_version`, for arguments that replicas of that version have; those go on.
        wait: Until the replicas have been exchanged.

    Raises:
        RunFailed: No replica of the new kind starts; those of the old kind go on.
    """
    from ray import serve

    from serve_app.app import bound

    _be_quiet()
    try:
        target = serve.RunTarget(bound(given, old.actor_options, code_version), old.name, old.route)
        serve.run_many([target], wait_for_applications_running=wait)
    except RuntimeError as error:
        raise RunFailed(reason(old.name, error)) from None


def put_list(old: Running, keys: Path) -> None:
    """Give the list of models other API keys.

    Raises:
        RunFailed: It does not start with them; the old one goes on.
    """
    from ray import serve

    from serve_app import index

    try:
        given = old.arguments | {"keys": str(keys)}
        serve.run(index.bound(given, old.actor_options), name=old.name, route_prefix=old.route)
    except RuntimeError as error:
        raise RunFailed(f"the list of models keeps its API keys: {reason(old.name, error)}") from None


def code_version(old: Running) -> str:
    """Serve's own name for what the replicas of an application are made of now."""
    from ray.serve.context import _get_global_client

    from serve_app.app import DEPLOYMENT

    found: Any = _get_global_client()
    return str(found.get_deployment_info(DEPLOYMENT, old.name)[0].version)


def reason(name: str, error: Exception) -> str:
    """Why the replicas of an application did not start: what the last of them raised, without its stack."""
    from ray import serve

    application = serve.status().applications.get(name)
    messages = [each.message for each in application.deployments.values()] if application else []
    said = messages[0] if messages and messages[0] else str(error)
    return re.split(r"(?m)^  File .*\n(?:    .*\n)*", said)[-1].removeprefix("raylway.errors.").strip()


def address() -> str:
    """The address at which Serve takes requests: one that was there before keeps its own host and port."""
    http = _http()
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(http.host, f"[{http.host}]" if ":" in http.host else http.host)
    return f"http://{host}:{http.port}"


def host() -> str:
    """What Serve listens on."""
    return str(_http().host)


def wait_until_ready(url: str, version: str | None = None) -> None:
    """Wait until the application at an address answers, and does so with a version of its model if one is named.

    Raises:
        RunFailed: It does not within a minute.
    """
    deadline = time.monotonic() + _READY_TIMEOUT_S
    found: object = None
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=_READY_TIMEOUT_S) as answer:
                found = json.load(answer)["model"]["version"]
            if version in (None, found):
                return
        except OSError as error:  # refused, or an HTTP error: not yet there
            found = error
        time.sleep(0.1)
    raise RunFailed(f"{url}/readyz does not answer as expected after {_READY_TIMEOUT_S} s: {found}")


def require_everywhere(bundles: Sequence[Place], runtime_env: dict[str, Any] | None = None) -> None:
    """On a cluster of several nodes, prove that each of them sees the bundles that are folders.

    Raises:
        UserError: One does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    folders = [each for each in bundles if isinstance(each, Path)]
    if len(nodes) < 2 or not folders:
        return
    options: dict[str, Any] = {"num_cpus": 0, "runtime_env": runtime_env} if runtime_env else {"num_cpus": 0}
    look = ray.remote(**options)(_seen)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(folders)
        for node in nodes
    ]
    mine = _seen(folders)
    for node, found in zip(nodes, _answers(nodes, asked), strict=True):
        for folder, here, there in zip(folders, mine, found, strict=True):
            if here != there:
                raise UserError(
                    "a node of the cluster does not see this bundle, and its replicas could not load it",
                    where=str(folder),
                    expected=f"the same folder on all {len(nodes)} nodes, or a bundle in a bucket",
                    found=f"another one, or none, on {node['NodeManagerAddress']}",
                    fix="keep runs in a bucket (storage: s3://bucket/path in the job file) or on a shared disk",
                )


def _answers(nodes: Sequence[dict[str, Any]], asked: Sequence[Any]) -> list[list[str | None]]:
    """What the nodes see.

    Raises:
        UserError: Some don't answer in time, or can't look.
    """
    import ray

    deadline = time.monotonic() + _LOOK_TIMEOUT_S
    found, failed = [], []
    for node, each in zip(nodes, asked, strict=True):
        try:
            found.append(ray.get(each, timeout=max(0.0, deadline - time.monotonic())))
        except ray.exceptions.RayError as error:
            failed.append(f"{type(error).__name__} on {node['NodeManagerAddress']}")
    if failed:
        raise UserError(
            "not all nodes of the cluster say whether they see the bundle",
            where=", ".join(failed),
            expected=f"an answer of each of the {len(nodes)} nodes within {_LOOK_TIMEOUT_S} s",
            fix="see whether these nodes work: ray status, and Ray's logs there",
        )
    return found


def _seen(folders: list[Path]) -> list[str | None]:
    """What a node sees of bundles."""
    from raylway.bundle.contents import RECORD

    return [storage.checksum(folder / RECORD) if (folder / RECORD).is_file() else None for folder in folders]


def _require_free(wanted: dict[str, str]) -> None:
    for each in running().values():
        if each.name in wanted or each.route in wanted.values():
            raise UserError(
                "there is an application in this place",
                where=f"the Ray Serve at {address()}",
                expected=" and ".join(f"{name} at {path}" for name, path in wanted.items()),
                found=f"{each.name} at {each.route}",
                fix="put the new model in its place with --replace, or stop what serves it",
            )


def _why(names: list[str], error: Exception) -> str:
    from ray import serve

    statuses = serve.status().applications
    failed = [name for name in names if name in statuses and statuses[name].status == "DEPLOY_FAILED"]
    named = f"{failed[0]}: " if failed and len(names) > 1 else ""
    return f"{named}the model does not start: {reason(failed[0] if failed else names[0], error)}"


def _http() -> Any:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    return client.http_config


def _be_quiet() -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
