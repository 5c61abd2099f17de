"""A file's bytes: unpacked, and as UTF-8 whatever the file's encoding is.

A file of several gzip, bzip2 or Zstandard members is read whole; one that ends early is an error.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import pyarrow as pa

from raylway.data import remote
from raylway.data.location import TEXT_FORMATS, Location, chosen, format_of, is_hidden
from raylway.errors import UserError

_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # begins like that of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PACKED_ENDINGS = (".gz", ".bz2", ".zst", ".zip")
_MARKING = "raylway.mark"
_DECODED_STEP = 1 << 20


def opened(location: Location) -> BinaryIO:
    """The file's own bytes, to be read from any position.

    Raises:
        UserError: A remote file is gone, or was changed since it was found.
    """
    if not location.is_remote:
        return Path(location.path).open("rb")
    if location.path.startswith(("s3://", "gs://")):
        return remote.opened(location)
    from raylway.data import web  # urllib3 takes a tenth of a second

    return web.opened(location)


class Unpacked:
    """The text of a file, to be read once from its beginning; UTF-8 (a UTF-8 file keeps its byte order mark).

    What is no character in the file's encoding becomes bytes that are no UTF-8, so that the row that holds it is found.
    """

    def __init__(self, location: Location) -> None:
        self._open, self._location = ExitStack(), location
        try:
            self._packed = self._open.enter_context(opened(location))
            self._source: Any = self._unpacker(location)
        except BaseException:
            self._open.close()
            raise
        self._decoder = None
        if location.encoding != "utf-8":
            self._decoder = codecs.getincrementaldecoder(location.encoding)(_MARKING)
        self._decoded, self._first = b"", True

    def _unpacker(self, location: Location) -> Any:
        match location.compression:
            case "zip":
                archive = self._open.enter_context(zipfile.ZipFile(self._packed))
                return self._open.enter_context(archive.open(location.member or archive.namelist()[0]))
            case "gz":
                return self._open.enter_context(gzip.open(self._packed))
            case "bz2":
                return _Bz2Members(self._packed)
            case "zst":
                file = pa.PythonFile(self._packed, mode="r")
                return self._open.enter_context(pa.CompressedInputStream(file, "zstd"))
        return self._packed

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none only at the end."""
        if self._decoder is None:
            return self._source.read(size)
        while not self._decoded:
            chunk = self._source.read(_DECODED_STEP)
            try:
                text = self._decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:
                raise UserError(
                    "the file is not in the encoding that the job names",
                    where=self._location.name,
                    expected=self._location.encoding,
                    found=str(error),
                    fix="without a byte order mark the name tells the order: utf-16-le or utf-16-be",
                ) from None
            if self._first and text:
                text, self._first = text.removeprefix("\ufeff"), False
            self._decoded = text.encode("utf-8", "surrogateescape")
            if not chunk:
                break
        found, self._decoded = self._decoded[:size], self._decoded[size:]
        return found

    def packed_position(self) -> int:
        """How many bytes of the file itself were read."""
        return self._packed.tell()

    def __enter__(self) -> Unpacked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


class _Bz2Members:
    """Unpacks bzip2 members one after the other. Python's own reader takes a damaged one for the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._member, self._left = file, bz2.BZ2Decompressor(), file.read(_DECODED_STEP)

    def read(self, size: int) -> bytes:
        while size and (self._left or not (self._member.needs_input or self._member.eof)):
            if self._member.eof:
                self._member = bz2.BZ2Decompressor()
            found = self._member.decompress(self._left, size)
            self._left = self._member.unused_data
            if not self._left and (self._member.eof or self._member.needs_input):
                self._left = self._file.read(_DECODED_STEP)
                if not self._left and not self._member.eof:
                    raise EOFError("the file ends within a member")
            if found:
                return found
        return b""


@contextmanager
def text_of(location: Location) -> Iterator[Unpacked]:
    """The file's text; what a damaged archive raises becomes a `UserError` with the file's name.

    Raises:
        UserError: The archive is damaged or cut.
    """
    try:
        with Unpacked(location) as text:
            yield text
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, lzma.LZMAError, NotImplementedError) as error:
        raise _damaged(location, error) from None
    except OSError as error:
        if error.errno is not None or not location.compression:
            raise
        raise _damaged(location, error) from None


def exactly(file: Any, size: int) -> bytes:
    """So many bytes, fewer only at the end of the file."""
    parts: list[bytes] = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def text_bytes(location: Location) -> int:
    """Size of the file's text; of another packed file than a zip archive the packed size, all that it tells."""
    if location.compression == "zip":
        with opened(location) as file, zipfile.ZipFile(file) as archive:
            return archive.getinfo(location.member or archive.namelist()[0]).file_size
    return location.size


def zip_members(location: Location) -> list[Location]:
    """The data files inside a zip archive, sorted by name; hidden ones are left out.

    Raises:
        UserError: The archive is damaged, encrypted or holds no text file.
    """
    try:
        with opened(location) as file, zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir() and not is_hidden(entry.filename)]
    except zipfile.BadZipFile as error:
        raise UserError(
            "the archive is damaged", where=location.name, expected="a zip archive", found=str(error)
        ) from None
    names = chosen(sorted(entry.filename for entry in entries), location.declared)
    wanted = [name for name in names if location.declared or format_of(name) in TEXT_FORMATS]
    nested = [name for name in wanted if name.lower().endswith(_PACKED_ENDINGS)]
    if nested:
        raise UserError(
            "the archive holds a packed file",
            where=location.name,
            expected="plain files inside",
            found=nested[0],
            fix="unpack the archive and name its files, or pack the plain ones",
        )
    locked = [entry.filename for entry in entries if entry.flag_bits & 1]
    if locked:
        raise UserError("the archive is encrypted", where=location.name, found=locked[0], fix="unpack it first")
    if twice := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise UserError(
            "two files in the archive have the same name", where=location.name, found=twice[0], fix="pack it anew"
        )
    if not wanted:
        raise UserError(
            "the archive holds no data file",
            where=location.name,
            expected="one or more .csv, .tsv, .jsonl or .txt files",
            found=", ".join(entry.filename for entry in entries[:5]) or "nothing",
        )
    several = len(wanted) > 1
    return [
        msgspec.structs.replace(location, name=f"{location.name}/{name}" if several else location.name, member=name)
        for name in wanted
    ]


def recognised(location: Location, encoding: str) -> Location:
    """The location with its encoding: that of its byte order mark, else the one that is named, else UTF-8."""
    with text_of(location) as text:
        begin = exactly(text, 4)
    named = "utf-8" if encoding == "auto" else encoding
    encoding = next((name for mark, name in _BOMS.items() if begin.startswith(mark)), named)
    return msgspec.structs.replace(location, encoding=encoding)


def known_encoding(name: str, where: str) -> str:
    """The name as Python spells it; `auto` stays.

    Raises:
        UserError: There is no such encoding of text.
    """
    if name == "auto":
        return name
    try:
        found = codecs.lookup(name)
        if not found._is_text_encoding or found.name in ("idna", "punycode", "undefined"):
            raise LookupError
    except LookupError:
        raise UserError(
            "there is no such encoding",
            where=where,
            expected="a name that Python knows, such as utf-8, cp1252, latin-1, utf-16 or shift_jis",
            found=repr(name),
        ) from None
    return "utf-8" if found.name in ("utf-8", "utf-8-sig", "ascii") else found.name


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are no character, as characters that `surrogateescape` writes as the same bytes (0xff for ASCII)."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    bad = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + (byte if byte >= 0x80 else 0xFF)) for byte in bad), error.end


def _damaged(location: Location, error: Exception) -> UserError:
    return UserError(
        "the compressed file is damaged",
        where=location.name,
        found=str(error) or type(error).__name__,
        fix="copy it again from where it came",
    )


codecs.register_error(_MARKING, _mark)
