"""One self-contained HTML page from a run directory, whatever of the run is there yet.

No script, no network, no font of its own: the page can be mailed, archived and printed. Everything that comes from the
data (names of classes, columns and files, cells) is escaped by the template engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import jinja2
import msgspec

from raylway import storage
from raylway.evaluate.record import LABELS, Evaluation, reading
from raylway.features import dates
from raylway.features.prepared import QUARANTINE, SPLITS, Manifest, Prepared
from raylway.report import figures, sparks, speed, words
from raylway.report.charts import Figure
from raylway.runs import pace, starts
from raylway.runs.run import STAGES, Run, RunRecord
from raylway.storage import Place

_MOST_CLASSES = 20
"""Of a confusion matrix that can be read; of more classes the most frequent confusions are listed."""
_MOST_LISTED = 50
_MOST_QUARANTINED = 20
_MOST_WRONG = 10
_MOST_STARTS = 6
_AFTER_PREPARE = STAGES[1:-1]
"""What can be unfinished: the prepared data is there, and this page is the last stage."""


def write(run: Run, prepared: Prepared) -> Place:
    """Write `report.html` anew and return where it is.

    Args:
        run: The run; it may be unfinished, and the page then says what is missing.
        prepared: The data that it was trained on.

    Raises:
        UserError: A file of the run or of its data is damaged.
    """
    record, manifest = run.record, prepared.manifest
    evaluation = storage.read_record(run.evaluation, Evaluation) if run.evaluation.exists() else None
    training = record.stages["train"].facts if "train" in record.stages else {}
    history, events = figures.History(run.metrics), list(pace.lines(run.events))
    page = (
        _environment()
        .get_template("report.html")
        .render(
            record=record,
            manifest=manifest,
            unfinished=[name for name in _AFTER_PREPARE if not run.is_done(name)],
            evaluation=evaluation,
            result=_result(evaluation, manifest) if evaluation else None,
            job=run.job.read_text(encoding="utf-8") if run.job.exists() else "",
            account=manifest.account,
            balance=_balance(manifest),
            leak_test=manifest.leak_test,
            leak_words=words.leaks(manifest.leak_test) if manifest.leak_test else "",
            columns=_columns(prepared),
            quarantined=list(_quarantined(prepared)),
            training={**training, **training.get("plan", {})},
            learning=figures.learning(history, training.get("best_step")),
            speed=speed.charts(history),
            spent=speed.facts(history, events),
            starts=_starts(events),
            not_compiled=sorted({line["reason"] for line in events if line["event"] == "not compiled"}),
            answers=_answers(run, evaluation),
            worst=_worst(run, evaluation),
            clock=_clock(record),
        )
    )
    storage.write_bytes(run.report, page.encode("utf-8", "replace"))
    return run.report


def _starts(events: list[pace.Line]) -> dict[str, Any]:
    """The stages of the newest starts, an attempt a column."""
    found = starts.starts(events)[-_MOST_STARTS:]
    names = [name for name in starts.STAGES.values() if any(name in start.stages for start in found)]
    rows = [(name, [start.stages.get(name) for start in found]) for name in names]
    return {"attempts": [start.attempt for start in found], "rows": rows, "total": [start.total_s for start in found]}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raylway", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "figure": words.figure,
        "bound": words.bound,
        "seconds": words.seconds,
        "moment": words.moment,
        "joined": words.sentence_list,
    }
    environment.globals["percent"] = words.percent
    return environment


def _result(evaluation: Evaluation, manifest: Manifest) -> dict[str, Any]:
    """Headline, tiles, comparison and confusion of an evaluation."""
    tiles = [
        {
            "label": LABELS[name],
            "value": words.figure(value),
            "reason": evaluation.undefined.get(name, ""),
            "beside": [
                f"{part.name} {words.figure(part.scores.metrics[name])}" for part in evaluation.baselines if part.scores
            ],
        }
        for name, value in evaluation.metrics.items()
    ]
    return {
        "headline": words.headline(evaluation, manifest.signature.target),
        "verdict": words.verdict(evaluation),
        "tiles": tiles,
        "comparison": words.comparison(evaluation),
        "notes": [f"{part.name.capitalize()}: {part.how}." for part in evaluation.baselines],
        "confusion": _confusion(evaluation),
        "per_class": sorted(evaluation.per_class, key=lambda scores: -scores.support)[:_MOST_LISTED],
        "classes": len(evaluation.per_class),
    }


def _confusion(evaluation: Evaluation) -> dict[str, Any]:
    """The matrix of few classes, or the most frequent mistakes among many."""
    names = [scores.name for scores in evaluation.per_class]
    if len(names) <= _MOST_CLASSES:
        rows = []
        for name, counts in zip(names, evaluation.confusion, strict=True):
            total = sum(counts)
            row = [
                {"rows": count, "share": words.percent(count, total), "depth": count / total if total else 0.0}
                for count in counts
            ]
            rows.append({"name": name, "total": total, "cells": row})
        return {"names": names, "matrix": rows, "mistakes": []}
    cells = [(n, row, column) for row, counts in enumerate(evaluation.confusion) for column, n in enumerate(counts)]
    wrong = sorted((cell for cell in cells if cell[0] and cell[1] != cell[2]), key=lambda cell: -cell[0])
    mistakes = [{"true": names[a], "answer": names[b], "rows": n} for n, a, b in wrong[:_MOST_CLASSES]]
    return {"names": names, "matrix": [], "mistakes": mistakes}


def _balance(manifest: Manifest) -> dict[str, Any]:
    """Rows of each class by split, the most frequent classes first."""
    counts = list(zip(*(manifest.classes[split] for split in SPLITS), strict=True))
    totals = [sum(column) for column in zip(*counts, strict=True)]
    rows = [
        {
            "name": name,
            "splits": [{"rows": n, "share": words.percent(n, total)} for n, total in zip(parts, totals, strict=True)],
            "depth": sum(parts) / max(1, sum(totals)),
        }
        for name, parts in zip(manifest.signature.classes, counts, strict=True)
    ]
    rows.sort(key=lambda row: -row["depth"])
    return {"rows": rows[:_MOST_LISTED], "more": max(0, len(rows) - _MOST_LISTED)}


def _columns(prepared: Prepared) -> list[dict[str, Any]]:
    """Each column as it was found, and what the training rows taught the transform about it."""
    transform = prepared.manifest.transform
    learnt = {
        each.name: f"{each.minimum:.6g} to {each.maximum:.6g}, mean {each.mean:.4g} ± {each.spread:.4g}"
        for each in transform.numeric
    }
    learnt |= {
        each.name: f"{len(each.known):,} categories, most often {each.most_frequent}"
        + (f"; {len(each.rare):,} of them rare" if each.rare else "")
        for each in transform.categorical
    }
    learnt |= {
        each.column: " to ".join(dates.text(int(end) * 1_000_000) for end in (each.minimum, each.maximum))
        for each in transform.numeric
        if each.part == "seconds"
    }
    return [
        {**column, "learnt": learnt.get(column["name"], ""), "sketch": sparks.spark(column)}
        for column in prepared.profile()
    ]


def _quarantined(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """The first ones."""
    with prepared.set_aside(QUARANTINE) as path, path.open("rb") as lines:
        yield from map(msgspec.json.decode, islice(lines, _MOST_QUARANTINED))


def _has_answers(run: Run, evaluation: Evaluation) -> bool:
    return evaluation.rows > 0 and run.predictions.exists()


def _answers(run: Run, evaluation: Evaluation | None) -> list[Figure]:
    if not evaluation or not _has_answers(run, evaluation):
        return []
    draw = figures.regression if evaluation.task == "regression" else figures.classification
    with storage.here(run.predictions) as path, reading(run.predictions):
        return draw(path, evaluation)


def _worst(run: Run, evaluation: Evaluation | None) -> list[dict[str, str]]:
    if not evaluation or not _has_answers(run, evaluation):
        return []
    with storage.here(run.predictions) as path, reading(run.predictions):
        return figures.worst(path, evaluation, _MOST_WRONG)


def _clock(record: RunRecord) -> list[dict[str, Any]]:
    """Seconds of Ray's start and of each stage that has begun, with their share of the longest."""
    times = [(name, found.status, found.elapsed_s) for name in STAGES[:-1] if (found := record.stages.get(name))]
    if times and times[0][0] == "prepare" and "ray_s" in record.stages["prepare"].facts:
        times.insert(0, ("start of Ray", "done", record.stages["prepare"].facts["ray_s"]))
    longest = max((elapsed for _, _, elapsed in times), default=0.0) or 1.0
    return [
        {"name": name, "status": status, "elapsed_s": elapsed, "share": elapsed / longest}
        for name, status, elapsed in times
    ]
