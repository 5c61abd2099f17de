"""What answers are written to: parts by any process, then one file, or a folder whose `_SUCCESS` is written last.

    answers.csv                one file (.csv, .jsonl, .parquet), there when it is whole
    answers.csv.rejects.jsonl  beside it: the rows without an answer; only if there are any
    answers/                   a folder (a trailing slash, or --format): part-00000.csv …, rejects.jsonl, _SUCCESS
    s3://bucket/answers/       the same in a bucket: without _SUCCESS it is not whole

All is first written to a scratch folder, so a killed prediction leaves nothing under the final name (in a bucket:
parts without `_SUCCESS`).
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import msgspec
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raylway import storage
from raylway.bundle.predictor import shortest
from raylway.errors import UserError
from raylway.features.signature import Signature
from raylway.storage import buckets
from raylway.storage.buckets import Address
from raylway.storage.credentials import refuse_credentials

Format = Literal["csv", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("csv", "jsonl", "parquet")
SUCCESS, REJECTS = "_SUCCESS", "rejects.jsonl"
_PART = re.compile(r"part-\d{5,}\.(csv|jsonl|parquet)|rejects\.jsonl")


class Output(msgspec.Struct, frozen=True):
    """Where answers go, and how they are written."""

    place: str
    """A path or address; empty for standard output."""
    format: Format
    is_folder: bool

    @property
    def is_remote(self) -> bool:
        return "://" in self.place

    @property
    def path(self) -> Path:
        """Of a local output, absolute."""
        return Path(self.place).absolute()

    @property
    def scheme(self) -> str:
        """Of a remote output."""
        return self.place.partition("://")[0]

    @property
    def key(self) -> str:
        """Of a remote output: bucket and path."""
        return self.place.partition("://")[2]

    @property
    def rejects(self) -> str:
        """Where the rows without an answer are listed."""
        return f"{self.place}/{REJECTS}" if self.is_folder else f"{self.place}.{REJECTS}"


class Success(msgspec.Struct, frozen=True):
    """`_SUCCESS`: what the folder holds, in the order of the rows."""

    answered: int
    rejected: int
    parts: list[tuple[str, int]]
    """Name and rows."""


def output_of(place: str | None, wanted: str | None) -> Output:
    """Judge what a person named as the output.

    Args:
        place: A file, a folder, an address, or nothing for standard output.
        wanted: A format that was asked for; then a place is a folder.

    Raises:
        UserError: The format is not written, or something is in the way.
    """
    if wanted is not None and wanted not in FORMATS:
        raise UserError(
            "answers can't be written in this format",
            where="--format",
            expected=" or ".join(FORMATS),
            found=wanted,
            fix="name one of these",
        )
    if place is None:
        return Output("", _format(wanted or "csv"), False)
    ending = place.rpartition("/")[2].rpartition(".")[2].lower()
    is_folder = wanted is not None or place.endswith("/")
    if not is_folder and ending not in FORMATS:
        raise UserError(
            "answers can't be written in this format",
            where=f"--output {place}",
            expected=" or ".join(f".{name}" for name in FORMATS),
            found=f".{ending}" if "." in place.rpartition("/")[2] else "no ending",
            fix="end the name with one of these, or with a slash to write a folder of parts",
        )
    scheme = place.partition("://")[0] if "://" in place else ""
    refuse_credentials(place, "--output")
    if scheme and scheme not in buckets.SCHEMES:
        raise UserError(
            "answers can't be written there",
            where=f"--output {place}",
            expected="a path, s3://bucket/path or gs://bucket/path",
            found=f"{scheme}://",
            fix="write a file or folder, and copy it from there",
        )
    return Output(place.rstrip("/"), _format(wanted or (ending if not is_folder else "parquet")), is_folder)


def refuse_taken(output: Output) -> None:
    """See that nothing is overwritten.

    Raises:
        UserError: The bucket can't be read, or the file or folder is there already. In a bucket the parts of a
            prediction that was killed don't count; they are removed.
    """
    is_taken = bool(output.place) and not output.is_remote and output.path.exists()
    if output.is_remote:
        system = buckets.system(output.scheme)
        try:
            there = system.get_file_info(pafs.FileSelector(output.key, recursive=True, allow_not_found=True))
            left = [each.path for each in there if each.is_file and _PART.fullmatch(each.base_name)]
            is_taken = len(left) < sum(each.is_file for each in there)
            if not output.is_folder:
                is_taken = system.get_file_info(output.key).is_file
            for path in [] if is_taken or not output.is_folder else left:
                system.delete_file(path)
        except buckets.FAILURES as error:
            raise buckets.unusable(output.place, "--output", error) from None
    if is_taken:
        raise _taken(output)


def _taken(output: Output) -> UserError:
    what = "folder" if output.is_folder else "file"
    return UserError(
        f"the {what} is there already",
        where=output.place,
        expected=f"a new {what}",
        found="something of this name",
        fix="name another one, or remove it first",
    )


def _format(name: str) -> Format:
    return next(each for each in FORMATS if each == name)


def schema(signature: Signature) -> pa.Schema:
    """The columns of the answers: row_id, file, line, prediction, and p_<class> for each class."""
    value = pa.string() if signature.classes else pa.float64()
    columns = [("row_id", pa.uint64()), ("file", pa.string()), ("line", pa.int64()), ("prediction", value)]
    return pa.schema([*columns, *((f"p_{name}", pa.float32()) for name in signature.classes)])


@dataclass(frozen=True)
class Parts:
    """What was written to the scratch folder, in the order of the rows."""

    scratch: Path
    """On the file system of a local output."""
    answers: list[tuple[Path, int]]
    """Files and their rows."""
    rejects: list[Path]
    """Files of rows without an answer; each may be empty."""

    @property
    def refused(self) -> list[Path]:
        return [path for path in self.rejects if path.stat().st_size]


class PartWriter:
    """Writes one part; it has its name when it is whole.

    Args:
        path: Of the part.
        output: The format.
        columns: Of the answers.
    """

    def __init__(self, path: Path, output: Output, columns: pa.Schema) -> None:
        self._path, self._format = path, output.format
        self._staged = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
        self._file = self._staged.open("wb")
        self._csv = self._parquet = None
        if output.format == "csv":
            options = pacsv.WriteOptions(include_header=output.is_folder, quoting_style="needed")
            self._csv = pacsv.CSVWriter(self._file, columns, write_options=options)
        elif output.format == "parquet":
            self._parquet = pq.ParquetWriter(self._file, columns)

    def write(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        if self._csv is not None:
            self._csv.write_table(table)
        elif self._parquet is not None:
            self._parquet.write_table(table)
        else:
            self._file.write(_lines(table))

    def close(self) -> None:
        """The part is whole."""
        for writer in (self._csv, self._parquet):
            if writer is not None:
                writer.close()
        self._file.close()
        self._staged.replace(self._path)


def _lines(table: pa.Table) -> bytes:
    """JSON lines; a float32 with the digits that CSV has too."""
    for place, field in enumerate(table.schema):
        if pa.types.is_float32(field.type):
            short = pa.array(shortest(table[field.name].to_numpy()))
            table = table.set_column(place, field.name, short)
    return msgspec.json.Encoder().encode_lines(table.to_pylist())


def commit(output: Output, columns: pa.Schema, parts: Parts, out: IO[bytes]) -> None:
    """Put what was written in its final place.

    Args:
        output: Where to.
        columns: Of the answers.
        parts: What was written.
        out: Standard output.

    Raises:
        UserError: The place can't be written, or something has come there meanwhile.
    """
    refuse_taken(output)  # another prediction may have been faster
    try:
        if output.is_folder:
            _commit_folder(output, columns, parts)
        elif not output.place:
            _join(output, columns, parts, out)
            out.flush()
        else:
            _commit_file(output, columns, parts)
    except buckets.FAILURES as error:
        if output.is_remote:
            raise buckets.unusable(output.place, "--output", error) from None
        if not isinstance(error, OSError):
            raise
        raise unwritable(output.place or "standard output", error) from None


def unwritable(where: str, error: OSError) -> UserError:
    """The operating system does not let this user write the answers."""
    return UserError(
        "the answers can't be written",
        where=where,
        expected="a place that this user may write, on a disk with room",
        found=error.strerror or str(error),
        fix="make room, or name another place with --output",
    )


def _commit_folder(output: Output, columns: pa.Schema, parts: Parts) -> None:
    answers = [(path, rows) for path, rows in parts.answers if rows] or parts.answers[:1]
    if not answers:
        empty = parts.scratch / "none"
        PartWriter(empty, output, columns).close()
        answers = [(empty, 0)]
    names = [(f"part-{place:05d}.{output.format}", rows) for place, (_, rows) in enumerate(answers)]
    rejected = sum(_count_lines(path) for path in parts.refused)
    success = msgspec.json.encode(Success(sum(rows for _, rows in answers), rejected, names)) + b"\n"
    moved = [(path, name) for (path, _), (name, _) in zip(answers, names, strict=True)]
    if rejected:
        whole = parts.scratch / REJECTS
        with whole.open("wb") as file:
            _append(parts.refused, file)
        moved.append((whole, REJECTS))
    if output.is_remote:
        place = Address(output.scheme, output.key)
        for path, name in moved:
            buckets.upload(path, place / name)
        buckets.write(place / SUCCESS, success)
        return
    folder = parts.scratch / "folder"
    folder.mkdir()
    for path, name in moved:
        with path.open("rb") as file:
            os.fsync(file)
        path.replace(folder / name)
    storage.write_bytes(folder / SUCCESS, success)
    try:
        folder.rename(output.path)
    except OSError:
        if output.path.exists():
            raise _taken(output) from None
        raise
    storage.sync_folder(output.path.parent)


def _commit_file(output: Output, columns: pa.Schema, parts: Parts) -> None:
    """The rejects first: a file of answers that is there has all that belongs to it."""
    answers, refused = parts.scratch / "answers", parts.scratch / "rejects"
    with answers.open("wb") as file:
        _join(output, columns, parts, file)
        file.flush()
        os.fsync(file)
    with refused.open("wb") as file:
        _append(parts.refused, file)
        file.flush()
        os.fsync(file)
    if output.is_remote:
        rejects = Address(output.scheme, f"{output.key}.{REJECTS}")
        if parts.refused:
            buckets.upload(refused, rejects)
        else:
            rejects.unlink(missing_ok=True)
        buckets.upload(answers, Address(output.scheme, output.key))
        return
    beside = Path(output.rejects).absolute()
    if parts.refused:
        refused.replace(beside)
    else:
        beside.unlink(missing_ok=True)
    answers.replace(output.path)
    storage.sync_folder(output.path.parent)


def _join(output: Output, columns: pa.Schema, parts: Parts, out: IO[bytes]) -> None:
    """All parts as one file; in memory is one row group, or a buffer."""
    if output.format == "parquet":
        with pq.ParquetWriter(out, columns) as writer:
            for path, _ in parts.answers:
                with pq.ParquetFile(path) as part:
                    for group in range(part.num_row_groups):
                        writer.write_table(part.read_row_group(group))
        return
    if output.format == "csv":
        sink = pa.BufferOutputStream()
        pacsv.write_csv(columns.empty_table(), sink, pacsv.WriteOptions(quoting_style="needed"))
        out.write(sink.getvalue().to_pybytes())
    _append([path for path, _ in parts.answers], out)


def _append(paths: list[Path], out: IO[bytes]) -> None:
    for path in paths:
        with path.open("rb") as file:
            shutil.copyfileobj(file, out, 1 << 20)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
