"""`evaluation.json` as types: what evaluation writes, and what the report and the bundle read. Imports no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from msgspec import Struct, field

from raylway.errors import UserError
from raylway.features.signature import Task
from raylway.storage import Place

FORMAT = 1
CLASSIFICATION = ("accuracy", "f1_weighted", "f1_macro", "roc_auc", "log_loss")
REGRESSION = ("rmse", "mae", "r2")
LOWER_IS_BETTER = frozenset({"log_loss", "rmse", "mae"})
"""Metrics of which a smaller one is better; of all others a larger one is."""
LABELS = {
    "accuracy": "accuracy",
    "f1_weighted": "F1 (weighted)",
    "f1_macro": "F1 (macro)",
    "roc_auc": "ROC-AUC",
    "log_loss": "log loss",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
}


class ClassScores(Struct, forbid_unknown_fields=True):
    """One class against all others."""

    name: str
    precision: float
    recall: float
    f1: float
    """0 when the class was neither there nor answered, as in scikit-learn with `zero_division=0`."""
    roc_auc: float | None
    """None when no row, or every row, is of this class."""
    support: int
    """Test rows of this class."""


class Scores(Struct, forbid_unknown_fields=True):
    """What came out of one set of answers to the test rows."""

    rows: int
    metrics: dict[str, float | None]
    """By the names in `CLASSIFICATION` or `REGRESSION`; None where `undefined` has the reason."""
    undefined: dict[str, str] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)
    """Row: true class; column: answer; both in the order of the classes."""
    per_class: list[ClassScores] = field(default_factory=list)


class Baseline(Struct, forbid_unknown_fields=True):
    """One baseline and its figures on the test rows."""

    name: str
    how: str
    """What was done, in a sentence for the reader of the report."""
    scores: Scores | None
    """None when it could not be computed; `how` then says why."""
    elapsed_s: float = 0.0


class Evaluation(Scores, forbid_unknown_fields=True, kw_only=True):
    """`evaluation.json`: the scores of the model, and what they have to be compared with."""

    format: int = FORMAT
    task: Task
    baselines: list[Baseline]
    elapsed_s: float


def sentence(evaluation: Evaluation) -> str:
    """The result in a line: the figures that people ask for first, each beside those of the baselines."""
    if not evaluation.rows:
        return "the test split has no rows, so there is nothing to measure; data.split.test sets its share"
    first = ("accuracy", "f1_weighted", "roc_auc") if evaluation.task == "classification" else ("rmse", "r2")
    names = [name for name in first if evaluation.metrics[name] is not None]
    parts = []
    for name in names:
        beside = [
            f"{baseline.name} {value:.4g}"
            for baseline in evaluation.baselines
            if baseline.scores and (value := baseline.scores.metrics[name]) is not None
        ]
        parts.append(f"{LABELS[name]} {evaluation.metrics[name]:.4g} ({', '.join(beside)})")
    return f"{evaluation.rows:,} test rows: " + "; ".join(parts)


@contextmanager
def reading(predictions: Place) -> Iterator[None]:
    """Around a look at a run's answers.

    Raises:
        UserError: The file is damaged.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            "the run's answers are damaged",
            where=str(predictions),
            expected="the file that evaluation wrote",
            found=str(error),
            fix="remove the run's folder, and run the job again",
        ) from None
