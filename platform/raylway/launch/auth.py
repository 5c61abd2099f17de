"""Ray's token: switched on before Ray is imported, kept private, and asked for in one sentence.

Ray reads `RAY_AUTH_MODE` when it is imported, and switches token authentication on by itself only for a cluster that
it starts inside this process; to join one, or to reach its job server, the mode must be in the environment first. Ray
looks for the token in `RAY_AUTH_TOKEN`, the file that `RAY_AUTH_TOKEN_PATH` names, and `~/.ray/auth_token`, in this
order.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from raylway.errors import UserError

_MODE = "RAY_AUTH_MODE"
_PROBE_TIMEOUT_S = 10
_HOW_TO_GET = (
    "copy the cluster's token into ~/.ray/auth_token (mode 600), or set RAY_AUTH_TOKEN; "
    "on the head node it is in ~/.ray/auth_token"
)


def prepare_local() -> None:
    """Make token authentication ready for a Ray that this process starts: a private token, and the mode."""
    if _mode() == "disabled":
        return
    if not has_token():
        _write_token(_default_file())
    _switch_on()


def prepare_to_join(url: str | None = None) -> None:
    """Switch token authentication on when there is a token, or when the cluster at `url` asks for one.

    Args:
        url: The cluster's job server, such as `http://127.0.0.1:8265`; its authentication mode is open to anyone.

    Raises:
        UserError: No cluster answers at `url`, or it asks for a token and there is none.
    """
    asked = url is not None and _asks_for_token(url)
    if asked and not has_token():
        raise no_token(url or "")
    if asked or (has_token() and _mode() is None):
        _switch_on()


def has_token() -> bool:
    """Whether Ray would find a token.

    Raises:
        UserError: `RAY_AUTH_TOKEN_PATH` names a file that can't be used, which ends a Ray process at once.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named:
        try:
            if Path(named).read_text().strip():
                return True
            found = "an empty file"
        except OSError as error:
            found = error.strerror or str(error)
        raise UserError("the token file can't be used", where="RAY_AUTH_TOKEN_PATH", found=f"{named}: {found}")
    file = _default_file()
    try:
        if not file.read_text().strip():
            return False
        _make_private(file)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError("the token file can't be read", where=str(file), found=error.strerror or str(error)) from None
    return True


def no_token(where: str) -> UserError:
    """The sentence for a cluster that asks for a token when there is none."""
    return UserError("the cluster asks for a token and there is none here", where=where, fix=_HOW_TO_GET)


def wrong_token(where: str) -> UserError:
    """The sentence for Ray's 401 and 403."""
    source = next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), None)
    return UserError(
        "the cluster refuses this token",
        where=where,
        found=f"the token of {source or _default_file()}",
        fix=_HOW_TO_GET,
    )


def _mode() -> str | None:
    mode = os.environ.get(_MODE)
    return mode.lower() if mode else None


def _switch_on() -> None:
    if _mode() != "token":
        os.environ[_MODE] = "token"
    if "ray" in sys.modules:
        # Someone (the user's own module) imported Ray already, and Ray keeps the mode and the token that it saw then.
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def _default_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _write_token(file: Path) -> None:
    """Write a token that only this user can read; Ray itself would write it readable for all.

    Two processes may do so at once: the first one's token stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".staging-{secrets.token_hex(6)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_hex(32).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        if file.exists():  # an empty one, which Ray would take for no token
            staged.replace(file)
        else:
            os.link(staged, file)
    except FileExistsError:
        pass
    finally:
        staged.unlink(missing_ok=True)


def _make_private(file: Path) -> None:
    status = file.stat()
    if status.st_mode & 0o077 and status.st_uid == os.getuid():
        file.chmod(0o600)


def _asks_for_token(url: str) -> bool:
    address = f"{url.rstrip('/')}/api/authentication_mode"
    try:
        with urllib.request.urlopen(address, timeout=_PROBE_TIMEOUT_S) as answer:
            return json.load(answer).get("authentication_mode") == "token"
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False  # a Ray from before token authentication; the job client checks the version
        raise _not_ray(url, f"HTTP {error.code}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise _not_ray(url, str(getattr(error, "reason", error))) from None


def _not_ray(url: str, found: str) -> UserError:
    return UserError(
        "no Ray job server answers here",
        where=url,
        expected="the dashboard address of a running Ray, such as http://127.0.0.1:8265",
        found=found,
        fix="start the cluster, or open a tunnel to its head node: ssh -L 8265:localhost:8265 HEAD",
    )
