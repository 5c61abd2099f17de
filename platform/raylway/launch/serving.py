"""`raylway serve`: models over HTTP until they are stopped, on an embedded Ray or on the cluster that one is in."""

from __future__ import annotations

import json
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raylway.errors import RunFailed, UserError
from raylway.launch import applications, proxy, serve_config, services, start
from raylway.launch.applications import Model
from raylway.runs.progress import Reporter
from raylway.runs.run import Run
from raylway.storage import Place

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def models_of(runs: Sequence[Run]) -> list[Model]:
    """The models of runs, each under the name of its job.

    Raises:
        UserError: A bundle can't be read, or two have one name.
    """
    from raylway.bundle import contents
    from raylway.job.load import load_job

    models = [Model(contents.load(run.bundle).record.name, run.bundle, load_job(run.job).job.serve) for run in runs]
    names = [model.name for model in models]
    if taken := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            "two models have one name, and a name is the path that a model answers at",
            where=taken,
            expected="runs of jobs with different names",
            found=", ".join(str(model.bundle) for model in models if model.name == taken),
            fix="serve one of them, and put another in its place with --replace when it is to follow",
        )
    return models


def serve(models: Sequence[Model], host: str, port: int, reporter: Reporter, keys: Path | None = None) -> None:
    """Serve models until Ctrl-C or SIGTERM; requests that are being answered then still get their answers.

    Args:
        models: One alone answers at `/`, several below their names.
        host: Address to listen on.
        port: HTTP port.
        reporter: Where progress goes.
        keys: The file of the API keys; without it those of the environment, and without these everybody may ask.

    Raises:
        UserError: A bundle or the keys can't be read, the port is taken, or the cluster can't be reached.
        RunFailed: A model does not start, or answers without a key although there are keys.
    """
    with served(models, host, port, reporter, keys) as url:
        for model in models:
            base = url + applications.route(model, models).rstrip("/")
            reporter.note(f"try it:  {_curl(base, model.bundle, _needs_key(base))}")
        reporter.note("stop it: Ctrl-C")
        threading.Event().wait()


@contextmanager
def served(
    models: Sequence[Model], host: str, port: int, reporter: Reporter, keys: Path | None = None
) -> Iterator[str]:
    """Serve models while the body runs; yields the address once they answer. As `serve`."""
    from raylway.bundle import contents
    from serve_app import keys as api_keys

    records = [contents.load(model.bundle).record for model in models]
    has_keys = api_keys.read(keys) is not None
    is_embedded = start.is_embedded()
    if is_embedded:
        proxy.require_free(host, port)
    with proxy.settings(reporter), start.connect(reporter) as have, ExitStack() as stack:
        with reporter.stage("serve") as stage:
            cores = max(1, int(have.cpus)) if is_embedded else None
            applications.require_everywhere([model.bundle for model in models])
            url = stack.enter_context(applications.deployed(models, {"host": host, "port": port}, keys, cores))
            _require_guarded([url + applications.route(model, models) for model in models], has_keys, reporter)
            named = ", ".join(f"{record.name} {record.version}" for record in records)
            docs = f"{url}/docs shows how to ask" if len(models) == 1 else f"{url}/ lists them"
            stage.finish(f"{named} at {url} through {proxy.shown(url)}; {docs}")
        if is_embedded:
            service = services.Service(start.gcs_address(), url, [model.name for model in models])
            stack.enter_context(services.announced(service, reporter))
        yield url


def write_config(
    models: Sequence[Model], host: str, port: int, keys: Path | None, files: Sequence[Path], reporter: Reporter
) -> None:
    """Write the Serve config file of models, to standard output if no file is named.

    Raises:
        UserError: Two files are named, the file can't be written, or there is one that is no such file.
    """
    if len(files) > 1:
        raise UserError("one config file is written", where="--config", found=", ".join(map(str, files)))
    for model in models:
        if isinstance(model.bundle, Path):
            reporter.note(f"{model.bundle} is a folder: each node of a cluster must see it; a bucket is seen by all")
    text = serve_config.content(models, host, port, keys)
    if not files:
        print(text, end="")
        return
    try:
        if files[0].exists() and not files[0].read_bytes().startswith(serve_config.FIRST_LINE.encode()):
            raise UserError(
                "there is another file in this place",
                where=str(files[0]),
                expected=f"no file, or one that starts with: {serve_config.FIRST_LINE}",
                fix="name another one",
            )
        files[0].write_text(text)
    except OSError as error:
        raise UserError("the file can't be written", where=str(files[0]), found=str(error.strerror)) from None
    reporter.note(f"serve deploy {files[0]}")


def _require_guarded(urls: Sequence[str], has_keys: bool, reporter: Reporter) -> None:
    """Prove that what answers asks for a key if there are keys, and warn where others may reach what asks for none.

    Raises:
        RunFailed: It asks for none.
    """
    if all(_needs_key(url.rstrip("/")) for url in urls):
        return
    if has_keys:
        raise RunFailed(
            "the replicas answer without an API key, although there are keys: those of this command's environment do "
            "not reach a cluster\n  fix: name a file that every node has with --keys"
        )
    if (host := applications.host()) not in _LOOPBACK:
        reporter.note(f"there are no API keys: whoever reaches {host} may ask (--keys FILE)")


def _needs_key(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/signature").close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    return False


def _curl(url: str, bundle: Place, needs_key: bool) -> str:
    """A command that works as it stands, or once `KEY` is one: it asks the first example of the bundle."""
    from raylway.bundle import contents, examples

    folder = bundle if isinstance(bundle, Path) else contents.load(bundle).folder
    body = shlex.quote(json.dumps({"rows": examples.read(folder).rows[:1]}, ensure_ascii=False))
    key = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    return f"curl {url}/predict {key}-H 'Content-Type: application/json' -d {body}"
