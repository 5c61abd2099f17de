"""Buckets of `s3://` and `gs://` addresses through Arrow: their clients, what goes wrong with them, and one address.

Credentials come from the environment, as every client of these stores knows them, and never stand in an address:
- S3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, a profile, or the machine's role; a server of
  your own is named by `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`;
- Google Cloud Storage: `GOOGLE_APPLICATION_CREDENTIALS`, what `gcloud auth application-default login` left, or the
  machine's service account; an emulator is named by `STORAGE_EMULATOR_HOST` and asks for none.

An object is whole or absent, and can be neither renamed nor appended to. A store that can't be reached is asked again
for a while; one that refuses is not.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pa_fs

from raylway.errors import RunFailed, UserError

Done = TypeVar("Done")
SCHEMES = ("s3", "gs")
FAILURES = (OSError, pa.ArrowException)
"""What the clients raise; Google's raises both."""
GIVE_UP_AFTER_S = 120.0
"""So long is a store that can't be reached asked again."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0
_TIMEOUT_S = 10
_ATTEMPTS = 2
_CHUNK_BYTES = 8 << 20
_DENIED = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
    "403",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "access token",
)
_NO_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist")
_VARIABLES = {
    "s3": ("AWS_ACCESS_KEY_ID, ...", "AWS_ENDPOINT_URL_S3"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS, the path of a key file", "STORAGE_EMULATOR_HOST"),
}
_TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json", ".yaml": "text/plain; charset=utf-8"}
"""What a browser is told of a file that is looked at there."""


_silent: set[str] = set()
"""Stores that this process has given up, until they answer again: they are asked once only, so that a run that fails
for one of them ends at once."""


@functools.total_ordering
class Address:
    """A file or folder of a bucket. It has the words of `pathlib.Path` for all that both can do.

    Args:
        scheme: `s3` or `gs`.
        path: Bucket and key, `bucket/prefix/name`, without slashes at its ends.

    Raises:
        UserError: From every method: the store refuses.
        RunFailed: From every method: it could not be reached for `GIVE_UP_AFTER_S`.
    """

    def __init__(self, scheme: str, path: str) -> None:
        self.scheme, self.path = scheme, path

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and str(self) == str(other)

    def __lt__(self, other: Address) -> bool:
        return self.path < other.path

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> Address:
        return Address(self.scheme, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        return Address(self.scheme, self.path.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether there is an object; a folder is there as far as the file is that is written into it last."""
        return self.size() is not None

    def size(self) -> int | None:
        """Bytes of the object; None if there is none."""
        info = tried(self, lambda: system(self.scheme).get_file_info(self.path))
        return int(info.size) if info.is_file else None

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: There is none.
        """
        return tried(self, lambda: _read(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        """As `read_bytes`, decoded."""
        return self.read_bytes().decode(encoding)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object.

        Raises:
            FileNotFoundError: There is none, and that is not `missing_ok`.
        """
        if self.exists():
            with suppress(FileNotFoundError):  # gone meanwhile
                tried(self, lambda: system(self.scheme).delete_file(self.path))
        elif not missing_ok:
            raise FileNotFoundError(str(self))

    def iterdir(self) -> list[Address]:
        """What is directly below, objects and folders, by name; nothing if nothing is."""
        # Google's client knows no folder that nobody has made.
        selector = pa_fs.FileSelector(self.path, allow_not_found=True, recursive=self.scheme == "gs")
        found = tried(self, lambda: system(self.scheme).get_file_info(selector))
        return [self / name for name in sorted({info.path[len(self.path) + 1 :].partition("/")[0] for info in found})]


def ages(folder: Address) -> dict[str, float]:
    """For everything directly below a folder how many seconds ago it, or the newest of what is in it, was written; by
    the clocks of the store and of this machine."""
    selector = pa_fs.FileSelector(folder.path, allow_not_found=True, recursive=True)
    found = tried(folder, lambda: system(folder.scheme).get_file_info(selector))
    newest: dict[str, float] = {}
    for info in found:
        if info.is_file:
            name = info.path[len(folder.path) + 1 :].partition("/")[0]
            newest[name] = min(newest.get(name, math.inf), time.time() - info.mtime_ns / 1e9)
    return newest


def parsed(text: str) -> Address | None:
    """The address that a text is; None if it is no address of a bucket."""
    scheme, separator, path = text.partition("://")
    return Address(scheme, path.strip("/")) if separator and scheme in SCHEMES and path.strip("/") else None


def read_range(address: Address, start: int, stop: int) -> bytes:
    """The bytes of an object from `start` up to `stop`, fewer at its end.

    Raises:
        FileNotFoundError: There is none.
    """

    def read() -> bytes:
        with system(address.scheme).open_input_file(address.path) as file:
            length = min(stop, file.size()) - start
            return bytes(file.read_at(length, start)) if length > 0 else b""  # Google's refuses to read nothing

    return tried(address, read)


def write(address: Address, content: bytes) -> None:
    """Write an object at once; another of this name is replaced."""

    def send(sink: Any) -> None:
        sink.write(content)

    _sent(address, send)


def upload(source: Path, address: Address) -> None:
    """Write an object from a file here, in parts; it appears when all of it is there."""

    def send(sink: Any) -> None:
        with source.open("rb") as file:
            shutil.copyfileobj(file, sink, _CHUNK_BYTES)

    _sent(address, send)


def download(address: Address, target: Path) -> None:
    """Copy an object into a file here.

    Raises:
        FileNotFoundError: There is no such object.
    """

    def receive() -> None:
        with system(address.scheme).open_input_file(address.path) as file, target.open("wb") as sink:
            shutil.copyfileobj(file, sink, _CHUNK_BYTES)

    tried(address, receive)


def remove(address: Address) -> None:
    """Remove an object, or all that is below a folder; nothing there is fine."""
    client = system(address.scheme)
    below = pa_fs.FileSelector(address.path, allow_not_found=True, recursive=True)

    def delete() -> None:
        with suppress(FileNotFoundError):
            if client.get_file_info(address.path).is_file:
                client.delete_file(address.path)
            elif client.get_file_info(below):
                client.delete_dir(address.path)

    tried(address, delete)


def require(address: Address, where: str) -> None:
    """Prove that the bucket is there and lets us in; asked once.

    Raises:
        UserError: It is not.
    """
    bucket = address.path.partition("/")[0]
    try:
        found = system(address.scheme).get_file_info(bucket)
    except FAILURES as error:
        raise unusable(str(address), where, error) from None
    if found.type == pa_fs.FileType.NotFound:
        raise _no_bucket(str(address), where)


def require_writable(address: Address, where: str) -> None:
    """Prove that an object can be written and removed below an address; asked once.

    Raises:
        UserError: It can't.
    """
    probe = address / f".probe-{os.getpid()}-{time.time_ns():x}"
    client = system(address.scheme)
    try:
        client.open_output_stream(probe.path).close()
        client.delete_file(probe.path)
    except FAILURES as error:
        raise unusable(str(address), where, error) from None


def tried(address: Address, operation: Callable[[], Done]) -> Done:
    """The result of an operation of a store, which is repeated while the store can't be reached.

    Raises:
        FileNotFoundError: There is no such object.
        UserError: The store refuses.
        RunFailed: It could not be reached for `GIVE_UP_AFTER_S`.
    """
    patience = 0.0 if address.scheme in _silent else GIVE_UP_AFTER_S
    give_up_at, wait = time.monotonic() + patience, _FIRST_WAIT_S
    while True:
        try:
            result = operation()
            _silent.discard(address.scheme)
            return result
        except FAILURES as error:
            if getattr(error, "errno", None) is not None:
                raise  # no object of this name, or this machine's own disk
            if _is_final(error):
                raise unusable(str(address), str(address), error) from None
            if time.monotonic() + wait > give_up_at:
                _silent.add(address.scheme)
                raise RunFailed(
                    f"{address}: the bucket can't be reached, tried for {GIVE_UP_AFTER_S:g} s: {_words(error)}"
                ) from None
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_S)


@functools.lru_cache
def system(scheme: str) -> pa_fs.FileSystem:
    """The client of all buckets of a store, with what the environment says of it."""
    return _google() if scheme == "gs" else _s3()


def unusable(text: str, where: str, error: Exception) -> UserError:
    """What to tell a person of an error of the client."""
    words = _words(error)
    if any(word in words for word in _NO_BUCKET):
        return _no_bucket(text, where)
    credentials, server = _VARIABLES["gs" if text.startswith("gs://") else "s3"]
    denied = any(word in words for word in _DENIED)
    return UserError(
        "the bucket refuses these credentials" if denied else "the bucket can't be read",
        where=where,
        expected=f"a bucket that exists and may be read, with credentials in the environment ({credentials})",
        found=f"{text}: {words[-300:] if text.startswith('gs://') else words[:300]}",
        fix=f"check the address, the credentials and {server}",
    )


def _no_bucket(text: str, where: str) -> UserError:
    return UserError(
        "there is no such bucket",
        where=where,
        expected="a bucket that exists, with credentials in the environment that may use it",
        found=text,
        fix=f"make the bucket, or check its name and {_VARIABLES['gs' if text.startswith('gs://') else 's3'][1]}",
    )


def _words(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" error_info=")[0]


def _is_final(error: Exception) -> bool:
    return isinstance(error, pa.ArrowInvalid) or any(word in _words(error) for word in (*_DENIED, *_NO_BUCKET))


def _read(address: Address) -> bytes:
    with system(address.scheme).open_input_stream(address.path, compression=None) as file:
        return bytes(file.read())


def _sent(address: Address, send: Callable[[Any], None]) -> None:
    """Write an object, again and again while its store can't be reached.

    To close a stream of Arrow, or to let go of it, completes the object with what has come so far: the stream of an
    upload that is broken off is kept for ever.
    """
    metadata = {"Content-Type": _TYPES.get(Path(address.name).suffix, "application/octet-stream")}

    def write() -> None:
        sink = system(address.scheme).open_output_stream(address.path, compression=None, metadata=metadata)
        try:
            send(sink)
        except BaseException:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
            raise
        sink.close()

    tried(address, write)


def _s3() -> pa_fs.FileSystem:
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, separator, host = (address or "").partition("://")
    further: dict[str, Any] = {"endpoint_override": host.rstrip("/"), "scheme": scheme} if separator else {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return pa_fs.S3FileSystem(
        region=region or ("us-east-1" if further else None),
        connect_timeout=_TIMEOUT_S,
        request_timeout=_TIMEOUT_S,
        retry_strategy=pa_fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        # A small object is then one request instead of three, and Ctrl-C can't come between opening and writing it.
        allow_delayed_open=True,
        **further,
    )


def _google() -> pa_fs.FileSystem:
    retry = datetime.timedelta(seconds=_TIMEOUT_S)
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if not emulator:
        return pa_fs.GcsFileSystem(retry_time_limit=retry)
    scheme, separator, host = emulator.rpartition("://")
    return pa_fs.GcsFileSystem(
        anonymous=True,
        scheme=scheme if separator else "http",
        endpoint_override=host.rstrip("/"),
        retry_time_limit=retry,
    )
