"""A bundle on disk, `<run>/bundle/`: everything that answering rows needs, and nothing that has to be trusted.

    model.safetensors   the weights
    code/               the source of the user's own model and functions for derived columns, if there are any
    examples.json       made-up rows and this model's answers; serving checks itself against them
    bundle.json         written last; without it the folder is no bundle

No pickle anywhere. Loading a bundle with code of the user's own runs the Python files in its `code/`, as every program
does with its own source.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from raylway import storage
from raylway.errors import UserError
from raylway.features.prepared import Account, Manifest
from raylway.features.profile import Profile
from raylway.features.signature import Signature
from raylway.features.transform import Transform
from raylway.models.registry import ModelSpec
from raylway.storage import Address, Place, buckets, cache

if TYPE_CHECKING:
    import torch

FORMAT = 3
RECORD = "bundle.json"
WEIGHTS = "model.safetensors"
EXAMPLES = "examples.json"
CODE = "code"
MOST_FILES = 20
"""Source files that a bundle names."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    """Inside the bundle, with `/`."""
    bytes: int
    checksum: str
    """XXH3-128."""


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a model comes from."""

    run: str
    """The run id."""
    created_at: str
    """UTC, ISO 8601: when the run began."""
    fingerprint: str
    """Of the prepared data."""
    seed: int
    commit: str | None
    versions: dict[str, str]


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rows that a model was made from, as far as people ask for them."""

    files: list[str]
    """Names of source files, without their folders, the first `MOST_FILES`."""
    num_files: int
    account: Account
    classes: list[int]
    """Training rows of each class, in the order of the classes; empty for regression."""

    @classmethod
    def of(cls, prepared: Manifest) -> Data:
        """What the manifest of prepared data says."""
        names = [_name(file) for file in prepared.files[:MOST_FILES]]
        return cls(names, len(prepared.files), prepared.account, prepared.classes.get("train", []))


class BundleRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`bundle.json`."""

    format: int
    name: str
    """The job's name."""
    version: str
    """Twelve hex digits that follow from all that decides an answer: equal versions answer alike."""
    model: ModelSpec
    signature: Signature
    transform: Transform
    files: list[File]
    provenance: Provenance
    metrics: dict[str, Any]
    """The evaluation on the test rows; empty while the bundle is staged."""
    profile: Profile | None = None
    """What the training rows look like; None in bundles of prepared data without one."""
    data: Data | None = None
    """None in bundles of an earlier version."""


@dataclass(frozen=True)
class Bundle:
    """A whole bundle, verified when it was read."""

    folder: Path
    record: BundleRecord

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers by name."""
        from safetensors.torch import load_file

        return load_file(self.folder / WEIGHTS)

    @property
    def code(self) -> Path | None:
        """The folder with the source of the user's own modules, if there are any."""
        folder = self.folder / CODE
        return folder if folder.is_dir() else None


def load(folder: Place) -> Bundle:
    """Open a bundle and compare every file with its recorded size and checksum; reads the weights once for that.

    Of a bucket it is fetched first, once for all processes of this machine, and the folder is that of the copy.

    Raises:
        UserError: There is no whole bundle, a file is missing or damaged, or the format is another.
    """
    if isinstance(folder, Address):
        folder = _fetched(folder)
    path = folder / RECORD
    try:
        record = msgspec.json.decode(path.read_bytes(), type=_Versioned)
    except (FileNotFoundError, NotADirectoryError):
        raise _nothing(folder) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, "a JSON record with its format", str(error)) from None
    if record.format != FORMAT:
        raise UserError(
            "the bundle has another format",
            where=str(path),
            expected=f"format {FORMAT}",
            found=f"format {record.format}",
            fix="serve it with the version of raylway that made it, or run the job again",
        )
    bundle = Bundle(folder, storage.read_record(path, BundleRecord))
    for file in bundle.record.files:
        _verify(folder / file.path, file)
    if bundle.record.version != version(bundle.record):
        raise _damaged(path, f"contents of version {bundle.record.version}", "other contents")
    return bundle


def version(record: BundleRecord) -> str:
    """The content id of a bundle: of the weights, the code, and how rows become numbers and numbers answers."""
    read = msgspec.json.decode(msgspec.json.encode(record), type=BundleRecord)  # a mean of 0 is 0.0 once it was written
    deciding = [file for file in read.files if file.path != EXAMPLES]
    content = msgspec.json.encode([read.format, read.model, read.signature, read.transform, deciding])
    return xxhash.xxh3_128_hexdigest(content)[:12]


def listed(folder: Path) -> list[File]:
    """Every file of a bundle but its record, in the order of their paths."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return [File(path.relative_to(folder).as_posix(), path.stat().st_size, storage.checksum(path)) for path in paths]


class _Versioned(msgspec.Struct):
    format: int


class _Listed(msgspec.Struct):
    files: list[File]


def _fetched(address: Address) -> Path:
    """The copy of a bundle in this machine's cache."""
    try:
        content = (address / RECORD).read_bytes()
    except FileNotFoundError:
        raise _nothing(address) from None

    def bring(folder: Path) -> None:
        for file in named:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            try:
                buckets.download(address / file.path, folder / file.path)
            except FileNotFoundError:
                raise _damaged(address / file.path, f"a file of {file.bytes:,} bytes", "no file") from None
            if (found := storage.checksum(folder / file.path)) != file.checksum:
                raise _damaged(address / file.path, f"checksum {file.checksum}", f"checksum {found}")
        (folder / RECORD).write_bytes(content)

    try:
        named = msgspec.json.decode(content, type=_Listed).files
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(address / RECORD, "a JSON record with its files", str(error)) from None
    size = sum(file.bytes for file in named)
    return cache.fetched_folder(f"bundle-{xxhash.xxh3_128_hexdigest(content)}", size, bring)


def _name(file: str) -> str:
    """What a file is called; folders, and what a URL asks, may be nobody else's business."""
    return (file.partition("?")[0] if "://" in file else file).rpartition("/")[2]


def _nothing(place: Place) -> UserError:
    return UserError(
        "there is no whole bundle here",
        where=str(place),
        expected=f"a folder with {RECORD}, which is written last",
        found="none",
        fix="name the bundle folder of a run that has finished; raylway run JOB finishes one",
    )


def _verify(path: Path, file: File) -> None:
    if not path.is_file():
        raise _damaged(path, f"a file of {file.bytes:,} bytes", "no file")
    if (size := path.stat().st_size) != file.bytes:
        raise _damaged(path, f"{file.bytes:,} bytes", f"{size:,} bytes")
    if (found := storage.checksum(path)) != file.checksum:
        raise _damaged(path, f"checksum {file.checksum}", f"checksum {found}")


def _damaged(path: Place, expected: str, found: str) -> UserError:
    return UserError(
        "the bundle is damaged",
        where=str(path),
        expected=expected,
        found=found,
        fix="copy the bundle anew, or remove its folder and run the job again",
    )
