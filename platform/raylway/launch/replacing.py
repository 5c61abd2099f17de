"""`raylway serve RUN --replace` and `--rollback`: another bundle takes the place of one that is served.

The new bundle is tried first, away from all traffic, on its own examples and on a sample of the requests that the
replicas have answered lately. Then Ray Serve exchanges the replicas one after another: each new one checks itself again
before it takes a request, and none of the old ones goes before. The application's own arguments remember what they have
replaced, so the way back is known as long as the application lives, whoever asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.launch import applications, serve_config, services, start
from raylway.launch.applications import Model, Running
from raylway.runs.progress import Reporter

if TYPE_CHECKING:
    from serve_app.recent import Recorded
    from serve_app.trial import Trial

_ASK_TIMEOUT_S = 30
_TRIAL_TIMEOUT_S = 600


def refuse(**options: object) -> None:
    """Refuse options of `raylway serve` that were given, and that only a new service takes.

    Raises:
        UserError: There are some.
    """
    if given := " and ".join(f"--{name}" for name, value in options.items() if value is not None):
        raise UserError(
            f"{given} can't be given here",
            where="raylway serve --replace or --rollback",
            expected="neither: what is served keeps its address, and its API keys but for those of --replace --keys",
            fix="leave it out",
        )


def replace(models: Sequence[Model], reporter: Reporter, keys: Path | None = None) -> None:
    """Put models in the places of those that are served under their names.

    Args:
        models: What is to be served from now on.
        reporter: Where progress goes.
        keys: The file of the API keys, if it is to be another.

    Raises:
        UserError: No such model is served, or several are; or a bundle can't be read.
        RunFailed: A bundle fails its check, refuses a recorded request, or does not start. What was served goes on.
    """
    for model in models:
        with _visited(model.name, reporter) as old:
            cores = _cores() if old.arguments["cpus"] == 0 else None
            given = applications.arguments(model, keys or old.arguments.get("keys"), cores)
            given["cpus"] = old.arguments["cpus"]
            applications.require_everywhere([model.bundle], old.runtime_env)
            _try(old, given, _recorded(old, reporter), reporter)
            _exchange(old, given, reporter)
            if keys and (listed := applications.running().get(serve_config.INDEX)):
                applications.put_list(listed, keys)


def rollback(name: str | None, reporter: Reporter) -> None:
    """Return to the bundle that was served before; the API keys stay, which may have been changed for a reason.

    Args:
        name: Of the application; may be left out where there is one.
        reporter: Where progress goes.

    Raises:
        UserError: No such model is served, or nothing is known of one before.
        RunFailed: That bundle fails its check, or does not start. What was served goes on.
    """
    with _visited(name, reporter) as old:
        given = old.arguments.get("before")
        if not given:
            raise UserError(
                "nothing was replaced here",
                where=old.name,
                expected="an application that raylway serve --replace gave another bundle",
                found=f"{old.arguments['bundle']}, as it was started",
                fix="name what is to be served: raylway serve RUN --replace",
            )
        given = _with_keys(given, old.arguments.get("keys"))
        applications.require_everywhere([storage.place(given["bundle"])], old.runtime_env)
        _try(old, given, [], reporter)  # requests of the newer version may be none of its own
        _exchange(old, given, reporter)


@contextmanager
def _visited(name: str | None, reporter: Reporter) -> Iterator[Running]:
    """Connect to the Ray that serves a model, and say what runs there."""
    with start.visit(_address(name)), start.ended_by_sigterm():
        ours = {each.name: each for each in applications.running().values() if "bundle" in each.arguments}
        if name is None and len(ours) == 1:
            name = next(iter(ours))
        if name not in ours:
            raise _not_served(name, f"at {applications.address()}: {', '.join(ours) or 'no model'}" if ours else "none")
        if ours[name].is_declared:
            reporter.note(f"{name} comes from a Serve config file; change the bundle there too, for the next deploy")
        yield ours[name]


def _address(name: str | None) -> str:
    """Of the Ray that serves a model: the one that the environment names, else one of this machine."""
    if not start.is_embedded():
        return os.environ.get("RAY_ADDRESS", "")
    found = services.running()
    matching = [each for each in found if name is None or name in each.names]
    if len(matching) != 1:
        raise _not_served(name, "; ".join(map(str, found)) or "nothing on this machine")
    return matching[0].address


def _cores() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _not_served(name: str | None, found: str) -> UserError:
    return UserError(
        "there is not one model of this name that is served" if name else "it is not clear which model is meant",
        where=name or "raylway serve --rollback",
        expected="the name of a job whose model raylway serve serves, on this machine or where RAY_ADDRESS says",
        found=found,
        fix="start it with raylway serve RUN; where several serve the same, choose one with RAY_ADDRESS=HOST:PORT",
    )


def _recorded(old: Running, reporter: Reporter) -> list[Recorded]:
    """The sample of recent requests of a replica; what can't be had must not keep a mistake in place.

    Of one that Serve chooses: `broadcast` to all ends the process in Ray 2.60 when an answer is larger than 100 KiB.
    """
    from ray import serve

    if not old.replicas:
        return []
    try:
        found: list[Recorded] = serve.get_app_handle(old.name).recorded.remote().result(timeout_s=_ASK_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - whatever the state of the replicas is
        reporter.note(f"the replicas give no recent requests to try the new bundle on: {type(error).__name__}")
        return []
    return found


def _try(old: Running, given: dict[str, Any], recorded: list[Recorded], reporter: Reporter) -> None:
    import ray

    from serve_app import trial

    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0}
    if old.runtime_env:
        options["runtime_env"] = old.runtime_env
    with reporter.stage("try") as stage:
        asked = ray.remote(**options)(trial.attempt).remote(given["bundle"], recorded)
        try:
            found: Trial = ray.get(asked, timeout=_TRIAL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            found = trial.Trial(f"{type(error).__name__}, where it was tried")
        if found.failure:
            raise RunFailed(f"{given['bundle']}: {found.failure}\n{old.name} goes on with {old.arguments['bundle']}")
        if found.rows:
            stage.finish(f"answers its examples and {found.requests:,} recorded requests; {found.differences}")
        else:
            stage.finish("answers its examples; no recorded requests")


def _with_keys(given: dict[str, Any], keys: str | None) -> dict[str, Any]:
    """Arguments with these API keys, or with none, whatever they held."""
    return {name: value for name, value in given.items() if name != "keys"} | ({"keys": keys} if keys else {})


def _exchange(old: Running, given: dict[str, Any], reporter: Reporter) -> None:
    from raylway.bundle import contents

    before = {name: value for name, value in old.arguments.items() if name != "before"}
    is_same = given["bundle"] == before["bundle"]  # with other keys, or limits: the way back stays
    given = given | {"before": old.arguments.get("before") if is_same else before}
    version = contents.load(storage.place(given["bundle"])).record.version
    code_version = applications.code_version(old)
    with reporter.stage("replace") as stage:
        url = applications.address() + old.route.rstrip("/")
        try:
            applications.put(old, given)
            applications.wait_until_ready(url, version)
        except RunFailed as error:
            message = f"{given['bundle']} does not start: {error}\n{_put_back(old, code_version)}"
            raise RunFailed(message) from None
        except BaseException:  # Ctrl-C, SIGTERM: Serve would go on with the exchange
            reporter.note(_put_back(old, code_version, wait=False))
            raise
        stage.finish(f"{old.name} {version} at {url}, in place of {old.arguments['bundle']}")


def _put_back(old: Running, code_version: str, wait: bool = True) -> str:
    """Return to what was served, whose replicas go on as they are; says whether that went well."""
    import ray

    try:
        applications.put(old, old.arguments, code_version, wait)
    except (RunFailed, ray.exceptions.RayError) as error:
        return f"{old.name} can't go on with {old.arguments['bundle']} either: {error}"
    return f"{old.name} goes on with {old.arguments['bundle']}"
