"""A job file on a running cluster: upload the current folder, follow the log, end as the job ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylway.errors import RunFailed, UserError
from raylway.job.load import load_job
from raylway.launch import auth, worker_setup

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_STOP_WAIT_S = 30
"""Between SIGTERM and SIGKILL when the job is stopped; Ray's default is 3. The same in `cluster/runtime-env.yaml`."""
_UPLOAD_LIMIT_BYTES = 100 << 20
"""Ray's job server refuses larger requests (413)."""
_LARGEST_SHOWN = 8
_PENDING_NOTE_S = 30.0
_CONTACT_LOST_S = 300.0
_RETRY_S = 1.0
_SILENCE_S = 30.0
"""After so long without a line a new stream is opened: a dead node or a lost network sends no end of the old one."""
_REQUEST_TIMEOUT_S = 60.0


def submit(job_file: Path, address: str | None, overrides: list[str]) -> int:
    """Run a job file as a Ray job and follow it to its end.

    The current folder travels (less what `.gitignore` and `.rayignore` leave out), and this package with it. The job's
    output goes to standard output, what is said about it to standard error. Ctrl-C lets go of the job and leaves it
    running.

    Args:
        job_file: A job file below the current folder.
        address: The cluster's dashboard, such as `http://127.0.0.1:8265`; if None, that of RAY_API_SERVER_ADDRESS,
            RAY_ADDRESS, or this machine.
        overrides: `key=value` texts, as for `raylway run --set`.

    Returns:
        The exit code: 0 when the job succeeded, 1 when it was stopped, else that of its command.

    Raises:
        UserError: The job file is wrong, the folder too large, or the cluster can't be reached or refuses the token.
        RunFailed: The cluster stopped answering.
    """
    loaded = load_job(job_file, overrides)
    here = Path.cwd().resolve()
    inside = job_file.resolve()
    if not inside.is_relative_to(here):
        raise UserError(
            "the job file doesn't travel to the cluster",
            where=str(job_file),
            expected=f"a file below the current folder, {here}",
            fix="change to the folder that holds the job file and its modules",
        )
    if "://" not in loaded.job.storage and not Path(loaded.job.storage).is_absolute():
        _say(
            f"note: storage is {loaded.job.storage!r}, a folder inside the job's temporary copy of this one; to keep "
            "the run, name a folder that all machines share, or a bucket: --set storage=/shared/runs"
        )
    url = _url(address)
    auth.prepare_to_join(url)
    _check_size(here)
    command = ["python", "-m", "raylway", "run", str(inside.relative_to(here))]
    for override in overrides:
        command += ["--set", override]
    client = _connect(url)
    job_id = client.submit_job(entrypoint=shlex.join(command), runtime_env=_runtime_env(here))
    _say(f"submitted {job_id} to {url}")
    try:
        return asyncio.run(_Follower(client, job_id).follow())
    except KeyboardInterrupt:
        target = f"--address {url} {job_id}"
        _say(f"\nlet go of {job_id}; it goes on")
        _say(f"  its log:  ray job logs {target} -f\n  stop it:  ray job stop {target}")
        raise


class _Follower:
    """Prints a job's log once, however often the stream breaks, and knows how the job ended."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client, self._id = client, job_id
        self._shown = 0
        """Characters of the log printed so far: each new stream begins at the log's start."""
        self._last_contact = time.monotonic()

    async def follow(self) -> int:
        started_at = noted_at = time.monotonic()
        while True:
            info = await self._info()
            if info is not None and info.status.is_terminal():
                break
            if info is not None and info.status == "PENDING":
                if time.monotonic() - noted_at > _PENDING_NOTE_S:
                    noted_at = time.monotonic()
                    _say(f"still pending after {noted_at - started_at:.0f} s: {info.message}")
            elif info is not None:
                await self._stream()
            await asyncio.sleep(_RETRY_S)
        with contextlib.suppress(*_broken()):  # the log went with its node, or the job never began
            self._show(await asyncio.to_thread(self._client.get_job_logs, self._id), 0)
        return self._end(info)

    async def _stream(self) -> None:
        """Print the log as it grows, until the stream ends, breaks or falls silent."""
        position = 0
        with contextlib.suppress(*_broken()):
            stream = self._client.tail_job_logs(self._id)
            while (text := await asyncio.wait_for(anext(stream, None), _SILENCE_S)) is not None:
                self._show(text, position)
                position += len(text)

    def _show(self, text: str, position: int) -> None:
        """Print the part of `text`, which stands at `position` of the log, that was not printed yet."""
        sys.stdout.write(text[max(0, self._shown - position) :])
        sys.stdout.flush()
        self._shown = max(self._shown, position + len(text))

    async def _info(self) -> Any:
        """What the cluster knows of the job; None while it can't be reached."""
        try:
            info = await asyncio.to_thread(self._client.get_job_info, self._id)
        except _broken() as error:
            silent_s = time.monotonic() - self._last_contact
            if silent_s > _CONTACT_LOST_S:
                raise RunFailed(
                    f"the cluster has not answered for {silent_s:.0f} s; {self._id} may still be running ({error})"
                ) from None
            return None
        self._last_contact = time.monotonic()
        return info

    def _end(self, info: Any) -> int:
        if info.status == "SUCCEEDED":
            _say(f"{self._id} succeeded")
            return 0
        if info.status == "STOPPED":
            _say(f"{self._id} was stopped")
            return 1
        # Ray puts the log's end into the message; it has just been printed.
        reason = (info.message or "no reason given").split(", last available logs")[0]
        _say(f"{self._id} failed: {reason.splitlines()[0]}")
        return info.driver_exit_code or 1


def _url(address: str | None) -> str:
    given = address or next((os.environ[name] for name in _ADDRESS_VARIABLES if os.environ.get(name)), None)
    url = given or _DEFAULT_ADDRESS
    if not url.startswith(("http://", "https://")):
        raise UserError(
            "jobs are submitted to the dashboard's address",
            where="--address" if address else "RAY_API_SERVER_ADDRESS or RAY_ADDRESS",
            expected="such as http://127.0.0.1:8265",
            found=url,
        )
    return url.rstrip("/")


def _connect(url: str) -> JobSubmissionClient:
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    for module in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **options: Any) -> Any:
            # Ray sets no limit: a request on a line that went silent would never return.
            return super()._do_request(*args, timeout=_REQUEST_TIMEOUT_S, **options)

    with _without(*_ADDRESS_VARIABLES):  # they would win over the address that is given
        try:
            return Client(url)
        except AuthenticationError:
            raise (auth.wrong_token(url) if auth.has_token() else auth.no_token(url)) from None
        except (ConnectionError, RuntimeError, requests.RequestException) as error:
            raise UserError("the cluster can't take jobs", where=url, found=str(error).splitlines()[0]) from None


def _runtime_env(here: Path) -> dict[str, Any]:
    """What `cluster/runtime-env.yaml` says, from wherever this package is imported."""
    return {
        "working_dir": str(here),
        "py_modules": worker_setup.packages(),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)},
    }


def _check_size(folder: Path) -> None:
    """Refuse a folder that the job server would refuse after the whole upload, and say what makes it large."""
    sizes = dict(_travelling(folder))
    total = sum(sizes.values())
    if total <= _UPLOAD_LIMIT_BYTES:
        return
    largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:_LARGEST_SHOWN]
    listed = "".join(f"\n    {sizes[path] / (1 << 20):8.1f} MiB  {path.relative_to(folder)}" for path in largest)
    raise UserError(
        "the current folder is too large to travel to the cluster",
        where=str(folder),
        expected=f"at most {_UPLOAD_LIMIT_BYTES >> 20} MiB in all",
        found=f"{total / (1 << 20):.0f} MiB in {len(sizes):,} files; the largest:{listed}",
        fix="name what the job doesn't need in .rayignore (written like .gitignore); put data on shared storage",
    )


def _travelling(folder: Path) -> Iterator[tuple[Path, int]]:
    """Each file that Ray would pack, with its size in bytes; packing doesn't compress.

    Walks with Ray's own walker, an interface inside Ray, so that the answer is Ray's; held by a test.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: list[Path] = []
    _dir_travel(
        folder,
        [_get_excludes(folder, get_runtime_env_default_excludes())],
        found.append,
        include_gitignore=os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1",
        logger=logging.getLogger(__name__),
    )
    return ((path, path.stat().st_size) for path in found if path.is_file())


def _broken() -> tuple[type[Exception], ...]:
    """What the job client raises when the line or the cluster's head breaks; it has no class of its own for it."""
    import aiohttp
    import requests

    return (RuntimeError, OSError, aiohttp.ClientError, requests.RequestException)


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
