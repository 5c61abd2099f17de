"""What the model has to beat: an answer that ignores the features, and scikit-learn's histogram gradient boosting.

Boosting sees the encoded training rows of the model, stops early on the same validation rows, and answers the same test
rows. It runs as one Ray task, so it can be started before training and collected after evaluation.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import ray

from raylway import storage
from raylway.evaluate import metrics
from raylway.evaluate.record import Baseline
from raylway.features.prepared import Prepared, Rows, SplitName
from raylway.features.transform import Transform

_MOST_ROWS = 500_000
_MOST_CELLS = 100_000_000
"""Rows x features that boosting is fitted on; scikit-learn holds them as float64, so this is 0.8 GB."""
_MOST_ROUNDS, _FEWEST_ROUNDS, _PATIENCE = 200, 20, 20
_MOST_WORK = 2e9
"""Steps of about 4 ns on one core (measured): a round visits every row about three times a feature, and every bin of
every node once. Where that leaves fewer than the most rounds, each step is three times as long."""
_BINS, _NODES = 255, 61
_CHUNK = 100_000


def constant(prepared: Prepared, target: np.ndarray) -> Baseline:
    """The most frequent class with the classes' shares as probabilities, or the mean; both of the training rows.

    Args:
        prepared: The data.
        target: The test rows' targets, [N].
    """
    manifest = prepared.manifest
    if manifest.signature.task == "regression":
        mean = manifest.transform.target.mean
        scores = metrics.regression(target, np.full(len(target), mean))
        return Baseline("mean", f"always the mean of the training rows, {mean:.6g}", scores)
    counts = np.array(manifest.classes["train"], np.float64)
    classes = manifest.signature.classes
    shares = np.broadcast_to(counts / counts.sum(), (len(target), len(classes)))
    how = f"always {classes[int(counts.argmax())]!r}, the most frequent class of the training rows"
    return Baseline("majority class", how, metrics.classification(target, shares, classes))


def start(prepared: Prepared, seed: int) -> ray.ObjectRef:
    """Start boosting beside whatever else runs; returns at once. Hand the result to `result`.

    It claims no CPU, so that training workers that need all of them need not wait for it, and takes only the time that
    others leave. A task that dies is not tried again: where it needs too much memory it would take the next try's
    neighbours along.
    """
    # max_calls: the process ends with the task, for its priority could not be raised again.
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(_with_least_priority)
    return task.remote(str(prepared.folder), seed)


def result(handle: ray.ObjectRef) -> Baseline:
    """Wait for what `start` started.

    Whatever stopped it is told in the baseline's place and not raised: a yardstick that breaks says nothing against
    the model.
    """
    try:
        return ray.get(handle)
    except ray.exceptions.RayError as error:
        last_line = str(error).strip().rsplit("\n", 1)[-1]
        return Baseline("gradient boosting", f"could not be computed: {last_line}", None)


def _with_least_priority(folder: str, seed: int) -> Baseline:
    os.nice(19)
    return boosting(folder, seed)


def boosting(folder: str, seed: int) -> Baseline:
    """Fit histogram gradient boosting on a prepared folder and score it on the test rows."""
    started = time.monotonic()
    prepared = Prepared(storage.place(folder))
    task, classes = prepared.manifest.signature.task, prepared.manifest.signature.classes
    if not prepared.manifest.account.test:
        return Baseline("gradient boosting", "not fitted: the test split has no rows", None)
    features, target = _sample(prepared, "train", seed)
    validation = _sample(prepared, "validation", seed)
    if task == "classification":
        known = np.isin(validation[1], target)
        validation = validation[0][known], validation[1][known]
    rounds = _rounds(len(target), features.shape[1], len(classes) if len(classes) > 2 else 1)
    model = _model(prepared, rounds, seed, stop_early=len(validation[1]) > 0)
    held_out = {"X_val": validation[0], "y_val": validation[1]} if len(validation[1]) else {}
    model.fit(features, target, **held_out)
    answers, truth = _answers(model, prepared)
    if task == "classification":
        scores = metrics.classification(truth, answers, classes)
    else:
        scores = metrics.regression(truth, answers)
    how = f"scikit-learn's histogram gradient boosting, {model.n_iter_} rounds on the same encoded rows"
    if rounds < _MOST_ROUNDS:
        how += f" (capped at {rounds} to bound its time)"
    total = prepared.manifest.account.train
    if len(target) < total:
        how += f", fitted on {len(target):,} of the {total:,} training rows, drawn with the job's seed"
    return Baseline("gradient boosting", how, scores, time.monotonic() - started)


def _sample(prepared: Prepared, split: SplitName, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n, F] and targets [n] of a split, or of as many of its rows as boosting is given."""
    rows = prepared.rows(split)
    if not len(rows):
        return np.zeros((0, 0), np.float32), np.zeros(0)
    width = max(1, len(_categorical(prepared.manifest.transform)))
    most = min(_MOST_ROWS, _MOST_CELLS // width)
    if len(rows) <= most:
        positions = np.arange(len(rows))
    else:
        positions = np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False, shuffle=False))
    numeric, categorical, target, _ = rows.take(positions)
    return _features(prepared.manifest.transform, numeric, categorical), target


def _features(transform: Transform, numeric: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    """What boosting takes for the rows, float32 [n, F]: the bins of a number are their sum, which orders rows as the
    number does, and to a tree nothing else matters."""
    starts = transform.number_starts
    numbers = np.add.reduceat(numeric, starts, axis=1) if starts else numeric
    return np.hstack([numbers, categorical.astype(np.float32)])


def _categorical(transform: Transform) -> list[bool]:
    """Which of the features are categories. They may have 255 codes, unknown among them; wider ones are taken as
    ordered numbers."""
    return [False] * len(transform.number_starts) + [count < _BINS for count in transform.category_counts]


def _rounds(rows: int, features: int, outputs: int) -> int:
    work = outputs * features * (3 * rows + _BINS * _NODES)
    return int(np.clip(_MOST_WORK / max(1, work), _FEWEST_ROUNDS, _MOST_ROUNDS))


def _model(prepared: Prepared, rounds: int, seed: int, stop_early: bool) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = (
        HistGradientBoostingRegressor
        if prepared.manifest.signature.task == "regression"
        else HistGradientBoostingClassifier
    )
    return kind(
        max_iter=rounds,
        learning_rate=0.1 if rounds == _MOST_ROUNDS else 0.3,
        early_stopping=stop_early,
        n_iter_no_change=_PATIENCE,
        categorical_features=_categorical(prepared.manifest.transform),
        random_state=seed,
    )


def _answers(model: Any, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, K] or values [N], and targets [N], of the test rows."""
    rows: Rows = prepared.rows("test")
    classes = prepared.manifest.signature.classes
    answers = np.zeros((len(rows), len(classes)) if classes else len(rows), np.float64)
    targets = np.zeros(len(rows), np.int32 if classes else np.float64)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(rows)))
        numeric, categorical, targets[part], _ = rows.take(np.arange(part.start, part.stop))
        features = _features(prepared.manifest.transform, numeric, categorical)
        if classes:
            answers[part, model.classes_] = model.predict_proba(features)
        else:
            answers[part] = model.predict(features)
    return answers, targets
