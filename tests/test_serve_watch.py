"""What a replica notes of its requests: drift against plain formulas, the log's lines, the dashboard's metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import asking
import msgspec
import numpy as np
import pytest
from asking import GOOD, ask

from raylway.bundle import contents
from raylway.bundle.contents import BundleRecord
from raylway.bundle.predictor import Predictor
from raylway.bundle.rows import Rows
from raylway.features.profile import profile
from serve_app import drift, service
from serve_app.drift import Drift
from serve_app.service import Service
from serve_app.watch import Watch

RNG = np.random.default_rng(17)


def rows(count: int, low: float, colours: list[str]) -> Rows:
    numbers = np.column_stack([RNG.uniform(low, low + 10, count), RNG.uniform(1, 4, count)])
    return Rows(numbers, [RNG.choice(colours, count).tolist()])


@pytest.fixture(scope="module")
def trained(fruit: Path) -> BundleRecord:
    """A record with the profile of 4,000 rows: length 5 to 15, width 1 to 4, red and green."""
    record = contents.load(fruit).record
    found = rows(4000, 5, ["red", "green"])
    known = profile(found.table(record.signature), record.signature, ["colour"], {})
    return msgspec.structs.replace(record, profile=known)


def watched(record: BundleRecord) -> Drift:
    assert record.profile
    return Drift(record, record.profile)


def test_rows_like_those_of_training_have_not_drifted(trained: BundleRecord) -> None:
    found = watched(trained)
    found.add(rows(900, 5, ["red", "green"]))
    report = found.count(found.take())
    assert report.rows == 900
    assert [shift.reasons for shift in report.shifts] == [[]] * 3
    assert all(share < 0.01 for share in report.out_of_range.values())


def test_drift_by_plain_formulas(trained: BundleRecord) -> None:
    found = watched(trained)
    asked = rows(800, 10, ["red", "blue"])
    asked.categories[0][:80] = [None] * 80
    found.add(asked)
    report = found.count(found.take())
    shifts = {shift.name: shift for shift in report.shifts}
    known = trained.profile.numbers[0]  # type: ignore[union-attr]
    length = asked.numbers[:, 0]
    assert report.out_of_range["length"] == ((length < known.minimum) | (length > known.maximum)).mean() > 0.4
    old = np.array(known.counts) / sum(known.counts)
    # the model's job leaves rows with a missing cell out, so the profile is compared with the others
    new = np.maximum(np.histogram(length[80:], [-np.inf, *known.edges, np.inf])[0] / 720, 1e-4)
    assert shifts["length"].psi == pytest.approx(float(((new - old) * np.log(new / old)).sum()), rel=1e-9)
    assert shifts["length"].reasons
    assert not shifts["width"].reasons
    assert shifts["colour"].missing == 0.1
    assert shifts["colour"].unknown == asked.categories[0].count("blue") / 800


def test_the_sample_is_bounded_and_the_window_slides(trained: BundleRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SAMPLE_ROWS", 100)
    monkeypatch.setattr(drift, "WINDOW_ROWS", 400)
    found = watched(trained)

    def told(low: float) -> drift.Report:
        for _ in range(5):
            found.add(rows(30, low, ["red"]))
        found.add(rows(0, low, ["red"]))
        return found.count(found.take())

    assert [told(5).rows for _ in range(7)] == [100, 200, 300, 400, 300, 400, 300]
    for _ in range(6):
        report = told(500)
    assert report.out_of_range["length"] == 1.0  # what came before is forgotten
    assert 200 <= report.rows <= 400


def test_a_wide_model_shows_the_inputs_that_drift(monkeypatch: pytest.MonkeyPatch, trained: BundleRecord) -> None:
    from serve_app import watch

    monkeypatch.setattr(watch, "MOST_INPUTS", 2)
    told: list[tuple[float, str]] = []
    metrics = Watch(trained)._metrics
    monkeypatch.setattr(metrics._psi, "set", lambda value, tags: told.append((value, tags["input"])))
    found = watched(trained)
    found.add(rows(900, 8, ["red", "green"]))
    metrics.tell(found.count(found.take()))
    assert [name for _, name in told] == ["length"]


def test_lines_of_the_log_and_their_end(fruit: Path, trained: BundleRecord) -> None:
    lines: list[bytes] = []
    watch = Watch(trained, lines.append)
    with asking.local(Service(Predictor(fruit), 64, watch=watch)) as client:
        ask(client, GOOD, GOOD | {"length": 1})
        client.post("/v2/models/fruit/infer", content=b"{", headers={"X-Request-ID": "x" * 500})
        client.get(f"/{'long' * 200}?secret=1")
        client.get("/metrics")
    found = [json.loads(line) for line in b"".join(lines).splitlines()]  # all of them, at the end of the server
    assert [(line["form"], line["status"], line["rows"]) for line in found] == [
        ("predict", 200, 2),
        ("infer", 400, 0),
        ("page", 404, 0),
        ("page", 404, 0),
    ]
    assert found[1]["request_id"] == "x" * service._LONGEST
    assert len(found[2]["path"]) == service._LONGEST
    assert b"secret" not in b"".join(lines)


def test_the_dashboard_shows_metrics_that_there_are(trained: BundleRecord) -> None:
    board = json.loads(Path(service.__file__).with_name("grafana.json").read_text())
    asked = {
        re.sub(r"_(bucket|sum|count|total)$", "", name)
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_(raylway_\w+)", target["expr"])
    }
    there = {metric.info["name"] for metric in vars(Watch(trained)._metrics).values() if hasattr(metric, "info")}
    assert asked <= there
    assert there - asked == {"raylway_drift_rows"}
