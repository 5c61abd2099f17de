"""The test rows through the bundle's own Predictor, each counted once, on any number of workers.

A row carries its id from the shard to the last table, so that the figures below, computed on all rows in the order of
their ids, are the same however the rows were divided.
"""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.evaluate import baselines, metrics
from raylway.evaluate.record import Evaluation, Scores, sentence
from raylway.features.prepared import LINE_BITS, Manifest, Prepared
from raylway.runs.progress import Reporter, Stage
from raylway.runs.run import Run
from raylway.storage import Place

BLOCK_ROWS = 200_000
"""Test rows that one task answers. A task loads the bundle, and every further process imports torch."""


class Answers(msgspec.Struct):
    """The model's answers to the test rows, sorted by row id."""

    row_id: np.ndarray
    """uint64 [N]"""
    target: np.ndarray
    """int32 [N] class codes, or float64 [N] true values."""
    output: np.ndarray
    """float32 [N, K] probabilities, or float64 [N] values."""


def evaluate(
    run: Run, prepared: Prepared, bundle: Place, reporter: Reporter, boosting: ray.ObjectRef | None = None
) -> Evaluation:
    """Score a bundle on the test rows; writes `evaluation.json` and `predictions.parquet`.

    Args:
        run: Where the results go.
        prepared: The data that the bundle was trained on.
        bundle: A bundle's folder, published or staged.
        reporter: Where progress goes.
        boosting: What `baselines.start` returned, if it was started already; else it is started here.

    Raises:
        RunFailed: The model's answers are not finite, or a row was lost or counted twice.
    """
    started = time.monotonic()
    manifest = prepared.manifest
    with reporter.stage("evaluate") as stage:
        boosting = boosting or baselines.start(prepared, run.record.seed)
        found = answers(prepared, bundle, BLOCK_ROWS, stage)
        _write_predictions(run.predictions, found, manifest)
        compared = [baselines.constant(prepared, found.target), baselines.result(boosting)]
        evaluation = Evaluation(
            **msgspec.structs.asdict(score(found, manifest)),
            task=manifest.signature.task,
            baselines=compared,
            elapsed_s=time.monotonic() - started,
        )
        storage.write_record(run.evaluation, evaluation)
        stage.finish(sentence(evaluation))
    return evaluation


def answers(prepared: Prepared, bundle: Place, block_rows: int, stage: Stage) -> Answers:
    """The bundle's answers to all test rows, whatever the size of the blocks in which they are computed.

    Args:
        prepared: The data.
        bundle: The bundle's folder; on a cluster every node must see it.
        block_rows: Rows of one task.
        stage: Shows how far it is.

    Raises:
        RunFailed: As in `evaluate`.
    """
    expected = prepared.manifest.account.test
    if len(prepared.rows("test")) != expected:
        raise RunFailed(f"{prepared.folder}: the test shards do not hold the {expected:,} rows of the account")
    pending = [
        _answered.remote(str(prepared.folder), str(bundle), start, min(start + block_rows, expected))
        for start in range(0, expected, block_rows)
    ]
    parts = [_no_rows(prepared.manifest)]
    stage.update(0, expected)
    try:
        while pending:
            (done,), pending = ray.wait(pending)
            parts.append(ray.get(done))
            stage.update(sum(len(each["row_id"]) for each in parts), expected)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | RunFailed):
            raise error.cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise RunFailed(f"evaluation: a worker died again and again while it answered test rows: {error}") from error
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(whole["row_id"], kind="stable")
    found = Answers(**{name: column[order] for name, column in whole.items()})
    _check_rows(found.row_id, expected)
    _check_finite(found, prepared.manifest)
    return found


def score(found: Answers, manifest: Manifest) -> Scores:
    """The figures of a whole set of answers."""
    if manifest.signature.task == "regression":
        return metrics.regression(found.target, found.output)
    return metrics.classification(found.target, found.output, manifest.signature.classes)


@ray.remote(num_cpus=1)
def _answered(prepared: str, bundle: str, start: int, stop: int) -> dict[str, np.ndarray]:
    """The answers to a range of the test rows."""
    from raylway.bundle.predictor import Predictor

    rows = Prepared(storage.place(prepared)).rows("test")
    numeric, categorical, target, row_id = rows.take(np.arange(start, stop))
    output = Predictor(storage.place(bundle)).forward(numeric, categorical)
    return {"row_id": row_id, "target": target, "output": output}


def _no_rows(manifest: Manifest) -> dict[str, np.ndarray]:
    classes = len(manifest.signature.classes)
    return {
        "row_id": np.zeros(0, np.uint64),
        "target": np.zeros(0, np.int32 if classes else np.float64),
        "output": np.zeros((0, classes), np.float32) if classes else np.zeros(0),
    }


def _check_rows(row_id: np.ndarray, expected: int) -> None:
    """Every test row once: as many as the row account has, and no two alike."""
    twice = int((row_id[1:] == row_id[:-1]).sum())
    if len(row_id) != expected or twice:
        raise RunFailed(
            f"evaluation: expected each of the {expected:,} test rows once; found {len(row_id):,} answers, "
            f"{twice:,} of them to a row that had one already"
        )


def _check_finite(found: Answers, manifest: Manifest) -> None:
    finite = np.isfinite(found.output)
    bad = ~(finite if finite.ndim == 1 else finite.all(axis=1))
    if bad.any():
        row_id = int(found.row_id[bad.argmax()])
        where = f"{manifest.files[row_id >> LINE_BITS]}:{row_id & (1 << LINE_BITS) - 1}"
        raise RunFailed(
            f"evaluation: the model's answer to {int(bad.sum()):,} of {len(bad):,} test rows is not a finite number, "
            f"first for the row at {where}; train with a smaller learning rate or with gradient clipping"
        )


def _write_predictions(place: Place, found: Answers, manifest: Manifest) -> None:
    """One line a test row: row_id, file, line, target, prediction, and p_<class> for each class."""
    files = pa.array(manifest.files, pa.string())
    columns: dict[str, pa.Array] = {
        "row_id": pa.array(found.row_id),
        "file": files.take(pa.array(found.row_id >> np.uint64(LINE_BITS))),
        "line": pa.array(found.row_id & np.uint64((1 << LINE_BITS) - 1)),
    }
    if classes := manifest.signature.classes:
        names = pa.array(classes, pa.string())
        columns["target"] = names.take(pa.array(found.target))
        columns["prediction"] = names.take(pa.array(found.output.argmax(axis=1)))
        columns |= {f"p_{name}": pa.array(found.output[:, code]) for code, name in enumerate(classes)}
    else:
        columns |= {"target": pa.array(found.target), "prediction": pa.array(found.output)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    storage.write_bytes(place, sink.getvalue().to_pybytes())
