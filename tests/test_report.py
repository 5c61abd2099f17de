"""The report as a reader gets it: one HTML file that says what is so, whatever the data is called."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import made_prepared
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from raylway import storage
from raylway.evaluate import baselines, metrics
from raylway.evaluate.record import Evaluation
from raylway.features.prepared import PROFILE, QUARANTINE, LeakTest, Prepared
from raylway.report import charts, curves, figures, words
from raylway.report.report import write
from raylway.runs.run import Run

HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page; complains about tags that are not closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def rows(classes: list[str], count: int, seed: int, column: str = "x") -> pa.Table:
    random = np.random.default_rng(seed)
    names = [classes[index] for index in random.integers(0, len(classes), count)]
    return pa.table({column: random.standard_normal(count), "answer": names})


def data(folder: Path, classes: list[str], column: str = "x", **account: int) -> Prepared:
    splits = {"train": (240, 0), "validation": (40, 1), "test": (120, 2)}
    tables = {split: rows(classes, count, seed, column) for split, (count, seed) in splits.items()}
    return made_prepared.make(folder / "prepared", tables, "answer", **account)


def log_training(run: Run, steps: int) -> None:
    lines = [
        {"kind": "step", "step": step, "loss": 1 / step, "lr": 0.001, "grad_norm": 2.5} for step in range(1, steps + 1)
    ]
    lines += [{"kind": "validation", "step": steps, "val_loss": 0.25, "val_accuracy": 0.875}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    run.add_prepare(2.0, 4.5)
    with run.stage("train") as facts:
        facts.update(best_step=steps, best_checkpoint=f"step-{steps:08d}-a001", plan={"global_batch": 4_096})
        facts["resized"] = "from 1 to 2 workers at step 3"


def log_evaluation(run: Run, prepared: Prepared, seed: int = 3) -> Evaluation:
    """Answers drawn at random, in the files that evaluation writes."""
    manifest = prepared.manifest
    _, _, target, row_id = prepared.rows("test").take(np.arange(manifest.account.test))
    random = np.random.default_rng(seed)
    columns = {"row_id": row_id, "file": [manifest.files[0]] * len(target), "line": row_id.astype(np.int64)}
    columns |= {"target": target, "prediction": target + random.standard_normal(len(target))}
    if classes := manifest.signature.classes:
        output = random.dirichlet(np.ones(len(classes)), len(target)).astype(np.float32)
        names = np.array(classes)
        columns |= {"target": names[target], "prediction": names[output.argmax(axis=1)]}
        columns |= {f"p_{name}": output[:, code] for code, name in enumerate(classes)}
        scores = metrics.classification(target, output, classes)
    else:
        scores = metrics.regression(target, columns["prediction"])
    pq.write_table(pa.table(columns), run.predictions)
    with run.stage("evaluate"):
        evaluation = Evaluation(
            **msgspec.structs.asdict(scores),
            task=manifest.signature.task,
            baselines=[baselines.constant(prepared, target)],
            elapsed_s=1.0,
        )
        storage.write_record(run.evaluation, evaluation)
    return evaluation


def described(name: str, **what: Any) -> dict[str, Any]:
    """A column of profile.json."""
    plain = {"type": "float64", "role": "numeric", "why": "because", "rows": 436, "missing": 0, "distinct": 3}
    plain |= {"distinct_is_exact": True, "minimum": None, "maximum": None, "mean": None, "infinite": 0}
    return {"name": name, **plain, "examples": [], "frequent": {}, "histogram": [], **what}


def page(run: Run, prepared: Prepared) -> Page:
    return Page(write(run, prepared).read_text(encoding="utf-8"))


def test_a_finished_run_is_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = data(tmp_path, ["no", "yes"], missing=30, duplicates=4, quarantined=2)
    bad = {"file": "rows.csv", "line": 17, "column": "x", "reason": "not a number", "cell": "12,5"}
    (prepared.folder / QUARANTINE).write_text(json.dumps(bad) + "\n")
    profile = [
        described("x", minimum=-1.5, maximum=2.0, mean=0.25, missing=30, distinct=400, histogram=[1, 0, 3]),
        described("answer", type="string", role="target", distinct=2, frequent={"no": 300, "yes": 136}),
    ]
    (prepared.folder / PROFILE).write_text(json.dumps({"columns": profile}))
    monkeypatch.setattr("sys.argv", ["raylway", "run", "demo.yaml"])
    run = made_prepared.make_run(tmp_path, prepared, seed="7")
    log_training(run, 50)
    evaluation = log_evaluation(run, prepared)
    with run.stage("bundle"):
        pass
    text = page(run, prepared).text
    assert "start of Ray 4.5 s prepare 2.0 s" in text
    accuracy = evaluation.metrics["accuracy"]
    assert accuracy is not None
    assert f"rightly {accuracy:.1%} of the time" in text
    assert "read 436 = 400 + 30 + 4 + 2; kept 400 = 240 + 40 + 120; evaluated 120 = test 120. It adds up." in text
    assert "rows.csv:17 x not a number 12,5" in text
    assert "x float64 numeric because 6.9% 30 400 -1.5000 to 2.0000 mean 0.2500" in text
    assert "raylway run demo.yaml" in text
    assert "name: demo seed: 7" in text
    for value in evaluation.metrics.values():
        assert words.figure(value) in text
    for name in ("Loss", "Validation accuracy", "Learning rate", "Gradient norm", "ROC", "Calibration"):
        assert f" {name} " in text
    assert "The bundle holds the weights of step 50" in text
    assert "global batch 4,096" in text
    assert "The group of workers was resized from 1 to 2 workers at step 3." in text
    assert "Unfinished" not in text


@pytest.mark.parametrize("classes", [[HOSTILE, "</style>", "plain"], [HOSTILE, "</title><script>"]])
def test_names_from_the_data_are_text_and_never_markup(tmp_path: Path, classes: list[str]) -> None:
    prepared = data(tmp_path, classes, column="<img src=x onerror=alert(1)>", quarantined=1)
    bad = {"file": "<b>.csv", "line": 1, "column": "<i>", "reason": "<u>", "cell": "</code><script>"}
    (prepared.folder / QUARANTINE).write_text(json.dumps(bad) + "\n")
    column = described("<script>", type="<b>", role="<i>", examples=["<u>"], frequent={"<script>": 3})
    (prepared.folder / PROFILE).write_text(json.dumps({"columns": [column]}))
    run = made_prepared.make_run(tmp_path, prepared, storage="</pre><script>")
    log_training(run, 5)
    log_evaluation(run, prepared)
    found = page(run, prepared)
    assert not {"script", "img", "u"} & set(found.tags)
    assert HOSTILE in found.text
    assert "</code><script>" in found.text
    assert not [name for name, _ in found.attributes if name.startswith("on")]


def test_the_leak_test_and_the_warnings_stand_where_they_are_seen(tmp_path: Path) -> None:
    prepared = data(tmp_path, ["no", "yes"])
    run = made_prepared.make_run(tmp_path, prepared)
    good = LeakTest(400, 400, 0, 0, 0, groups_on_two_sides=0)
    bad = LeakTest(5000, 400, 0, 2, 1, out_of_order=1)
    prepared.manifest = msgspec.structs.replace(
        prepared.manifest, leak_test=good, warnings=["column 'x' is <constant>"]
    )
    text = page(run, prepared).text
    assert "The data gives 1 warning: see Columns" in text
    assert "1 warning column 'x' is <constant>" in text
    assert (
        "✓ Read back from the shards, of 400 rows: no row stands on two sides, no kept row is in no shard, "
        "no row of a shard is no kept row, no content of rows is on two sides and no group is on two sides" in text
    )
    assert "leak test failed" not in text
    prepared.manifest = msgspec.structs.replace(prepared.manifest, leak_test=bad)
    text = page(run, prepared).text
    assert "The leak test failed: what was measured on the test rows can't be trusted." in text
    assert (
        "✗ Read back from the shards, of 5,000 rows (contents of 400 rows compared): 2 rows stand on two sides, "
        "1 content of rows is on two sides and 1 side begins before an earlier one ends" in text
    )


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    prepared = data(tmp_path, ["no", "yes"])
    run = made_prepared.make_run(tmp_path, prepared)
    log_training(run, 20)
    log_evaluation(run, prepared)
    found = page(run, prepared)
    links = [value or "" for name, value in found.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert links
    assert all(link.startswith("#") for link in links)
    source = run.report.read_text()
    assert "url(" not in source.replace("url(#", "")
    assert "@import" not in source
    assert not {"script", "link", "iframe", "object", "img"} & set(found.tags)


def test_every_chart_has_a_title_and_a_description(tmp_path: Path) -> None:
    prepared = data(tmp_path, ["a", "b", "c"])
    run = made_prepared.make_run(tmp_path, prepared)
    log_training(run, 20)
    log_evaluation(run, prepared)
    page(run, prepared)
    drawings = re.findall(r"<svg.*?</svg>", run.report.read_text(), re.DOTALL)
    assert len(drawings) == 6
    identifiers = []
    for drawing in drawings:
        title, description = re.search(r'aria-labelledby="(\S+) (\S+)"', drawing).groups()  # type: ignore[union-attr]
        assert re.search(rf'<title id="{title}">\w', drawing)
        assert re.search(rf'<desc id="{description}">\w', drawing)
        identifiers.append(title)
    assert len(set(identifiers)) == len(drawings)


@pytest.mark.parametrize("done", ["nothing", "training"])
def test_an_unfinished_run_says_what_is_missing(tmp_path: Path, done: str) -> None:
    prepared = data(tmp_path, ["no", "yes"])
    run = made_prepared.make_run(tmp_path, prepared)
    if done == "training":
        log_training(run, 5)
    text = page(run, prepared).text
    assert "This run has no evaluation yet." in text
    missing = "train, evaluate and bundle" if done == "nothing" else "evaluate and bundle"
    assert f"Unfinished when this page was written: {missing}." in text
    assert ("No step has been logged yet." in text) == (done == "nothing")


def test_an_account_that_does_not_add_up_is_called_out(tmp_path: Path) -> None:
    prepared = data(tmp_path, ["no", "yes"])
    run = made_prepared.make_run(tmp_path, prepared)
    evaluation = log_evaluation(run, prepared)
    evaluation.rows -= 1
    storage.write_record(run.evaluation, evaluation)
    assert "It does not add up." in page(run, prepared).text


def test_regression(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tables = {
        split: pa.table({"x": random.standard_normal(count), "price": 1e4 * random.standard_normal(count)})
        for split, count in (("train", 90), ("validation", 10), ("test", 40))
    }
    prepared = made_prepared.make(tmp_path / "prepared", tables, "price")
    run = made_prepared.make_run(tmp_path, prepared)
    evaluation = log_evaluation(run, prepared)
    text = page(run, prepared).text
    assert f"the model's answer for “price” is off by {words.figure(evaluation.metrics['mae'])} on average" in text
    assert "It beats always answering the mean" in text
    assert "Predicted and true values" in text


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_rows_that_were_most_wrong_are_named(tmp_path: Path, task: str) -> None:
    if task == "classification":
        prepared = data(tmp_path, ["no", "maybe", "yes"])
    else:
        draw = np.random.default_rng(0)
        table = pa.table({"x": draw.standard_normal(60), "answer": draw.standard_normal(60)})
        splits = dict.fromkeys(("train", "validation", "test"), table)
        prepared = made_prepared.make(tmp_path / "prepared", splits, "answer")
    run = made_prepared.make_run(tmp_path, prepared)
    evaluation = log_evaluation(run, prepared)
    frame = pq.read_table(run.predictions).to_pandas()
    if task == "regression":
        frame["wrong"] = (frame.prediction - frame.target).abs()
    else:
        frame["wrong"] = [1 - row[f"p_{row.target}"] for _, row in frame.iterrows()]
        frame = frame[frame.target != frame.prediction]
    expected = frame.sort_values("wrong", ascending=False, kind="stable").head(10)
    found = figures.worst(run.predictions, evaluation, 10)
    assert [row["id"] for row in found] == [str(row_id) for row_id in expected.row_id]
    text = page(run, prepared).text
    assert "Rows the model got most wrong" in text
    for line in expected.line:
        assert f"rows.csv:{line} " in text
    assert f"raylway show {run.record.id} --row {expected.row_id.iloc[0]}" in text


def test_many_classes_stay_readable(tmp_path: Path) -> None:
    prepared = data(tmp_path, [f"class {number:03d}" for number in range(60)])
    run = made_prepared.make_run(tmp_path, prepared)
    log_evaluation(run, prepared)
    text = page(run, prepared).text
    assert "The most frequent mistakes" in text
    assert "The 50 most frequent of 60 classes." in text


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    prepared = data(tmp_path, ["no", "yes"])
    run = made_prepared.make_run(tmp_path, prepared)
    log_training(run, 100_000)
    assert write(run, prepared).stat().st_size < 1_000_000


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(2, 300), elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])),
    st.randoms(use_true_random=False),
)
def test_the_area_below_the_roc_curve_is_the_metric(score: np.ndarray, random: object) -> None:
    is_class = np.array([random.random() < 0.5 for _ in score])  # type: ignore[attr-defined]
    is_class[:2] = [True, False]
    false, true = curves.roc(is_class, score)
    assert np.trapezoid(true, false) == pytest.approx(sk.roc_auc_score(is_class, score))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_a_thinned_roc_curve_keeps_its_area() -> None:
    random = np.random.default_rng(0)
    is_class = random.random(20_000) < 0.1
    score = random.standard_normal(20_000) + 2 * is_class
    false, true = curves.roc(is_class, score)
    assert len(false) <= 400
    assert np.trapezoid(true, false) == pytest.approx(sk.roc_auc_score(is_class, score), abs=1e-3)


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 200), elements=st.floats(0, 1)), st.integers(0, 2**32 - 1))
def test_reliability_counts_every_row_and_never_leaves_its_bin(claimed: np.ndarray, seed: int) -> None:
    came_true = np.random.default_rng(seed).random(len(claimed)) < claimed
    found = curves.reliability(claimed, came_true)
    assert found.rows.sum() == len(claimed)
    assert found.observed @ found.rows == pytest.approx(came_true.sum())
    assert found.claimed @ found.rows == pytest.approx(claimed.sum())
    assert (np.diff(found.claimed) > 0).all()


@settings(deadline=None)
@given(st.integers(1, 5_000), st.integers(1, 400))
def test_thinning_keeps_the_mean_and_the_limit(count: int, most: int) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    x, y = curves.thinned(np.arange(count, dtype=float), values, most)
    size = -(-count // most)
    assert len(x) == len(y) <= most
    assert y[0] == pytest.approx(values[:size].mean())
    assert y[-1] == pytest.approx(values[(len(x) - 1) * size :].mean())


@settings(deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 7
    step = found[1] - found[0]
    assert found[0] >= low - step * 1e-6
    assert found[-1] <= high + step * 1e-6
    mantissa = float(f"{step:.6e}".split("e")[0])
    assert min(abs(mantissa - good) for good in (1, 2, 5, 10)) < 0.01


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0, "0.0000"), (0.91347, "0.9135"), (12.3456, "12.35"), (98765.4, "98,765"), (2.5e-7, "2.50e-7")],
)
def test_figures(value: float | None, shown: str) -> None:
    assert words.figure(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (7322, "2 h 02 min")]
)
def test_seconds(value: float, shown: str) -> None:
    assert words.seconds(value) == shown
