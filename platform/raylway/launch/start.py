"""Where a job runs: on the Ray cluster that it is in, or on an embedded Ray that lives as long as the command.

Stopped in whatever way, the embedded Ray goes too: at the end and on Ctrl-C by `ray.shutdown`, and on SIGKILL by the
kernel within 3 seconds (Ray ties its processes to the thread that starts them, so Ray is started in the main thread).
Two idle agents of Ray stay for up to a minute then: they wait for a server that is gone to take their last message.
"""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from raylway.errors import UserError
from raylway.launch import auth, worker_setup
from raylway.launch.capacity import Capacity, capacity
from raylway.runs.progress import Reporter

if TYPE_CHECKING:
    from ray._private.ray_logging import LogBatch

_REACH_TIMEOUT_S = 5
_FOLDERS = Path("/tmp")
_PREFIX = "raylway-"
_LOCK = ".lock"
_JUST_MADE_S = 10
_SETTINGS = {
    # Ray Train shows each print of a worker twice otherwise: once as print, once as log.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The virtual environment of `uv run` is this machine's own; Ray would rebuild it for every worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_EMBEDDED_SETTINGS = {
    # How soon Ray Train sees that workers ended or died: 2 s by default, which a small job feels twice. Each look
    # takes a worker time that it trains in.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A laptop gets no notice that it will be taken away; one process less to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_CLUSTER_SETTINGS = {
    # After a node is lost Ray Train counts it for a while and waits this long for each try (60 s by default).
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}


def is_embedded() -> bool:
    """Whether `connect` would start a Ray of its own."""
    return not is_connected() and not _address()


@contextmanager
def connect(reporter: Reporter, import_paths: Sequence[str] = (), ahead: Sequence[str] = ()) -> Iterator[Capacity]:
    """Give the body a connected Ray; what was started here is stopped at the end, whatever happens.

    Joins the cluster that `RAY_ADDRESS` names (a Ray job finds it set), and starts an embedded Ray otherwise. A process
    that is connected already keeps its connection.

    Args:
        reporter: Where progress goes, and what user code prints in workers.
        import_paths: Folders of the user's own modules, for the workers.
        ahead: Modules that the body needs, imported in a thread while Ray's processes come up (torch: 2 s of Ray's 4).

    Yields:
        What the cluster has.

    Raises:
        UserError: The cluster can't be reached or refuses the token.
    """
    if is_connected():
        yield capacity(joined=False)
        return
    address = _address()
    before = signal.getsignal(signal.SIGTERM)
    with temporary_folder(reporter) as folder, ExitStack() as stack:
        try:
            with reporter.stage("ray") as stage:
                if address:
                    _prepare_to_join(address)
                else:
                    auth.prepare_local()
                _set(_SETTINGS | (_CLUSTER_SETTINGS if address else _EMBEDDED_SETTINGS))
                importlib.import_module("ray")  # it reads some of them when it is imported
                stack.enter_context(_shown_by(reporter))
                threading.Thread(target=lambda: [importlib.import_module(name) for name in ahead]).start()
                if address:
                    _join(address, runtime_env=worker_setup.runtime_env(import_paths))
                else:
                    _start(folder, import_paths)
                have = capacity(joined=bool(address))
                stage.finish(f"{'joined ' + address if address else 'embedded'}: {have.describe()}")
            with ended_by_sigterm():  # Ray has put its own handler there
                yield have
        finally:
            if "ray" in sys.modules:
                sys.modules["ray"].shutdown()
            signal.signal(signal.SIGTERM, before)


@contextmanager
def visit(address: str) -> Iterator[None]:
    """Connect to a running Ray while the body runs, to look after what runs there; nothing is brought along, so that
    nothing that stays needs what goes. A process that is connected already keeps its connection.

    Raises:
        UserError: It can't be reached or refuses the token.
    """
    if is_connected():
        yield
        return
    _prepare_to_join(address)
    try:
        _join(address, log_to_driver=False)
        yield
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def is_connected() -> bool:
    """Whether this process is, without importing Ray for the question."""
    return "ray" in sys.modules and bool(importlib.import_module("ray").is_initialized())


def gcs_address() -> str:
    """Of the connected Ray, for another process that would join it."""
    return str(importlib.import_module("ray").get_runtime_context().gcs_address)


def _address() -> str:
    """That of the cluster to join; empty for an embedded Ray."""
    return os.environ.get("RAY_ADDRESS", "").removeprefix("local")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the body as Ctrl-C does, so that it leaves nothing behind, and the exit code is a shell's."""
    before = signal.signal(signal.SIGTERM, _end_on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(folder: Path, import_paths: Sequence[str]) -> None:
    """Start an embedded Ray: no dashboard (0.8 s and 0.2 GB), all CPUs and GPUs, token authentication on."""
    import ray

    paths = [*import_paths, *filter(None, [os.environ.get("PYTHONPATH")])]
    with _environment(PYTHONPATH=os.pathsep.join(paths)):
        # Workers inherit the environment of Ray's own processes, so the user's modules need no runtime environment,
        # for which Ray would start other workers than those that it has ready.
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )


def _prepare_to_join(address: str) -> None:
    if "://" in address:
        raise UserError(
            "a job can't be driven over this address",
            where="RAY_ADDRESS",
            expected="the address of a running Ray, such as 127.0.0.1:6379",
            found=address,
            fix="submit the job instead: raylway submit JOB --address http://HEAD:8265",
        )
    auth.prepare_to_join()
    if address != "auto":
        _require_reachable(address)


def _join(address: str, **options: Any) -> None:
    import ray
    from ray.exceptions import AuthenticationError, RayError

    try:
        if address != "auto":
            # Ray itself would try for 20 s and then hide that it was the token.
            importlib.import_module("ray._raylet").GcsClient(address=address)
        ray.init(address=address, logging_level=logging.ERROR, **options)
    except AuthenticationError:
        raise auth.wrong_token(address) if auth.has_token() else auth.no_token(address) from None
    except (ConnectionError, RuntimeError, RayError) as error:
        raise _unreachable(address, str(error).splitlines()[0]) from error


def _require_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(error)) from None


def _unreachable(address: str, found: str) -> UserError:
    return UserError(
        "no Ray cluster can be joined here",
        where=f"RAY_ADDRESS={address}",
        expected="host:port of a running head node (ray start prints it)",
        found=found,
        fix="start the cluster, or unset RAY_ADDRESS to run on this machine alone",
    )


@contextmanager
def _shown_by(reporter: Reporter) -> Iterator[None]:
    """Show what user code prints in workers, one line each, and nothing of Ray's own talk.

    Ray and its libraries talk on standard error, which stays in Ray's log files; but what Ray has to say itself
    (`(raylet) ...`) it would print on standard output, which is for results. What is replaced here prints all that Ray
    shows, from any of its threads; an interface inside Ray, held by a test.
    """
    from ray._private import worker

    def show(data: LogBatch, ignore_prefix: bool) -> None:
        if not data["is_err"] and data["pid"] not in ("raylet", "autoscaler"):
            for line in filter(str.strip, data["lines"]):
                reporter.note(f"worker {data['pid']}: {line}")

    before = worker.print_to_stdstream
    worker.print_to_stdstream = show
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@contextmanager
def temporary_folder(reporter: Reporter) -> Iterator[Path]:
    """A private folder for sockets and logs of what is started here, removed at the end.

    After an error that is not the user's its logs stay until the next start. A lock that dies with the process tells
    a folder that was left behind (SIGKILL) from one in use. Sockets need a short path, so it is in /tmp.
    """
    for lock_file in _FOLDERS.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock_file.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock_file.stat().st_mtime > _JUST_MADE_S:  # else another start is about to lock it
                shutil.rmtree(lock_file.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_FOLDERS))
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        except Exception as error:
            if isinstance(error, UserError) or not any(folder.glob("session_*")):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                reporter.note(f"Ray's logs, kept until the next start: {folder}")
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def live_folders() -> Iterator[Path]:
    """The `temporary_folder`s of this user that a process holds now."""
    for lock_file in _FOLDERS.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock_file.open("r+") as lock:
            if lock_file.parent.stat().st_uid != os.getuid():
                continue  # another's, who might like to be sent our token
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield lock_file.parent


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _set(settings: dict[str, str]) -> None:
    """Settings that Ray reads later, here and in its workers; the user's own stay."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _end_on_sigterm(number: int, _frame: FrameType | None) -> NoReturn:
    """End as a shell reports it (143); Ray's own handler would exit with 15."""
    sys.exit(128 + number)
