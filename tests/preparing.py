"""Small job files, what they read and what they prepare in this process."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from raylway import storage
from raylway.data import assessment, columns, engine, items, opening, prepare, roles
from raylway.features.prepared import Prepared
from raylway.job.load import LoadedJob, load_job
from raylway.runs.progress import Reporter


def job(folder: Path, data: dict[str, Any], **top: Any) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(json.dumps({"name": "made", "data": data, **top}))
    return load_job(path)


def prepared(folder: Path, data: dict[str, Any], **top: Any) -> Prepared:
    """Of a small source, which needs no Ray."""
    return prepare.prepare(job(folder, data, **top), folder / "runs", Reporter("lines", io.StringIO()))


def prepare_elsewhere(folder: Path, root: str, cache: Path) -> None:
    """The job file of a folder, prepared into a bucket as on another machine, with a cache of its own."""
    os.environ["RAYLWAY_CACHE"] = str(cache)
    loaded = load_job(folder / "job.yaml")
    prepare.prepare(loaded, storage.place(root), Reporter("lines", io.StringIO()), engine.ALL)


def read(folder: Path, step: int = 1 << 20, **data: Any) -> tuple[pa.Table, list[int], list[Any], list[str]]:
    """All rows of a source in their decided types, their ids, the rejects and the decisions; read in ranges."""
    loaded = job(folder, {"target": "y", **data})
    source = opening.open_source(loaded)
    names = roles.check_names(loaded, source.columns)
    parts: list[Any] = []
    for part in source.parts:
        if isinstance(part, items.Stream) and part.is_cut and part.size > step:
            cut = [
                items.Range(part.file, part.location, part.heading, a, b, False, 0) for a, b in items.ranges(part, step)
            ]
            parts += items.placed([(each, items.scan(each)) for each in cut]) or [part]
        else:
            parts.append(part)
    how = loaded.job.data.read
    reading = items.Reading(source.columns, names.numeric, step, [], how.decimal, how.missing_words)
    while True:
        pieces = [piece for item in items.grouped(parts, step) for piece in items.read(item, reading)]
        seen = assessment.merged([piece.facts.seen for piece in pieces])
        types = assessment.types_of(loaded, names, seen, source.places)
        again = [name for name, each in seen.items() if types.of[name] == "string" and each.lossy]
        if not again:
            break
        reading = msgspec.structs.replace(reading, as_text=again)
    tables = [
        pa.table(
            {
                name: columns.final(piece.table[name].combine_chunks(), types.of[name], False, how.decimal)[0]
                for name in source.columns
            }
        )
        for piece in pieces
    ]
    ids = [row for piece in pieces for row in piece.table[items.ROW_ID].to_pylist()]
    rejects = [reject for piece in pieces for reject in piece.facts.rejects]
    return pa.concat_tables(tables), ids, rejects, [*source.notes, *types.sentences]
