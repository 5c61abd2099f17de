"""Evaluation counts every row once and gives scikit-learn's figures of the whole set, however the rows are divided."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import made_prepared
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import Made, made
from sklearn import metrics as sk
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from raylway import storage
from raylway.errors import RunFailed
from raylway.evaluate import baselines, evaluate, metrics
from raylway.evaluate.record import Evaluation
from raylway.features.prepared import MANIFEST, Prepared
from raylway.runs.progress import Reporter
from raylway.runs.run import Run

QUIET = Reporter("lines", io.StringIO())


def every(prepared: Prepared, split: str) -> tuple[np.ndarray, ...]:
    rows = prepared.rows(split)  # type: ignore[arg-type]
    return rows.take(np.arange(len(rows)))


def staged(folder: Path, prepared: Prepared, model: Made) -> Run:
    """A run that holds the model as its staged bundle."""
    run = made_prepared.make_run(folder, prepared)
    model.stage(run.staged_bundle)
    return run


def follower(steps: int = 300) -> Made:
    """A model of `rule`, fitted by a plain torch loop."""
    return made(rule(200, 3), "label", {"x": "number"}, steps=steps)


def rule(count: int, seed: int) -> pa.Table:
    """`pos` when x > 0; x is never between -1 and 1."""
    source = random.Random(seed)
    signs = [1 if index % 2 else -1 for index in range(count)]
    return pa.table(
        {
            "x": [source.uniform(1, 3) * sign for sign in signs],
            "label": ["pos" if sign > 0 else "neg" for sign in signs],
        }
    )


def padded(folder: Path) -> Prepared:
    """Five test rows that no 2, 3 or 4 workers share evenly; the first is labelled against the rule."""
    test = pa.table({"x": [2.0, 1.5, -1.5, 2.5, -2.5], "label": ["neg", "pos", "neg", "pos", "neg"]})
    return made_prepared.make(folder, {"train": rule(200, 3), "validation": rule(10, 4), "test": test}, "label")


def test_every_row_counts_once_for_any_number_of_blocks(ray_session: None, tmp_path: Path) -> None:
    prepared = padded(tmp_path / "prepared")
    run = staged(tmp_path, prepared, follower())
    with QUIET.stage("evaluate") as stage:
        found = {size: evaluate.answers(prepared, run.staged_bundle, size, stage) for size in (64, 5, 3, 2, 1)}
    for answers in found.values():
        np.testing.assert_array_equal(answers.row_id, every(prepared, "test")[3])
        np.testing.assert_array_equal(answers.output, found[64].output)
        scores = evaluate.score(answers, prepared.manifest)
        positive = scores.per_class[1]
        assert (scores.rows, positive.name) == (5, "pos")
        assert scores.metrics["accuracy"] == pytest.approx(0.8)
        assert scores.metrics["f1_macro"] == pytest.approx(0.8)
        assert (positive.precision, positive.recall, positive.f1) == pytest.approx((2 / 3, 1.0, 0.8))
        assert scores.confusion == [[2, 1], [0, 2]]


def test_f1_is_that_of_the_whole_set(ray_session: None, tmp_path: Path) -> None:
    truth, answer = "yyynnnnnnnnnynnnnnyyyyyn", "yynnnynnnnnnnnnnnyyyyyyy"
    words = {"y": "yes", "n": "no"}
    train = pa.table({"hint": ["says-yes", "says-no"] * 60, "truth": ["yes", "no"] * 60})
    test = pa.table({"hint": [f"says-{words[a]}" for a in answer], "truth": [words[t] for t in truth]})
    prepared = made_prepared.make(
        tmp_path / "p", {"train": train, "validation": train.slice(0, 2), "test": test}, "truth"
    )
    run = staged(tmp_path, prepared, made(train, "truth", {"hint": "category"}))
    for size in (24, 6):
        with QUIET.stage("evaluate") as stage:
            scores = evaluate.score(evaluate.answers(prepared, run.staged_bundle, size, stage), prepared.manifest)
        assert scores.metrics["accuracy"] == pytest.approx(19 / 24)
        assert scores.per_class[1].f1 == pytest.approx(0.736842, abs=1e-6)
        assert scores.metrics["f1_macro"] == pytest.approx(0.782214, abs=1e-6)


def test_evaluation_of_a_regression(ray_session: None, tmp_path: Path) -> None:
    source = np.random.default_rng(0)

    def table(count: int) -> pa.Table:
        x = source.standard_normal(count)
        return pa.table({"x": x, "price": 500 + 30 * x + source.standard_normal(count)})

    splits = {"train": table(300), "validation": table(50), "test": table(250)}
    prepared = made_prepared.make(tmp_path / "prepared", splits, "price")
    prepared.manifest.shards.reverse()  # the order of the shards is not that of the row ids
    storage.write_record(prepared.folder / MANIFEST, prepared.manifest)
    model = made(splits["train"], "price", {"x": "number"})
    run = staged(tmp_path, prepared, model)
    found = evaluate.evaluate(run, prepared, run.staged_bundle, QUIET)
    order = np.argsort(every(prepared, "test")[3])
    numeric, categorical, target, row_id = (column[order] for column in every(prepared, "test"))
    with torch.no_grad():
        output = model.model(torch.from_numpy(numeric), torch.from_numpy(categorical).long()).reshape(-1).double()
    fitted = prepared.manifest.transform.target
    plain = output.numpy() * fitted.spread + fitted.mean
    assert found.metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(target, plain), rel=1e-5)
    assert found.metrics["mae"] == pytest.approx(sk.mean_absolute_error(target, plain), rel=1e-5)
    assert found.metrics["r2"] == pytest.approx(sk.r2_score(target, plain), rel=1e-5)
    answers = pq.read_table(run.predictions).to_pandas()
    assert list(answers) == ["row_id", "file", "line", "target", "prediction"]
    np.testing.assert_array_equal(answers["row_id"], row_id)
    np.testing.assert_array_equal(answers["target"], target)
    np.testing.assert_allclose(answers["prediction"], plain, rtol=1e-5)
    assert found.metrics["rmse"] == sk.root_mean_squared_error(answers["target"], answers["prediction"])
    mean = DummyRegressor().fit(np.zeros((300, 1)), every(prepared, "train")[2])
    expected = sk.root_mean_squared_error(target, mean.predict(np.zeros((250, 1))))
    assert found.baselines[0].name == "mean"
    assert found.baselines[0].scores is not None
    assert found.baselines[0].scores.metrics["rmse"] == pytest.approx(expected)


def test_evaluation_writes_what_it_found(ray_session: None, tmp_path: Path) -> None:
    prepared = padded(tmp_path / "prepared")
    run = staged(tmp_path, prepared, follower())
    shown = io.StringIO()
    handle = baselines.start(prepared, 7)
    found = evaluate.evaluate(run, prepared, run.staged_bundle, Reporter("lines", shown), handle)
    assert storage.read_record(run.evaluation, Evaluation) == found
    assert json.loads(run.evaluation.read_text())["metrics"]["accuracy"] == pytest.approx(0.8)
    assert "5 test rows: accuracy 0.8" in shown.getvalue()
    assert "accuracy 0.8 (majority class 0.6, gradient boosting 0.8)" in shown.getvalue()
    answers = pq.read_table(run.predictions).to_pandas()
    assert list(answers) == ["row_id", "file", "line", "target", "prediction", "p_neg", "p_pos"]
    assert list(answers["line"]) == list(answers["row_id"]) == list(every(prepared, "test")[3])
    assert set(answers["file"]) == {"rows.csv"}
    assert list(answers["target"]) == ["neg", "pos", "neg", "pos", "neg"]
    assert list(answers["prediction"]) == ["pos", "pos", "neg", "pos", "neg"]
    np.testing.assert_allclose(answers["p_neg"] + answers["p_pos"], 1, rtol=1e-6)


def test_no_test_rows_is_said_and_is_no_failure(ray_session: None, tmp_path: Path) -> None:
    nothing = rule(0, 0).cast(rule(1, 0).schema)
    tables = {"train": rule(20, 3), "validation": rule(4, 4), "test": nothing}
    prepared = made_prepared.make(tmp_path / "prepared", tables, "label")
    run = staged(tmp_path, prepared, follower(steps=1))
    shown = io.StringIO()
    found = evaluate.evaluate(run, prepared, run.staged_bundle, Reporter("lines", shown))
    assert found.rows == 0
    assert set(found.metrics.values()) == {None}
    assert found.undefined["accuracy"] == "the test split has no rows"
    assert "the test split has no rows" in shown.getvalue()
    assert pq.read_table(run.predictions).num_rows == 0


def test_an_answer_that_is_not_finite_fails_the_run(ray_session: None, tmp_path: Path) -> None:
    test = pa.table({"x": [1.0, 1e9], "label": ["pos", "neg"]})
    prepared = made_prepared.make(
        tmp_path / "prepared", {"train": rule(20, 3), "validation": rule(4, 4), "test": test}, "label"
    )
    model = follower(steps=1)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.copy_(torch.sign(parameter) * 1e17)  # finite for usual rows, too large for the last one
    run = staged(tmp_path, prepared, model)
    with pytest.raises(RunFailed, match=r"1 of 2 test rows is not a finite number.*rows.csv:27"):
        evaluate.evaluate(run, prepared, run.staged_bundle, QUIET)
    assert not run.evaluation.exists()


@pytest.mark.parametrize("fault", ["twice", "lost"])
def test_a_row_lost_or_counted_twice_fails_the_run(ray_session: None, tmp_path: Path, fault: str) -> None:
    prepared = padded(tmp_path / "prepared")
    run = staged(tmp_path, prepared, follower(steps=1))
    record = json.loads((prepared.folder / MANIFEST).read_text())
    if fault == "lost":
        record["account"]["test"] += 1
    else:
        record["account"]["test"] *= 2
        record["shards"] += [shard for shard in record["shards"] if shard["split"] == "test"]
    (prepared.folder / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(RunFailed, match="5 of them to a row that had one" if fault == "twice" else "do not hold the 6"):
        evaluate.evaluate(run, Prepared(prepared.folder), run.staged_bundle, QUIET)


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_classification_is_scikit_learns_over_all_rows(classes: int, count: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    target = source.integers(0, classes, count).astype(np.int32)
    probabilities = source.dirichlet(np.ones(classes), count).astype(np.float32)
    if seed % 3 == 0:
        probabilities = np.round(probabilities * 4) / 4  # ties
        probabilities[probabilities.sum(axis=1) == 0] = 1
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    answer = probabilities.argmax(axis=1)
    found = metrics.classification(target, probabilities, [f"c{code}" for code in range(classes)])
    assert found.metrics["accuracy"] == sk.accuracy_score(target, answer)
    for average in ("weighted", "macro"):
        expected = sk.f1_score(target, answer, average=average, zero_division=0)
        assert found.metrics[f"f1_{average}"] == pytest.approx(expected)
    assert found.metrics["log_loss"] == pytest.approx(sk.log_loss(target, probabilities, labels=range(classes)))
    if len(set(target)) < classes:
        absent = next(f"c{code}" for code in range(classes) if code not in target)
        assert found.metrics["roc_auc"] is None
        assert absent in found.undefined["roc_auc"]
    else:
        score = probabilities[:, 1] if classes == 2 else probabilities
        assert found.metrics["roc_auc"] == pytest.approx(sk.roc_auc_score(target, score, multi_class="ovr"))
    assert found.confusion == sk.confusion_matrix(target, answer, labels=range(classes)).tolist()
    assert sum(map(sum, found.confusion)) == sum(each.support for each in found.per_class) == count


def test_f1_ignores_only_classes_that_never_occur() -> None:
    target, answer = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    found = metrics.classification(target, np.eye(3)[answer], ["a", "b", "never"])
    assert found.metrics["f1_macro"] == pytest.approx(sk.f1_score(target, answer, average="macro"))
    assert [each.support for each in found.per_class] == [2, 2, 0]
    assert found.per_class[2].f1 == 0
    assert "never" in found.undefined["roc_auc"]


def test_regression_without_spread_or_beyond_all_numbers() -> None:
    assert metrics.regression(np.array([2.0, 2.0]), np.array([1.0, 3.0])).metrics["r2"] is None
    found = metrics.regression(np.array([1e200, -1e200]), np.array([-1e200, 1e200]))
    assert found.metrics["rmse"] is None
    assert "too large" in found.undefined["rmse"]
    assert found.metrics["mae"] == pytest.approx(2e200)


def many_columns(count: int, seed: int) -> pa.Table:
    """Two numbers, a category of few values and one of too many for boosting, and an answer that needs all."""
    source = np.random.default_rng(seed)
    few, many = source.integers(0, 4, count), source.integers(0, 300, count)
    x, y = source.standard_normal(count), source.standard_normal(count)
    score = x + (few == 2) + source.standard_normal(count) / 4
    names = np.array(["low", "middle", "high"])[np.digitize(score, [-0.5, 0.8])]
    return pa.table(
        {"x": x, "y": y, "few": [f"f{n}" for n in few], "many": [f"m{n:03d}" for n in many], "answer": list(names)}
    )


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_boosting_is_scikit_learns_on_the_same_rows(tmp_path: Path, task: str) -> None:
    tables = {split: many_columns(count, count) for split, count in (("train", 900), ("validation", 90), ("test", 210))}
    target = "answer"
    if task == "regression":
        tables = {split: table.drop(["answer"]) for split, table in tables.items()}
        target = "y"
    prepared = made_prepared.make(tmp_path / "prepared", tables, target)
    found = baselines.boosting(str(prepared.folder), 7)
    (features, codes, train, _), (held, held_codes, validation, _), (test, test_codes, truth, _) = (
        every(prepared, split) for split in ("train", "validation", "test")
    )
    kind = HistGradientBoostingClassifier if task == "classification" else HistGradientBoostingRegressor
    model = kind(
        max_iter=200,
        early_stopping=True,
        n_iter_no_change=20,
        categorical_features=[*[False] * features.shape[1], True, False],
        random_state=7,
    )
    model.fit(np.hstack([features, codes]), train, X_val=np.hstack([held, held_codes]), y_val=validation)
    assert found.scores is not None
    assert found.scores.rows == 210
    if task == "classification":
        answer = model.predict(np.hstack([test, test_codes]))
        assert found.scores.metrics["accuracy"] == pytest.approx(sk.accuracy_score(truth, answer))
        assert found.scores.metrics["accuracy"] > 0.7
    else:
        expected = sk.root_mean_squared_error(truth, model.predict(np.hstack([test, test_codes])))
        assert found.scores.metrics["rmse"] == pytest.approx(expected)
    assert f"{model.n_iter_} rounds" in found.how


@pytest.mark.parametrize("categories", [253, 254, 255, 300])
def test_boosting_takes_any_number_of_categories(tmp_path: Path, categories: int) -> None:
    names = [f"c{number:03d}" for number in range(categories)]
    table = pa.table({"name": names * 2, "answer": ["yes", "no"] * categories})
    prepared = made_prepared.make(
        tmp_path / "prepared", {"train": table, "validation": table.slice(0, 9), "test": table.slice(5, 9)}, "answer"
    )
    assert baselines.boosting(str(prepared.folder), 1).scores is not None


def test_boosting_without_validation_or_with_classes_it_never_saw(tmp_path: Path) -> None:
    train = pa.table({"x": [0.0, 1.0] * 20, "answer": ["a", "b"] * 20})
    strange = pa.table({"x": [0.0, 1.0, 2.0], "answer": ["a", "b", "c"]})
    for validation in (strange, strange.slice(0, 0)):
        prepared = made_prepared.make(
            tmp_path / str(validation.num_rows), {"train": train, "validation": validation, "test": strange}, "answer"
        )
        scores = baselines.boosting(str(prepared.folder), 1).scores
        assert scores is not None
        assert scores.rows == 3


def test_boosting_says_when_it_saw_only_some_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = made_prepared.make(
        tmp_path / "prepared", {"train": rule(200, 1), "validation": rule(20, 2), "test": rule(20, 3)}, "label"
    )
    monkeypatch.setattr(baselines, "_MOST_ROWS", 120)
    found = baselines.boosting(str(prepared.folder), 1)
    assert "fitted on 120 of the 200 training rows" in found.how
    assert found.scores == baselines.boosting(str(prepared.folder), 1).scores


def test_a_baseline_that_breaks_is_told_and_not_raised(ray_session: None) -> None:
    import ray

    @ray.remote
    def broken() -> None:
        raise MemoryError("no room")

    found = baselines.result(broken.remote())
    assert found.scores is None
    assert "could not be computed: MemoryError: no room" in found.how


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(lambda counts: sum(counts) > 0))
def test_the_majority_baseline_is_scikit_learns_dummy(counts: list[int]) -> None:
    import tempfile

    labels = [name for name, count in zip("abc", counts, strict=True) for _ in range(count)]
    test = pa.table({"x": [0.0] * 6, "answer": list("abcabc")})
    with tempfile.TemporaryDirectory() as folder:
        train = pa.table({"x": pa.array([0.0] * len(labels)), "answer": labels})
        prepared = made_prepared.make(Path(folder), {"train": train, "validation": test, "test": test}, "answer")
        target = every(prepared, "test")[2]
        found = baselines.constant(prepared, target).scores
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((len(labels), 1)), labels)
    answer = dummy.predict(np.zeros((6, 1)))
    assert found is not None
    assert found.metrics["accuracy"] == pytest.approx(sk.accuracy_score(list("abcabc"), answer))
    shares = np.zeros((6, 3))
    shares[:, ["abc".index(name) for name in dummy.classes_]] = dummy.predict_proba(np.zeros((6, 1)))
    assert found.metrics["log_loss"] == pytest.approx(sk.log_loss(list("abcabc"), shares, labels=list("abc")))


def test_the_record_reads_back_without_ray(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, raylway.evaluate.record, raylway.report.report; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
