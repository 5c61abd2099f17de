"""Which prepared data a job's files continue: the same job over fewer files, all of them unchanged.

The rows of those files keep their ids and sides; only the rows of the new files are divided. So what comes out depends
on what was prepared before, and the fingerprint says so. A folder for exactly these files comes first, however it came
about: running a job again finds what it made.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import xxhash

from raylway import storage
from raylway.bundle import code
from raylway.data import files
from raylway.data.location import Location
from raylway.features import derive, transform
from raylway.features.prepared import FORMAT, MANIFEST, Lineage
from raylway.job.load import LoadedJob, located
from raylway.storage import Place

_ASKED_AT_ONCE = 16
VERSION = 6
"""Raise it when preparation gives other bytes for the same source and job."""


class _Known(msgspec.Struct, frozen=True):
    """What is asked of a manifest."""

    fingerprint: str
    lineage: Lineage = Lineage()


# Made before threads decode with it: where several are the first, msgspec 0.22 ends the process.
_DECODER = msgspec.json.Decoder(_Known)


@dataclass(frozen=True)
class Start:
    """Where a preparation begins."""

    fingerprint: str
    section: str
    locations: list[Location]
    """In the order of the row ids: those of the base first, then by name."""
    base: str = ""
    """Fingerprint of the prepared data that is continued."""
    past: Lineage = field(default_factory=Lineage)

    may_grow: bool = True
    """Whether other files may join: not if the job names one file."""

    @property
    def sources(self) -> list[tuple[str, str]]:
        return [_identity(location) for location in self.locations]


def find(loaded: LoadedJob, folder: Place | None) -> Start:
    """What decides the bytes of the prepared data: the source's content, the data section, task, seed and our code, and
    the prepared data that it continues.

    Of a `python://` source it knows the module's file and the function's name, of the user's functions for derived
    columns the source of their modules.

    Args:
        loaded: The job.
        folder: Where prepared data lies; None to look for none.

    Raises:
        UserError: A source, or a module of a derived column, is not there.
    """
    job = loaded.job
    locations = files.locate(loaded)
    by_identity = {_identity(location): location for location in locations}
    data = job.data.model_dump(mode="json")
    data["source"] = _in_any_order(data["source"])
    del data["balance"]  # it changes no row
    facts: list[object] = [VERSION, transform.VERSION, FORMAT, job.seed, job.task, data]
    with located(loaded):
        modules = derive.modules(job.data.derive)
    facts += [(path, storage.checksum(file)) for each in modules for path, file in sorted(code.sources(each).items())]
    section = _digest(facts)
    may_grow = [job.data.source] != [location.name for location in locations]
    alone = Start(_digest([section, list(by_identity), ""]), section, locations, may_grow=may_grow)
    known = [each for each in _known(folder) if each.lineage.section == section and each.lineage.sources]
    same = [each for each in known if set(each.lineage.sources) == by_identity.keys()]
    if same:
        found = min(same, key=lambda each: each.fingerprint)
        ordered = [by_identity[identity] for identity in found.lineage.sources]
        return Start(found.fingerprint, section, ordered, found.lineage.base)
    bases = [each for each in known if set(each.lineage.sources) < by_identity.keys()]
    if not bases:
        return alone
    base = min(bases, key=lambda each: (-len(each.lineage.sources), each.fingerprint))
    old = dict.fromkeys(base.lineage.sources)
    ordered = [by_identity[identity] for identity in [*old, *(each for each in by_identity if each not in old)]]
    mark = _digest([section, [_identity(location) for location in ordered], base.fingerprint])
    return Start(mark, section, ordered, base.fingerprint, base.lineage)


def _known(folder: Place | None) -> list[_Known]:
    there = storage.children(folder) if folder else []
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:  # of a bucket each is a request
        return [found for found in pool.map(_known_of, there) if found is not None]


def _known_of(prepared: Place) -> _Known | None:
    try:
        return _DECODER.decode((prepared / MANIFEST).read_bytes())
    except (OSError, msgspec.DecodeError):  # damaged, of another version, not whole yet, or removed just now
        return None


def _in_any_order(source: Any) -> Any:
    """A source as the job has it, its lists sorted: files have the order of their names."""
    if isinstance(source, dict):
        return {side: _in_any_order(each) for side, each in source.items()}
    return sorted(set(source)) if isinstance(source, list) else source


def _identity(location: Location) -> tuple[str, str]:
    return location.name, f"{location.function or ''}{location.side or ''}:{files.checksum(location)}"


def _digest(facts: object) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(facts))[:16]
