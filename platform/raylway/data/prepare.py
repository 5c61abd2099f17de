"""From a job's source to prepared data: read, decide, clean, split, fit, write.

Three passes run over the pieces of the data (`passes`, `engine`): read and assess, fit, write. Between them the driver
decides, from small facts, hashes and counts only: about 30 bytes for each row of the source.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from raylway import storage
from raylway.data import csv_read, engine, files, items, outcome, passes, pieces, shards
from raylway.data.clean import Assessed, Rules
from raylway.data.columns import Seen
from raylway.data.csv_read import Reject
from raylway.data.csv_text import Scan
from raylway.data.decide import Places, Types, lost, refuse_infinite
from raylway.data.items import Facts, Part, Range, Reading, Stream
from raylway.data.opening import Source, no_rows, open_source
from raylway.data.outcome import Outcome
from raylway.data.passes import PieceTask, ReadItem
from raylway.data.roles import Names, check_names
from raylway.data.shards import Measured, To, Use, Written
from raylway.errors import UserError
from raylway.features import transform as features_transform
from raylway.features.prepared import FORMAT, MANIFEST, SPLITS, Manifest, Prepared, Shard
from raylway.features.transform import Transform
from raylway.job.load import LoadedJob
from raylway.runs.progress import Reporter, Stage
from raylway.runs.run import PREPARED

_EXPECT_BYTES = 1 << 20
_FEW_RANGES = 1000
"""Up to 16 GB are scanned for line ends here: a second a gigabyte, less than Ray needs to begin."""
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
        with pieces.in_use(folder.parent) as kept, storage.staged_folder(folder) as staged:
            manifest, keys = _prepare(loaded, mark, staged, kept, reporter, stage)
        pieces.sweep(folder.parent, spent=keys if len(manifest.files) == 1 else [])
        stage.finish(_account(manifest))
    return Prepared(folder)


def _prepare(
    loaded: LoadedJob, mark: str, folder: Path, kept: Path, reporter: Reporter, stage: Stage
) -> tuple[Manifest, list[str]]:
    """The manifest, and the keys of the pieces behind it."""
    source = open_source(loaded)
    names = check_names(loaded, source.columns)
    if not source.parts:
        raise no_rows(loaded.location("data.source"), ", ".join(source.files[:5]))
    read, rules, types, seen = _read(loaded, source, names, kept, stage)
    assessed = [each for item in read for each in item.assessed]
    decided = outcome.conclude(loaded, source, names, rules, seen, assessed)
    tasks = [
        PieceTask(item.key, facts, sides.tobytes())
        for (item, facts), sides in zip(((item, facts) for item in read for facts in item.facts), decided.sides, strict=True)
    ]
    transform, written = _encode(tasks, decided, Use.of(rules, names, decided.roles), folder, kept, stage)
    manifest = Manifest(
        format=FORMAT,
        fingerprint=mark,
        account=decided.account,
        classes=decided.by_class,
        signature=decided.signature,
        transform=transform,
        files=source.files,
        shards=written,
        decisions=[*source.notes, *types.sentences, *decided.sentences],
    )
    for sentence in manifest.decisions:
        reporter.note(f"  {sentence}")
    _write_quarantine(folder, decided.rejects, source.places)
    _write_profile(folder, decided, rules, seen)
    keys = [item.key for item in read]
    storage.write_record(folder / pieces.USED, keys if len(source.files) > 1 else [])
    storage.write_record(folder / MANIFEST, manifest)
    return manifest, keys


def _read(
    loaded: LoadedJob, source: Source, names: Names, kept: Path, stage: Stage
) -> tuple[list[ReadItem], Rules, Types, dict[str, Seen]]:
    """Read and assess the source: the items, the rules that their rows were held to, the types, and what was seen.

    Rows are assessed as they are read, under the types that the source's first bytes suggest; where the whole data
    decides otherwise, they are assessed again from the pieces.
    """
    todo = items.grouped(_cut(source), csv_read.RANGE_BYTES)
    reading = Reading(source.columns, names.numeric, csv_read.RANGE_BYTES)
    rules = _expected_rules(loaded, source, names)
    while True:
        read = _pass(todo, reading, rules, source, kept, stage)
        if not sum(facts.read for item in read for facts in item.facts):
            raise no_rows(loaded.location("data.source"), ", ".join(source.files[:5]))
        seen = outcome.merged([facts.seen for item in read for facts in item.facts])
        types = outcome.types_of(loaded, names, seen, source.places)
        if again := lost(seen, types.of):
            # a late word made text of a column whose earlier pieces kept numbers only: their text is read again
            reading = msgspec.structs.replace(reading, as_text=again)
            rules = outcome.rules_of(loaded, names, types)
            continue
        refuse_infinite(seen, types.of, loaded.job.data.clean, set(names.drop), source.places)
        decided = outcome.rules_of(loaded, names, types)
        if decided == rules and all(item.is_assessed for item in read):
            return read, decided, types, seen
        read = _pass(todo, reading, decided, source, kept, stage, must_fit=True)
        return read, decided, types, seen


def _expected_rules(loaded: LoadedJob, source: Source, names: Names) -> Rules | None:
    """The rules under the types that the source's first bytes suggest; None where they suggest none."""
    piece, _ = items.read_head(source.parts[0], Reading(source.columns, names.numeric, _EXPECT_BYTES))
    try:
        return outcome.rules_of(loaded, names, outcome.types_of(loaded, names, piece.facts.seen, source.places))
    except UserError:  # the whole data may be right where its beginning is not
        return None


def _pass(
    todo: list[items.Item],
    reading: Reading,
    rules: Rules | None,
    source: Source,
    kept: Path,
    stage: Stage,
    must_fit: bool = False,
) -> list[ReadItem]:
    total, done = source.size / 1e6, 0.0

    def progress(item: ReadItem) -> None:
        nonlocal done
        done += item.size / 1e6
        stage.update(min(done, total), total, "MB read")

    read = functools.partial(passes.read, reading=reading, rules=rules, folder=str(kept), must_fit=must_fit)
    return engine.run(read, [pieces.keyed(item, reading) for item in todo], ReadItem, progress)


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
    every = [part for parts in uncut.values() for part in parts]
    scans = iter(engine.run(items.scan, every, Scan, few=_FEW_RANGES))
    cut: list[Part] = []
    for index, part in enumerate(source.parts):
        pieces = [(piece, next(scans)) for piece in uncut.get(index, [])]
        cut += items.placed(pieces) or [part]
    return cut


def _encode(
    tasks: list[PieceTask], decided: Outcome, use: Use, folder: Path, kept: Path, stage: Stage
) -> tuple[Transform, list[Shard]]:
    """Fit the transform on the training rows, then write the shards."""
    rows = sum(len(sides) for sides in decided.sides)
    measure = functools.partial(
        passes.measure, folder=str(kept), use=use, target_is_number=decided.task == "regression"
    )
    measured = engine.run(measure, tasks, Measured, _rows(stage, rows, "rows measured"))
    transform = shards.fitted(measured, decided.task, decided.classes, decided.roles, use.target)
    each = shards.rows_per_shard(use)
    keys = [(task.facts.item, task.facts.number) for task in tasks]
    to = To(str(folder), dict(zip(keys, shards.numbering(decided.sides, each), strict=True)), each)
    write = functools.partial(passes.write, folder=str(kept), use=use, transform=transform, to=to)
    written = engine.run(write, tasks, Written, _rows(stage, rows, "rows written"))
    every = [shard for part in written for shard in part.shards]
    return transform, sorted(every, key=lambda shard: (SPLITS.index(shard.split), shard.file))


def _rows(stage: Stage, total: int, unit: str) -> Callable[[Measured | Written], None]:
    done = 0

    def progress(result: Measured | Written) -> None:
        nonlocal done
        done += result.rows
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


def _write_profile(folder: Path, decided: Outcome, rules: Rules, seen: dict[str, Seen]) -> None:
    roles_by_name = dict.fromkeys(decided.roles.numeric, "numeric") | dict.fromkeys(
        decided.roles.categorical, "categorical"
    )
    columns = []
    for name, kind in rules.types.items():
        missing = seen[name].missing_as(kind)
        role = "target" if name == rules.target else roles_by_name.get(name, "unused")
        columns.append(
            {"name": name, "type": kind, "role": role, "missing": missing, "distinct": decided.distinct.get(name)}
        )
    storage.write_record(folder / "profile.json", {"columns": columns})
