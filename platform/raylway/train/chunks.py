"""Tensors in the files of a checkpoint: which part of which tensor each file holds, and reading what is wanted here.

Whoever wrote the parts and however large they were, a reader gets the parts that it asks for, whole tensors or others.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

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


def read(folder: Path, files: Iterable[File], prefix: str, wanted: Wanted) -> dict[str, torch.Tensor]:
    """Tensors whose names start with the prefix, or parts of them, by the rest of their names, on the CPU.

    Args:
        folder: Where the files are.
        files: As the manifest names them.
        prefix: Of the names.
        wanted: Which part of each tensor; the files are read in these ranges only.
    """
    from safetensors import safe_open

    places = {key: place for key, shape in shapes(files, prefix).items() if (place := wanted(key, shape)) is not None}
    found: dict[str, torch.Tensor] = {}
    for file in files:
        chunks = [chunk for chunk in file.chunks if chunk.name.startswith(prefix)]
        chunks = [chunk for chunk in chunks if chunk.name.removeprefix(prefix) in places]
        if not chunks:
            continue
        with safe_open(folder / file.name, framework="pt") as opened:
            for chunk in chunks:
                key = chunk.name.removeprefix(prefix)
                _read_overlap(found, key, places[key], chunk, opened)
    return found


def _read_overlap(found: dict[str, torch.Tensor], key: str, place: Place, chunk: Chunk, opened: Any) -> None:
    """Copy into `found[key]` what a chunk has of a place."""
    both = [
        (max(start, first), min(stop, last)) for (start, stop), (first, last) in zip(place, chunk.place, strict=True)
    ]
    source = tuple(slice(start - at, stop - at) for (start, stop), at in zip(both, chunk.offsets, strict=True))
    is_apart = any(start >= stop for start, stop in both)
    # A slice of nothing still tells the type.
    part = opened.get_slice(chunk.name)[tuple(slice(0, 0) for _ in both) if is_apart else source] if both else None
    if part is None:
        part = opened.get_tensor(chunk.name)  # a single number, which has no slices
    sizes = [stop - start for start, stop in place]
    target = found.setdefault(key, torch.empty(sizes, dtype=part.dtype))
    if not is_apart:
        target[tuple(slice(start - at, stop - at) for (start, stop), (at, _) in zip(both, place, strict=True))] = part


def chunks_in(path: Path) -> Iterator[Chunk]:
    """From the header of a safetensors file; torch's writer notes there where each part belongs in its tensor."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    places = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
    for key, entry in header.items():
        yield Chunk(key, entry["dtype"], entry["shape"], places[key]["saved_offsets"])
