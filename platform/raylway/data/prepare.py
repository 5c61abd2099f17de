"""From a job's source to prepared data: read, decide, clean, split, fit, write.

Three passes run over the pieces of the data (`passes`, `engine`): read and assess, fit, write. Between them the driver
decides, from small facts, hashes and counts only: about 30 bytes for each row of the source.
"""

from __future__ import annotations

import bisect
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway import storage
from raylway.data import (
    describe,
    division,
    engine,
    generations,
    leaks,
    outcome,
    passes,
    pieces,
    reading,
    shards,
    warnings,
)
from raylway.data import report as column_report
from raylway.data.assessment import Counted
from raylway.data.describe import SIDE
from raylway.data.division import Division, Exceptions
from raylway.data.generations import Start
from raylway.data.items import Group
from raylway.data.opening import Source, no_rows, open_source
from raylway.data.outcome import Outcome
from raylway.data.passes import PieceTask
from raylway.data.reading import Found
from raylway.data.roles import Names, check_names
from raylway.data.shards import Measured, To, Use, Written
from raylway.data.split import TRAIN
from raylway.features import derive, fit
from raylway.features.fit import Part, Question
from raylway.features.prepared import (
    DUPLICATES,
    FORMAT,
    LINE_BITS,
    MANIFEST,
    PROFILE,
    QUARANTINE,
    SPLITS,
    Lineage,
    Manifest,
    Prepared,
    Shard,
)
from raylway.features.profile import profile
from raylway.features.transform import Transform
from raylway.job.load import LoadedJob, located
from raylway.runs.progress import Reporter, Stage
from raylway.runs.run import PREPARED
from raylway.storage import Place

Done = TypeVar("Done", Measured, Written)


def fingerprint(loaded: LoadedJob, root: Place | None = None) -> str:
    """The name of a job's prepared data (`generations`), in the storage folder `root` if it is given."""
    return generations.find(loaded, root / PREPARED if root else None).fingerprint


def prepare(loaded: LoadedJob, root: Place, reporter: Reporter, few: int | None = None) -> Prepared:
    """The prepared data of a job; made only if it is not there already. Ray must be initialised unless `few` is
    `engine.ALL`.

    Args:
        loaded: The job.
        root: The storage folder or bucket, seen by every node.
        reporter: Where progress, the row account and the decisions go.
        few: At most so many tasks of a pass are done in this process (`engine.run`).

    Raises:
        UserError: The data or what the job says of it can't be used.
    """
    start = generations.find(loaded, root / PREPARED)
    folder = root / PREPARED / start.fingerprint
    with reporter.stage("prepare") as stage:
        if (folder / MANIFEST).exists():
            prepared = Prepared(folder)
            stage.finish(f"{_account(prepared.manifest)}; prepared before: {folder}")
            return prepared
        with ExitStack() as stack:
            stack.enter_context(located(loaded))
            if isinstance(root, Path):
                stack.enter_context(storage.writing(root))
            kept = stack.enter_context(pieces.in_use(folder.parent))
            staged = stack.enter_context(storage.made(folder))
            manifest, keys = _prepare(loaded, start, Work(staged, kept, reporter, stage, few))
        pieces.sweep(folder.parent, spent=[] if start.may_grow else keys)
        stage.finish(_account(manifest))
    return Prepared(folder)


@dataclass(frozen=True)
class Work:
    """One preparation under way."""

    folder: Place
    """Where the prepared data is written."""
    kept: Place
    """Of all pieces."""
    reporter: Reporter
    stage: Stage
    few: int | None
    """At most so many tasks of a pass are done in this process (`engine.run`)."""


def _prepare(loaded: LoadedJob, start: Start, work: Work) -> tuple[Manifest, list[str]]:
    """The manifest, and the keys of the pieces behind it."""
    source = open_source(loaded, start.locations)
    names = check_names(loaded, source.columns)
    if not source.parts:
        raise no_rows(loaded.location("data.source"), source)
    found = reading.read(loaded, source, names, start.past.generations, work.kept, work.stage, work.few)
    decided, tasks = _decide(loaded, source, names, found, start, work)
    use = Use.of(found.rules, names, decided.plan)
    transform, written, sample = _encode(tasks, decided, use, found.assessment, work)
    sample = derive.derived(sample, derive.parsed(names.derive))
    continues = bool(decided.division.generations[1:])
    manifest = Manifest(
        format=FORMAT,
        fingerprint=start.fingerprint,
        account=decided.account,
        classes=decided.by_class,
        signature=decided.signature,
        transform=transform,
        files=source.files,
        shards=written,
        decisions=[*source.notes, *found.types.sentences, *decided.sentences],
        lineage=Lineage(
            start.section,
            start.sources,
            start.base if continues else "",
            decided.types,
            decided.task,
            decided.division.generations,
        ),
        warnings=warnings.find(outcome.subject(loaded, names, decided), sample),
        profile=profile(
            sample.filter(pc.equal(sample[SIDE], TRAIN)),
            decided.signature,
            {each.column for each in transform.categorical},
            _missing(found, decided),
        ),
        leak_test=leaks.leak_test(
            work.folder,
            written,
            decided.account.kept,
            [functools.partial(_contents, task, decided.division, work.kept, found.assessment) for task in tasks],
            passes.Tables(work.kept, found.assessment, [(task.key, task.facts.number) for task in tasks]),
        ),
    )
    _tell(work.reporter, manifest, found)
    _write_quarantine(work.folder, work.kept, tasks, found.assessment, source)
    _write_duplicates(work.folder, decided.division.exceptions)
    empty = outcome.empty_columns(found.seen)
    columns = column_report.report(decided.described.columns, names, decided.roles, empty, sample)
    storage.write_sealed(work.folder / PROFILE, {"columns": columns, "warnings": manifest.warnings})
    keys = [item.key for item in found.items]
    storage.write_record(work.folder / pieces.USED, keys if start.may_grow else [])
    set_aside = {name: storage.checksum(work.folder / name) for name in (QUARANTINE, DUPLICATES)}
    manifest = msgspec.structs.replace(manifest, set_aside=set_aside)
    storage.write_sealed(work.folder / MANIFEST, manifest)
    return manifest, keys


def _tell(reporter: Reporter, manifest: Manifest, found: Found) -> None:
    for sentence in manifest.decisions:
        reporter.note(f"  {sentence}")
    for sentence in manifest.warnings:
        reporter.note(f"  warning: {sentence}")
    size = sum(item.size for item in found.items)
    if found.fresh < size:
        reporter.note(f"  read {found.fresh:,} of {size:,} bytes; the others were read before")


def _decide(
    loaded: LoadedJob, source: Source, names: Names, found: Found, start: Start, work: Work
) -> tuple[Outcome, list[PieceTask]]:
    """The outcome over all pieces, and what the later passes need to know of each piece."""
    each = [(item, facts, one) for item in found.items for facts, one in zip(item.facts, item.found, strict=True)]
    tables = passes.Tables(work.kept, found.assessment, [(item.key, facts.number) for item, facts, _ in each])
    tasks: list[PieceTask] = []

    def count(divided: Division, codes: list[list[int]]) -> list[Counted]:
        tasks[:] = [
            PieceTask(item.name, item.key, facts, one, own, divided.exceptions.between(one.first, one.last))
            for (item, facts, one), own in zip(each, codes, strict=True)
        ]
        slim = msgspec.structs.replace(divided, exceptions=Exceptions(b"", b"", b""))
        bound = functools.partial(passes.count, folder=str(work.kept), assessment=found.assessment, divided=slim)
        return list(engine.run(bound, tasks, Counted, max(reading.FEW_HERE, work.few or 0)))

    every = outcome.Pieces([one for _, _, one in each], found.columns, tables, count)
    past = start.past.generations
    decided = outcome.conclude(loaded, source, names, found.rules, found.seen, every, past)
    if past and (decided.types, decided.task) != (start.past.types, start.past.task):
        # the same rows have other hashes under other types: their sides can't be told any more
        decided = outcome.conclude(loaded, source, names, found.rules, found.seen, every)
        decided.sentences.append("the new files change the columns' types: all rows are divided anew")
    return decided, tasks


def _encode(
    tasks: list[PieceTask], decided: Outcome, use: Use, assessment: str, work: Work
) -> tuple[Transform, list[Shard], pa.Table]:
    """Fit the transform on the training rows, then write the shards; and a sample of the kept rows."""
    rows = sum(task.facts.rows for task in tasks)
    divided = msgspec.structs.replace(decided.division, exceptions=Exceptions(b"", b"", b""))
    bound: dict[str, Any] = {"folder": str(work.kept), "assessment": assessment, "divided": divided, "use": use}
    rate = describe.rate(decided.account.kept)
    transform: Question | Transform = fit.first_question(use.plan)
    samples: list[bytes] = []
    while isinstance(transform, Question):
        measure = functools.partial(passes.measure, **bound, question=transform, rate=rate)
        measured = _shown(work.stage, rows, "rows measured", engine.run(measure, tasks, Measured, work.few))
        transform = fit.advance(use.plan, transform, (_part(each, samples) for each in measured))
    each = shards.rows_per_shard(transform)
    keys = [(task.facts.item, task.facts.number) for task in tasks]
    to = To(str(work.folder), dict(zip(keys, shards.numbering(decided.per_piece, each), strict=True)), each)
    write = functools.partial(passes.write, **bound, transform=transform, to=to)
    written = _shown(work.stage, rows, "rows written", engine.run(write, tasks, Written, work.few))
    every = [shard for part in written for shard in part.shards]
    every.sort(key=lambda shard: (SPLITS.index(shard.split), shard.file))
    return transform, every, describe.sampled(samples)


def _missing(found: Found, decided: Outcome) -> dict[str, float]:
    """By column, the share of its cells that are missing, among all rows that are not invalid."""
    counts: Counter[str] = Counter()
    for item in found.items:
        for piece in item.found:
            counts.update(piece.assessed.missing_by)
    return {name: counts[name] / max(1, column.rows) for name, column in decided.described.columns.items()}


def _contents(task: PieceTask, divided: Division, kept: Place, assessment: str) -> leaks.Contents:
    """The kept rows of a piece."""
    by = divided.ordering.by
    table = passes.rows(kept, task.key, task.facts.number, assessment)
    sides = division.sides(table, np.array(task.codes, np.int32), divided, task.exceptions)
    word = {name: table[name].to_numpy() for name in table.column_names}
    at = np.full(task.facts.rows, -1)
    at[word["position"]] = np.arange(len(sides))
    rows = at[at >= 0]
    rows = rows[sides[rows] > 0]
    group = word["key"][rows] if by == "group" else None
    instant = (~word["key"][rows]).astype(np.float64) if by == "time" else None
    return leaks.Contents(word["row"][rows], rows, group, instant)


def _shown(stage: Stage, total: int, unit: str, results: Iterator[Done]) -> Iterator[Done]:
    done = 0
    for result in results:
        done += result.rows
        stage.update(done, total, unit)
        yield result


def _part(measured: Measured, samples: list[bytes]) -> Part:
    """What was measured; its sample goes to the others."""
    if measured.sample:
        samples.append(measured.sample)
    return measured.part


def _account(manifest: Manifest) -> str:
    rows = manifest.account
    return (
        f"read {rows.read:,} rows = kept {rows.kept:,} + {rows.missing:,} with missing cells "
        f"+ {rows.duplicates:,} duplicates + {rows.quarantined:,} quarantined; "
        f"kept = training {rows.train:,} + validation {rows.validation:,} + test {rows.test:,}"
    )


def _write_quarantine(folder: Place, kept: Place, tasks: list[PieceTask], assessment: str, source: Source) -> None:
    groups: dict[int, list[Group]] = {}
    for part in source.parts:
        if isinstance(part, Group):
            groups.setdefault(part.file, []).append(part)
    with storage.written(folder / QUARANTINE) as path, path.open("wb") as file:
        for task in tasks:
            for reject in passes.rejects(kept, task.key, task.facts.number, assessment):
                name, line = source.places.split(reject.row_id)
                record: dict[str, object] = {"row_id": reject.row_id, "file": name, "line": line}
                if some := groups.get(reject.row_id >> LINE_BITS):
                    group = some[bisect.bisect_right(some, line, key=lambda each: each.first_row) - 1]
                    if line < group.first_row + group.rows:
                        record |= {"row_group": group.group, "row": line - group.first_row}
                record |= {"column": reject.column, "reason": reject.reason, "cell": reject.cell}
                file.write(msgspec.json.encode(record) + b"\n")


def _write_duplicates(folder: Place, exceptions: Exceptions) -> None:
    rows, firsts, where = exceptions.arrays()
    left_out = where < 0
    table = pa.table({"row_id": pa.array(rows[left_out]), "first_row_id": pa.array(firsts[left_out])})
    with (
        storage.written(folder / DUPLICATES) as path,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
