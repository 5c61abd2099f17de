"""The figures of a whole test set, computed by scikit-learn over all rows at once.

An average of the figures of batches or workers is another number (F1, ROC-AUC and RMSE are not means over rows), so the
answers are gathered first, in the order of the row ids, and nothing here can see how many batches they came in.
"""

from __future__ import annotations

import numpy as np
from sklearn import metrics as sk

from raylway.evaluate.record import CLASSIFICATION, REGRESSION, ClassScores, Scores


def classification(target: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> Scores:
    """Figures of a classifier; the answer to a row is its most probable class, the first of equals.

    F1 is averaged over the classes that occur in the test rows or in the answers, which is scikit-learn's default.
    ROC-AUC is that of the second of two classes, or the plain mean of one class against the rest.

    Args:
        target: int [N] class codes.
        probabilities: float [N, K]; each row adds up to 1.
        classes: K names, at least two, in the order of the codes.
    """
    if not len(target):
        return _of_no_rows(CLASSIFICATION)
    codes = np.arange(len(classes))
    answer = probabilities.argmax(axis=1)
    areas = [_area(target == code, probabilities[:, code]) for code in codes]
    roc_auc, undefined = _whole_area(areas, target, classes)
    values = {
        "accuracy": float(sk.accuracy_score(target, answer)),
        "f1_weighted": float(sk.f1_score(target, answer, average="weighted", zero_division=0)),
        "f1_macro": float(sk.f1_score(target, answer, average="macro", zero_division=0)),
        "roc_auc": roc_auc,
        "log_loss": float(sk.log_loss(target, probabilities, labels=codes)),
    }
    columns = sk.precision_recall_fscore_support(target, answer, labels=codes, zero_division=0)
    per_class = [
        ClassScores(name, float(precision), float(recall), float(f1), area, int(support))
        for name, area, precision, recall, f1, support in zip(classes, areas, *columns, strict=True)
    ]
    confusion = sk.confusion_matrix(target, answer, labels=codes).tolist()
    return Scores(len(target), values, undefined, confusion, per_class)


def regression(target: np.ndarray, values: np.ndarray) -> Scores:
    """Figures of a regressor.

    Args:
        target: float64 [N] true values.
        values: float64 [N] answers, in the unit of the target.
    """
    if not len(target):
        return _of_no_rows(REGRESSION)
    with np.errstate(over="ignore", invalid="ignore"):
        computed = {
            "rmse": float(sk.root_mean_squared_error(target, values)),
            "mae": float(sk.mean_absolute_error(target, values)),
            "r2": float(sk.r2_score(target, values)) if np.ptp(target) > 0 else None,
        }
    found = {name: value if value is None or np.isfinite(value) else None for name, value in computed.items()}
    undefined = {name: "too large for a 64-bit number" for name, value in found.items() if value is None}
    if computed["r2"] is None:
        undefined["r2"] = "the target has one value only in the test rows"
    return Scores(len(target), found, undefined)


def _area(is_class: np.ndarray, score: np.ndarray) -> float | None:
    if is_class.all() or not is_class.any():
        return None
    return float(sk.roc_auc_score(is_class, score))


def _whole_area(
    areas: list[float | None], target: np.ndarray, classes: list[str]
) -> tuple[float | None, dict[str, str]]:
    known = [area for area in areas if area is not None]
    if len(known) < len(areas):
        absent = [
            name for name, rows in zip(classes, np.bincount(target, minlength=len(classes)), strict=True) if not rows
        ]
        listed = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        return None, {"roc_auc": f"no test row is of the class {listed}"}
    return (known[1] if len(known) == 2 else float(np.mean(known))), {}


def _of_no_rows(names: tuple[str, ...]) -> Scores:
    return Scores(0, dict.fromkeys(names), dict.fromkeys(names, "the test split has no rows"))
