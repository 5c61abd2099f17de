"""From a job's source to prepared data: read, decide, clean, split, fit, write.

Four passes run in Ray Data (`engine`); between them the driver decides, from small facts, hashes and counts only:
about 30 bytes for each row of the source.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from raylway import storage
from raylway.data import clean, csv_read, describe, engine, files, items, leaks, outcome, shards, warnings
from raylway.data import report as column_report
from raylway.data.clean import Assessed
from raylway.data.columns import Seen
from raylway.data.csv_read import Reject
from raylway.data.csv_text import Scan
from raylway.data.decide import Places, Types, lost, refuse_infinite
from raylway.data.describe import SIDE
from raylway.data.items import Part, Range, Reading, Stream
from raylway.data.opening import Source, no_rows, open_source
from raylway.data.outcome import Outcome
from raylway.data.roles import Names, check_names
from raylway.data.shards import Measured, To, Use, Written
from raylway.data.split import TRAIN
from raylway.features import transform as features_transform
from raylway.features.prepared import FORMAT, MANIFEST, SPLITS, Manifest, Prepared, Shard
from raylway.features.profile import profile
from raylway.features.transform import Transform
from raylway.job.load import LoadedJob
from raylway.runs.progress import Reporter, Stage
from raylway.runs.run import PREPARED

VERSION = 3
"""Raise it when preparation gives other bytes for the same source and job."""


def fingerprint(loaded: LoadedJob) -> str:
    """What decides the bytes of the prepared data: the source's content, the data section, task, seed and our code.

    Of a `python://` source it knows the module's file and the function's name.
    """
    job = loaded.job
    digest = xxhash.xxh3_128()
    facts: list[Any] = [
        VERSION,
        features_transform.VERSION,
        FORMAT,
        job.seed,
        job.task,
        job.data.model_dump(mode="json"),
    ]
    facts += [(location.name, location.function, files.checksum(location)) for location in files.locate(loaded)]
    digest.update(msgspec.json.encode(facts))
    return digest.hexdigest()[:16]


def prepare(loaded: LoadedJob, root: Path, reporter: Reporter) -> Prepared:
    """The prepared data of a job; made only if it is not there already. Ray must be initialised.

    Args:
        loaded: The job.
        root: The storage folder, seen by every node.
        reporter: Where progress, the row account and the decisions go.

    Raises:
        UserError: The data or what the job says of it can't be used.
    """
    mark = fingerprint(loaded)
    folder = root / PREPARED / mark
    with reporter.stage("prepare") as stage:
        if (folder / MANIFEST).exists():
            prepared = Prepared(folder)
            stage.finish(f"{_account(prepared.manifest)}; prepared before: {folder}")
            return prepared
        with storage.staged_folder(folder) as staged:
            manifest = _prepare(loaded, mark, staged, reporter, stage)
        stage.finish(_account(manifest))
    return Prepared(folder)


def _prepare(loaded: LoadedJob, mark: str, folder: Path, reporter: Reporter, stage: Stage) -> Manifest:
    source = open_source(loaded)
    names = check_names(loaded, source.columns)
    if not source.parts:
        raise no_rows(loaded.location("data.source"), ", ".join(source.files[:5]))
    engine.configure()
    pieces, seen, types = _read(loaded, source, names, stage)
    refuse_infinite(seen, types.of, loaded.job.data.clean, set(names.drop), source.places)
    rules = outcome.rules_of(loaded, names, types)
    rows = sum(fact.rows for fact in pieces.facts)
    assess = functools.partial(clean.assess, rules=rules)
    assessed = pieces.map(assess, Assessed, _rows(stage, rows, "rows cleaned"))
    decided = outcome.conclude(loaded, source, names, rules, seen, assessed)
    use = Use.of(rules, names, decided.roles)
    transform, written, sample = _encode(pieces, decided, use, folder, stage)
    every = sorted((shard for part in written for shard in part.shards), key=_order)
    sample = features_transform.derived(sample, names.derive)
    manifest = Manifest(
        format=FORMAT,
        fingerprint=mark,
        account=decided.account,
        classes=decided.by_class,
        signature=decided.signature,
        transform=transform,
        files=source.files,
        shards=every,
        decisions=[*source.notes, *types.sentences, *decided.sentences],
        warnings=warnings.find(outcome.subject(loaded, names, decided), sample),
        profile=profile(sample.filter(pc.equal(sample[SIDE], TRAIN)), decided.signature),
        leak_test=leaks.leak_test(folder, every, decided.account.kept, _contents(assessed, decided, written)),
    )
    for sentence in manifest.decisions:
        reporter.note(f"  {sentence}")
    for sentence in manifest.warnings:
        reporter.note(f"  warning: {sentence}")
    _write_quarantine(folder, decided.rejects, source.places)
    empty = outcome.empty_columns(seen)
    columns = column_report.report(decided.described.columns, names, decided.roles, empty, sample)
    storage.write_record(folder / "profile.json", {"columns": columns, "warnings": manifest.warnings})
    storage.write_record(folder / MANIFEST, manifest)
    return manifest


def _read(
    loaded: LoadedJob, source: Source, names: Names, stage: Stage
) -> tuple[engine.Pieces, dict[str, Seen], Types]:
    """The pieces, what was seen in them, and the types of the columns."""
    total = source.size / 1e6
    todo = items.grouped(_cut(source), csv_read.RANGE_BYTES)
    reading = Reading(source.columns, names.numeric, csv_read.RANGE_BYTES)
    while True:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            stage.update(min(done * csv_read.RANGE_BYTES / 1e6, total), total, "MB read")

        pieces = engine.Pieces(todo, reading, progress)
        if not sum(fact.read for fact in pieces.facts):
            raise no_rows(loaded.location("data.source"), ", ".join(source.files[:5]))
        seen = outcome.merged([fact.seen for fact in pieces.facts])
        types = outcome.types_of(loaded, names, seen, source.places)
        again = lost(seen, types.of)
        if not again:
            return pieces, seen, types
        # a late word made text of a column whose earlier pieces kept numbers only: their text is read again
        reading = msgspec.structs.replace(reading, as_text=again)


def _cut(source: Source) -> list[Part]:
    """The source's parts, large plain CSV files cut into ranges if their quotes are regular."""
    step = csv_read.RANGE_BYTES
    uncut = {
        index: [
            Range(part.file, part.location, part.heading, start, end, False, 0)
            for start, end in items.ranges(part, step)
        ]
        for index, part in enumerate(source.parts)
        if isinstance(part, Stream) and not part.location.compression and part.size - part.heading.offset > step
    }
    if not uncut:
        return source.parts
    scans = iter(engine.spread(items.scan, [part for parts in uncut.values() for part in parts], Scan))
    cut: list[Part] = []
    for index, part in enumerate(source.parts):
        pieces = [(piece, next(scans)) for piece in uncut.get(index, [])]
        cut += items.placed(pieces) or [part]
    return cut


def _encode(
    pieces: engine.Pieces, decided: Outcome, use: Use, folder: Path, stage: Stage
) -> tuple[Transform, list[Written], pa.Table]:
    """Fit the transform on the training rows, then write the shards; and a sample of the kept rows."""
    rows = sum(len(sides) for sides in decided.sides)
    rate = describe.rate(decided.account.kept)
    measure = functools.partial(shards.measure, use=use, target_is_number=decided.task == "regression", rate=rate)
    measured = pieces.map(measure, Measured, _rows(stage, rows, "rows measured"), decided.sides)
    transform = shards.fitted(measured, decided.task, decided.classes, decided.roles, use.target)
    each = shards.rows_per_shard(use)
    keys = [(fact.item, fact.number) for fact in pieces.facts]
    to = To(str(folder), dict(zip(keys, shards.numbering(decided.sides, each), strict=True)), each)
    write = functools.partial(shards.write, use=use, transform=transform, to=to)
    written = pieces.map(write, Written, _rows(stage, rows, "rows written"), decided.sides)
    return transform, written, describe.sampled(part.sample for part in measured)


def _order(shard: Shard) -> tuple[int, str]:
    return SPLITS.index(shard.split), shard.file


def _contents(assessed: list[Assessed], decided: Outcome, written: list[Written]) -> Iterator[leaks.Contents]:
    """What the kept rows hold, piece by piece."""
    for piece, sides, part in zip(assessed, decided.sides, written, strict=True):
        usable = np.frombuffer(piece.usable, bool)
        hashes = np.frombuffer(piece.hashes, np.uint64).reshape(-1, 2)
        yield leaks.Contents(np.frombuffer(part.row_ids, np.uint64), hashes[sides[usable] > 0])


def _rows(stage: Stage, total: int, unit: str) -> Callable[[int], None]:
    done = 0

    def progress(rows: int) -> None:
        nonlocal done
        done += rows
        stage.update(done, total, unit)

    return progress


def _account(manifest: Manifest) -> str:
    rows = manifest.account
    return (
        f"read {rows.read:,} rows = kept {rows.kept:,} + {rows.missing:,} with missing cells "
        f"+ {rows.duplicates:,} duplicates + {rows.quarantined:,} quarantined; "
        f"kept = training {rows.train:,} + validation {rows.validation:,} + test {rows.test:,}"
    )


def _write_quarantine(folder: Path, rejects: list[Reject], places: Places) -> None:
    lines = []
    for reject in rejects:
        name, number = places.split(reject.row_id)
        record = {"file": name, "line": number, "column": reject.column, "reason": reject.reason, "cell": reject.cell}
        lines.append(msgspec.json.encode(record) + b"\n")
    (folder / "quarantine").mkdir()
    storage.write_bytes(folder / "quarantine" / "rows.jsonl", b"".join(lines))
