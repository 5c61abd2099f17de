"""Tensors in the files of a checkpoint: which part of which tensor each file holds, writing and reading them.

Whoever wrote the parts and however large they were, a reader gets the parts that it asks for, whole tensors or others.
The files are safetensors files with the notes of `torch.distributed.checkpoint`, so other tools read them too. Written
here, and not by torch or safetensors: theirs hold Python's lock while they write, and training would wait for it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from raylway import storage

_PIECE_BYTES = 4 << 20
_LEFT_BYTES = 8 << 20
"""Of a disk, for metrics and records."""
_READ_BYTES = 32 << 20
"""What is wanted of a file is read in ranges of about this size: of a bucket each is a request."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Place = list[tuple[int, int]]
"""Start and stop of a part in each dimension of its tensor."""
Wanted = Callable[[str, list[int]], Place | None]
"""From a tensor's name and whole shape to the part of it to read; None for nothing."""


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor, or the part of one that this file holds."""

    name: str
    dtype: str
    shape: list[int]
    offsets: list[int]
    start: int
    """Its first byte in the file."""

    @property
    def place(self) -> Place:
        return [(at, at + size) for at, size in zip(self.offsets, self.shape, strict=True)]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    bytes: int
    checksum: str
    chunks: list[Chunk] = []


def whole(name: str, shape: list[int]) -> Place:
    """All of any tensor."""
    return [(0, size) for size in shape]


def place_of(tensor: torch.Tensor) -> Place:
    """Which part of the whole this rank holds of a tensor."""
    if not hasattr(tensor, "to_local"):
        return whole("", list(tensor.shape))
    # What DTensor tells torch's own writer of checkpoints.
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return [(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]


def as_part(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A part that was read for the place of `like`, as a tensor of its kind."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    part = part.to(like.device)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def shapes(files: Iterable[File], prefix: str) -> dict[str, list[int]]:
    """Of the whole tensors whose names start with the prefix, by the rest of their names."""
    found: dict[str, list[int]] = {}
    for chunk in (chunk for file in files for chunk in file.chunks if chunk.name.startswith(prefix)):
        ends = [stop for _, stop in chunk.place]
        key = chunk.name.removeprefix(prefix)
        found[key] = [max(pair) for pair in zip(ends, found.get(key, ends), strict=True)]
    return found


class Part(NamedTuple):
    """A tensor, or this rank's part of one, in host memory."""

    tensor: torch.Tensor
    """Contiguous."""
    offsets: list[int]
    """Where it begins in the whole, in each dimension."""


def write(path: Path, parts: dict[str, Part]) -> File:
    """Write parts as one safetensors file.

    Returns:
        What the manifest says of the file.

    Raises:
        OSError: It can't be written. A disk without room for it is not filled up first.
    """
    # The widest numbers first: then each tensor begins where its numbers may.
    order = sorted(parts, key=lambda key: (-parts[key].tensor.itemsize, key))
    places = {key: {"saved_offsets": parts[key].offsets} for key in order}
    header: dict[str, object] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)}}
    chunks, at = [], 0
    for key in order:
        tensor, offsets = parts[key]
        chunks.append(Chunk(key, _NAMES[tensor.dtype], list(tensor.shape), offsets, at))
        header[key] = {"dtype": chunks[-1].dtype, "shape": chunks[-1].shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    if shutil.disk_usage(path.parent).free < start + at + _LEFT_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            for piece in _pieces(parts[key].tensor):
                file.write(piece)
    chunks = [msgspec.structs.replace(chunk, start=start + chunk.start) for chunk in chunks]
    return File(path.name, start + at, storage.checksum(path), chunks)


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    content = tensor.reshape(-1).view(torch.uint8).numpy().data
    return (content[at : at + _PIECE_BYTES] for at in range(0, len(content), _PIECE_BYTES))


def read(folder: storage.Place, files: Iterable[File], prefix: str, wanted: Wanted) -> dict[str, torch.Tensor]:
    """Tensors whose names start with the prefix, or parts of them, by the rest of their names, on the CPU.

    Args:
        folder: Where the files are.
        files: As the manifest names them.
        prefix: Of the names.
        wanted: Which part of each tensor; the files are read in the ranges that have something of it.
    """
    places = {key: place for key, shape in shapes(files, prefix).items() if (place := wanted(key, shape)) is not None}
    found: dict[str, torch.Tensor] = {}
    for file in files:
        overlaps = []
        for chunk in file.chunks:
            key = chunk.name.removeprefix(prefix)
            if chunk.name.startswith(prefix) and key in places:
                found.setdefault(key, _empty(places[key], _DTYPES[chunk.dtype]))
                overlaps.append(_Overlap.of(chunk, places[key], found[key]))
        for together in _runs(sorted(filter(None, overlaps), key=lambda overlap: overlap.start)):
            start = together[0].start
            content = bytearray(storage.read_range(folder / file.name, start, together[-1].stop))
            for overlap in together:
                overlap.fill(content, overlap.start - start)
    return found


def _empty(place: Place, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty([stop - start for start, stop in place], dtype=dtype)


class _Overlap(NamedTuple):
    """What a chunk has of what is wanted."""

    start: int
    stop: int
    """Bytes of the file: whole rows of the chunk, which lie side by side; a single number is a row of its own."""
    shape: list[int]
    """Of these rows."""
    columns: tuple[slice, ...]
    """What is wanted of each row."""
    target: torch.Tensor
    """Where it goes."""

    @classmethod
    def of(cls, chunk: Chunk, place: Place, tensor: torch.Tensor) -> _Overlap | None:
        """None if they have nothing in common."""
        both = [
            (max(start, first), min(stop, last))
            for (start, stop), (first, last) in zip(place, chunk.place, strict=True)
        ]
        if any(start >= stop for start, stop in both):
            return None
        source = [slice(start - at, stop - at) for (start, stop), at in zip(both, chunk.offsets, strict=True)]
        target = tensor[tuple(slice(start - at, stop - at) for (start, stop), (at, _) in zip(both, place, strict=True))]
        rows = source[0] if source else slice(0, 1)
        row_bytes = math.prod(chunk.shape[1:]) * tensor.itemsize
        shape = [rows.stop - rows.start, *chunk.shape[1:]] if source else []
        start, stop = (chunk.start + row * row_bytes for row in (rows.start, rows.stop))
        return cls(start, stop, shape, tuple(source[1:]), target)

    def fill(self, content: bytearray, offset: int) -> None:
        count = math.prod(self.shape)
        part = torch.frombuffer(content, dtype=self.target.dtype, count=count, offset=offset).view(self.shape)
        self.target.copy_(part[(slice(None), *self.columns)] if self.columns else part)


def _runs(overlaps: Iterable[_Overlap]) -> Iterator[list[_Overlap]]:
    """Those that lie side by side, together as far as one read goes."""
    together: list[_Overlap] = []
    for overlap in overlaps:
        if together and (overlap.start > together[-1].stop or overlap.stop - together[0].start > _READ_BYTES):
            yield together
            together = []
        together.append(overlap)
    if together:
        yield together
