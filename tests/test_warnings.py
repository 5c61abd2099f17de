"""What ruins models is named, and ordinary data is left in peace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn import datasets

from raylway.data import describe, sources
from raylway.data.split import TEST, TRAIN
from raylway.data.warnings import Subject, find
from raylway.job.load import load_job

ROWS = 600


def warned(folder: Path, frame: pd.DataFrame, data: dict[str, Any] | None = None, **top: Any) -> list[str]:
    """The warnings of `raylway check` for a job over a table with the target `answer`."""
    frame.to_csv(folder / "rows.csv", index=False)
    path = folder / "job.yaml"
    path.write_text(
        json.dumps({"name": "made", "data": {"source": "rows.csv", "target": "answer", **(data or {})}, **top})
    )
    return sources.sample(load_job(path)).warnings


def ordinary() -> pd.DataFrame:
    rng = np.random.default_rng(11)
    frame = pd.DataFrame({"x": rng.normal(size=ROWS).round(3), "n": rng.integers(0, 40, ROWS)})
    frame["colour"] = rng.choice(["red", "green", "blue"], ROWS)
    frame["answer"] = np.where(frame.x + rng.normal(size=ROWS) > 0, "yes", "no")
    return frame


def measured() -> pd.DataFrame:
    frame = ordinary()
    frame["answer"] = frame.x * 3 + np.random.default_rng(2).normal(size=ROWS)
    return frame


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer", "diabetes", "digits"])
def test_the_well_known_tables_are_left_in_peace(tmp_path: Path, name: str) -> None:
    bunch = getattr(datasets, f"load_{name}")(as_frame=True)
    frame = bunch.frame.rename(columns={"target": "answer"})
    constant = {f"column {column!r} is constant" for column in frame if frame[column].nunique() == 1}
    found = warned(tmp_path, frame)
    assert {sentence.partition(":")[0] for sentence in found} == constant


def test_ordinary_rows_of_both_tasks_are_left_in_peace(tmp_path: Path) -> None:
    assert warned(tmp_path, ordinary()) == []
    assert warned(tmp_path, measured()) == []


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("customer_id", lambda rng: rng.permutation(10**6)[:ROWS], "named like an identifier"),
        ("userId", lambda rng: rng.permutation(10**6)[:ROWS], "named like an identifier"),
        ("orderid", lambda rng: rng.permutation(10**6)[:ROWS], "named like an identifier"),
        ("id", lambda rng: np.concatenate([np.arange(ROWS - 10), np.arange(10)]), "different in nearly every row"),
        ("row", lambda rng: rng.permutation(ROWS) + 100, "follow one another like a counter"),
    ],
)
def test_an_identifier_is_named(tmp_path: Path, name: str, values: Any, why: str) -> None:
    frame = ordinary()
    frame.insert(0, name, values(np.random.default_rng(0)))
    (sentence,) = warned(tmp_path, frame)
    reported = sources.sample(load_job(tmp_path / "job.yaml")).columns[0]
    assert reported.role == "identifier" and why in reported.why
    assert sentence.startswith(f"column {name!r} looks like an identifier and is used as a feature: ")
    assert why in sentence and "data.features.drop" in sentence


@pytest.mark.parametrize("name", ["paid", "grid", "valid", "rapid", "price", "index_of_refraction", "monkey"])
def test_whole_numbers_that_differ_in_every_row_are_no_identifier_by_themselves(tmp_path: Path, name: str) -> None:
    frame = ordinary()
    frame[name] = np.random.default_rng(3).permutation(10**6)[:ROWS]
    assert not any("identifier" in sentence for sentence in warned(tmp_path, frame))


def test_a_measurement_that_happens_to_differ_in_every_row_is_no_identifier(tmp_path: Path) -> None:
    frame = ordinary()
    frame["price"] = np.random.default_rng(0).permutation(10**6)[:ROWS]
    frame["valid"] = np.random.default_rng(0).normal(size=ROWS)
    assert warned(tmp_path, frame) == []


def test_a_category_of_single_rows_is_named(tmp_path: Path) -> None:
    frame = ordinary()
    frame["name"] = [f"n{index}" for index in range(ROWS)]
    (sentence,) = warned(tmp_path, frame, {"features": {"categorical": ["name"]}})
    assert sentence.startswith(
        "column 'name' is used as a category although most of its 600 values stand in one row only"
    )


def test_a_column_that_holds_the_answer_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frame = ordinary()
    frame["code"] = np.where(frame.answer == "yes", 7.5, 2.25) + rng.normal(size=ROWS) * 0.01
    frame["word"] = np.where(frame.answer == "yes", "ja", "nein")
    found = warned(tmp_path, frame)
    assert [sentence.partition(":")[0] for sentence in found] == [
        "column 'code' nearly equals the target 'answer'",
        "column 'word' nearly equals the target 'answer'",
    ]
    assert "ROC-AUC of 1.0000" in found[0] and "right in 100.0% of rows" in found[1]
    frame = measured()
    frame["doubled"] = frame.answer * 2 + 1
    (sentence,) = warned(tmp_path, frame)
    assert sentence.startswith("column 'doubled' nearly equals the target 'answer': their correlation is 1.00000.")


def test_a_column_that_holds_the_answer_in_some_rows_or_on_another_scale_is_named(tmp_path: Path) -> None:
    impute = {"clean": {"missing": "impute"}}
    frame = ordinary()
    frame["word"] = frame.answer.map({"yes": "ja", "no": "nein"}).where(np.arange(ROWS) % 2 == 0)
    (sentence,) = warned(tmp_path, frame, impute)
    assert sentence.startswith("column 'word' nearly equals the target 'answer'")
    frame = measured()
    frame["log"] = np.log(frame.answer - frame.answer.min() + 1)
    (sentence,) = warned(tmp_path, frame)
    assert sentence.startswith(
        "column 'log' nearly equals the target 'answer': the correlation of their ranks is 1.00000"
    )
    frame = measured()
    frame["answer"] = frame.answer.round(0)
    frame["name"] = [f"n{value}" for value in frame.answer]
    (sentence,) = warned(tmp_path, frame, task="regression")
    assert sentence.startswith(
        "column 'name' nearly equals the target 'answer': the means by its value explain 100.00%"
    )
    frame = ordinary()
    frame["day"] = pd.date_range("2020-01-01", periods=ROWS).strftime("%Y-%m-%d")
    frame["answer"] = np.where(np.arange(ROWS) < 400, "no", "yes")
    frame = frame.sample(frac=1, random_state=1)
    (sentence,) = warned(tmp_path, frame)
    assert sentence.startswith("column 'day' nearly equals the target 'answer': its order alone ranks the classes")


def test_what_tells_much_of_the_answer_is_left_in_peace(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frame = ordinary()
    frame["leak"] = (frame.answer == "yes") ^ (rng.random(ROWS) < 0.03)
    assert warned(tmp_path, frame) == []
    frame = measured()
    frame["near"] = frame.answer + rng.normal(size=ROWS) * 0.3  # a correlation of 0.995
    frame["name"] = [f"n{value:.0f}" for value in frame.answer + rng.normal(size=ROWS)]
    assert warned(tmp_path, frame) == []


def test_numbers_with_a_decimal_comma_are_named(tmp_path: Path) -> None:
    frame = ordinary()
    frame["price"] = [f"{value:.2f}".replace(".", ",") for value in np.random.default_rng(0).normal(9, 2, ROWS)]
    frame["grams"] = np.resize(["3", "4,5", "12"], ROWS)
    found = warned(tmp_path, frame, {"features": {"drop": []}})
    assert [sentence.partition(" is read as text")[0] for sentence in found] == ["column 'price'", "column 'grams'"]
    assert 'write data.read.decimal: ","' in found[0] and "such as '4,5'" in found[1]
    columns = {column.name: column for column in sources.sample(load_job(tmp_path / "job.yaml")).columns}
    assert columns["price"].role == "text" and "numbers with a comma" in columns["price"].why
    assert columns["grams"].role == "categorical" and "numbers with a comma" in columns["grams"].why
    frame["price"], frame["grams"] = "3", np.resize(["3", "4,5 kg", "a,b"], ROWS)
    assert not any("comma" in sentence for sentence in warned(tmp_path, frame))


def test_a_column_that_is_filled_in_after_the_event_is_named(tmp_path: Path) -> None:
    frame = ordinary()
    frame["paid_back"] = np.where(frame.answer == "yes", np.random.default_rng(0).normal(size=ROWS), np.nan)
    impute = {"clean": {"missing": "impute"}}
    found = warned(tmp_path, frame, impute)
    assert "column 'paid_back' gives the target 'answer' away by being empty" in found[0]
    frame = measured()
    frame["paid_back"] = np.where(frame.x > 0, 1.0, np.nan)
    frame["answer"] = (frame.x > 0) * 100.0 + frame.x / 1000
    found = warned(tmp_path, frame, impute, task="regression")
    assert any("column 'paid_back' gives the target 'answer' away by being empty" in sentence for sentence in found)


def test_constant_and_mostly_missing_columns_are_named(tmp_path: Path) -> None:
    frame = ordinary()
    frame["same"] = 4
    frame["rare"] = np.where(np.arange(ROWS) % 10 < 8, np.nan, frame.x)
    frame["less"] = np.where(np.arange(ROWS) % 10 < 4, np.nan, frame.x)
    frame["nearly"] = np.arange(ROWS) == 5
    frame["on"] = "2020-01-01"
    found = warned(tmp_path, frame, {"clean": {"missing": "impute"}})
    assert [sentence.partition(":")[0].partition(";")[0] for sentence in found] == [
        "column 'same' is constant",
        "column 'on' is constant",
        "column 'rare' misses 80% of its cells",
    ]
    assert "it holds '4' in every row" in found[0]


def test_values_that_look_alike_are_named(tmp_path: Path) -> None:
    frame = ordinary()
    frame["colour"] = ["red", "Red", "blue", "caf\u00e9", "cafe\u0301", "a b"] * (ROWS // 6)
    frame.loc[:80, "answer"] = " yes"
    first, second = (each for each in warned(tmp_path, frame) if "differ in blanks" in each)
    assert first.startswith("column 'colour'") and "'Red', 'red'" in first and "blue" not in first
    assert "'cafe\u0301', 'caf\u00e9'" in first and "a category of its own" in first
    assert second.startswith("column 'answer'") and "' yes', 'yes'" in second and "a class of its own" in second


def test_classes_with_few_rows_are_named(tmp_path: Path) -> None:
    frame = ordinary()
    frame.loc[:4, "answer"] = "perhaps"
    (sentence,) = warned(tmp_path, frame)
    assert sentence.startswith("few training rows of some classes of 'answer': perhaps (")


def test_a_rare_class_alone_is_no_proof_of_a_leak(tmp_path: Path) -> None:
    """Naming the majority is right in 99.5% of the rows without any feature."""
    frame = ordinary()
    frame["answer"] = np.where(np.arange(ROWS) % 30 == 0, "yes", "no")
    assert warned(tmp_path, frame) == []


def test_train_and_test_that_differ_are_named() -> None:
    """A split by time of rows that drift: the sides are given here, as `prepare` gives them."""
    rng = np.random.default_rng(5)
    frame = pa.table(
        {
            "x": np.concatenate([rng.normal(size=500), rng.normal(1.0, 1, 200)]),
            "steady": rng.normal(size=700),
            "place": ["a", "b"] * 250 + ["c", "b"] * 100,
            "y": rng.normal(size=700),
        }
    )
    sides = pa.array([TRAIN] * 500 + [TEST] * 200, pa.int8())
    columns = describe.describe(frame).columns
    subject = Subject(columns, ["x", "steady"], ["place"], "y", "regression", {}, "time", [])
    (sentence,) = find(subject, frame.append_column(describe.SIDE, sides))
    assert sentence.startswith("train and test differ in place (PSI ")
    assert ", x (KS " in sentence and "steady" not in sentence and "under the split by time" in sentence
    mixed = pa.array(rng.permutation(sides.to_numpy()), pa.int8())
    assert find(subject, frame.append_column(describe.SIDE, mixed)) == []


def test_rows_in_the_order_of_time_that_are_split_by_chance_are_named(tmp_path: Path) -> None:
    frame = ordinary()
    frame["day"] = pd.date_range("2020-01-01", periods=ROWS).strftime("%Y-%m-%d")
    (sentence,) = warned(tmp_path, frame)
    assert sentence.startswith("the rows stand in the order of the dates in 'day' and are split by chance")
    assert "data.split: {by: time, column: day}" in sentence
    reported = {column.name: column for column in sources.sample(load_job(tmp_path / "job.yaml")).columns}
    assert reported["day"].role == "date"
    assert warned(tmp_path, frame, {"features": {"drop": ["day"]}}) == []
    frame["day"] = np.random.default_rng(0).permutation(frame.day)
    assert warned(tmp_path, frame) == []
    frame["day"] = 1_585_441_800 + np.arange(ROWS) * 60
    (sentence,) = warned(tmp_path, frame)
    assert sentence.startswith("the rows stand in the order of the times in 'day' and are split by chance")
    offsets = np.resize(["+02:00", "+00:00", "-05:00"], ROWS)
    moments = pd.date_range("2020-01-01", periods=ROWS, freq="min", tz="UTC")
    frame["day"] = [moment.tz_convert(offset).isoformat() for moment, offset in zip(moments, offsets, strict=True)]
    (sentence,) = warned(tmp_path, frame)
    assert sentence.startswith("the rows stand in the order of the dates in 'day'")
    frame["day"] = np.sort(np.random.default_rng(0).integers(0, 10**6, ROWS))
    assert warned(tmp_path, frame) == []
