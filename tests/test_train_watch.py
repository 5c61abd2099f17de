"""The figures by which a run is watched: what is written equals what comes out of the lines, also after kills."""

from __future__ import annotations

import datetime
import io
import json
import re
import struct
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from tensorboardX.proto.event_pb2 import Event
from user_models import FOLDER

from raylway import storage
from raylway.report import figures, speed
from raylway.runs import pace, starts
from raylway.runs.progress import Reporter
from raylway.storage import Place
from raylway.train import follow, sinks

TRAIN = {
    "for": "4 epochs",
    "global_batch": 8,
    "validate": {"every": "1 epoch"},
    "checkpoint": {"every": "5 steps", "keep": 2},
}
"""60 rows in batches of 8: eight steps an epoch, 32 in all, the last of an epoch with four rows."""


def case(folder: Path, record: Path, **acts: Any) -> ranks.Case:
    record.mkdir()
    model = {"kind": "user_models:watched", "args": {"dropout": 0.3, "record": str(record), **acts}}
    return ranks.Case(folder, ranks.prepared(folder / "prepared", 60, 10), TRAIN, model, [FOLDER])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def at(line: dict[str, Any]) -> float:
    return datetime.datetime.fromisoformat(line["time"]).timestamp()


def events_in(folder: Place) -> list[Event]:
    """Of all TensorBoard files of a run, read by their format: length, 4 bytes, record, 4 bytes."""
    found = []
    for place in storage.children(folder / "tensorboard"):
        assert place.name.startswith("events.out.tfevents.")
        content, start = place.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            found.append(Event.FromString(content[start + 12 : start + 12 + length]))
            start += length + 16
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> ranks.Case:
    """Two ranks; killed in step 13, three steps after a checkpoint, and started again by another command."""
    folder = tmp_path_factory.mktemp("killed")
    broken = case(folder / "run", folder / "rows", act="kill", at=13, rank=1, once=str(folder / "marker"))
    results = ranks.Ranks([broken.assignment(2, "first")], 2, folder).results()
    assert results[1] == [None]
    assert (folder / "marker").exists()
    broken.lost = lines_of(broken.run.metrics)  # type: ignore[attr-defined]
    ranks.done(broken, 2, "second")
    return broken


def test_the_lines_of_pace_equal_what_numpy_makes_of_the_steps(killed: ranks.Case) -> None:
    lines = lines_of(killed.run.metrics)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 33))
    found = [line for line in lines if line["kind"] == "pace"]
    assert [(line["first_step"], line["last_step"], line["step"]) for line in found] == [
        (1, 8, 8), (9, 16, 16), (17, 24, 24), (25, 32, 32),
    ]  # fmt: skip
    for line in found:
        mine = steps[line["first_step"] - 1 : line["last_step"]]
        times = np.array([step["step_s"] for step in mine])
        assert line["rows"] == 60
        assert [line["step_p50_s"], line["step_p99_s"]] == np.percentile(times, [50, 99]).tolist()
        assert line["rows_per_s"] == pytest.approx(60 / times.sum())
        assert line["data_wait"] == pytest.approx(sum(step["data_s"] for step in mine) / times.sum())
        so_far = steps[: line["last_step"]]
        assert line["overall_rows_per_s"] == pytest.approx(
            sum(step["rows"] for step in so_far) / sum(step["step_s"] for step in so_far)
        )
        saves = [other for other in lines if other["kind"] == "checkpoint"]
        between = [save["stall_s"] for save in saves if line["first_step"] <= save["step"] < line["last_step"]]
        # The checkpoint behind an epoch's last step follows the line of the epoch.
        between += [save["stall_s"] for save in saves if save["step"] == line["first_step"] - 1]
        assert line["stall_s"] == pytest.approx(sum(between))
        lag = dict.fromkeys(range(2), 0.0)
        for step in mine:
            lag[step["slowest_rank"]] += step["slowest_s"] - step["median_s"]
        assert lag[line["slowest_rank"]] == max(lag.values())
        assert line["behind"] == pytest.approx(max(lag.values()) / times.sum())
    for step in steps:
        assert step["rows_per_s"] == pytest.approx(step["rows"] / step["step_s"])
        assert 0 <= step["data_s"] <= step["slowest_s"]
    # Each checkpoint once, the one that the run went on from included.
    saved = [line["step"] for line in lines if line["kind"] == "checkpoint"]
    assert [5, 8, 10, 15, 16, 20, 24, 25, 30, 32] in (saved, saved[:-1])  # the last one waits once more at the end


def test_goodput_counts_lost_steps_and_restarts(killed: ranks.Case) -> None:
    lines, events = lines_of(killed.run.metrics), lines_of(killed.run.events)
    starts = [line for line in events if line["event"] == "attempt started"]
    assert [line["launch"] for line in starts] == ["first", "second"]
    before: list[dict[str, Any]] = killed.lost  # type: ignore[attr-defined]
    assert [line["step"] for line in before if line["kind"] == "step"] == list(range(1, 13))
    lost = [line for line in before if line["kind"] == "step" and line["step"] > 10]
    (went_on,) = [line for line in events if line["event"] == pace.CONTINUES]
    assert (went_on["from_step"], went_on["lost_steps"]) == (10, 2)
    assert went_on["lost_s"] == pytest.approx(sum(line["step_s"] for line in lost))
    assert went_on["heard_until"] == before[-1]["time"]

    tally = pace.Tally()
    for line in lines:
        tally.add(line)
    spent = tally.spent(events)
    # Each command from its start to the last line that it wrote; the pause between the two is nobody's. The rank that
    # was left wrote last of the first one: that it lost its peer.
    (failed,) = [line for line in events if line["event"] == "attempt failed"]
    first = at(failed) - at(starts[0])
    wall = first + at(lines[-1]) - at(starts[1])
    kept = sum(line["step_s"] for line in lines if line["kind"] == "step")
    assert spent.wall == pytest.approx(wall, abs=0.005)
    assert spent.kept == pytest.approx(kept)
    assert spent.goodput == pytest.approx(kept / wall, rel=0.01)
    assert spent.lost == went_on["lost_s"]
    assert spent.validation == sum(line["elapsed_s"] for line in lines if line["kind"] == "validation")
    assert spent.checkpoints == sum(line["stall_s"] for line in lines if line["kind"] == "checkpoint")
    assert spent.starting > 0
    (last,) = [line for line in lines if line["kind"] == "pace" and line["step"] == 32]
    assert last["goodput"] == pytest.approx(kept / (first + at(last) - at(starts[1])), rel=0.01)


def test_the_report_says_the_same(killed: ranks.Case) -> None:
    lines, events = lines_of(killed.run.metrics), lines_of(killed.run.events)
    steps = [line for line in lines if line["kind"] == "step"]
    times = np.array([step["step_s"] for step in steps])
    history = figures.History(killed.run.metrics)
    found = speed.facts(history, events)
    values = {label: value for value, label in found["tiles"]}
    assert values["rows a second"] == f"{240 / times.sum():,.0f}"
    assert values["a step at the median"] == f"{1000 * np.percentile(times, 50):.3g} ms"
    assert values["at the 99th percentile"] == f"{1000 * np.percentile(times, 99):.3g} ms"
    assert values["of it waiting for rows"] == f"{sum(step['data_s'] for step in steps) / times.sum():.1%}"
    assert values["goodput"] == f"{times.sum() / found['wall_s']:.1%}"
    assert sum(part["elapsed_s"] for part in found["parts"]) == pytest.approx(found["wall_s"])
    assert found["attempts"] == 2
    assert found["slowest"].startswith("Rank ")
    assert [chart.title for chart in speed.charts(history)] == ["Rows a second", "Time of a step"]


def test_tensorboard_shows_each_step_once(killed: ranks.Case) -> None:
    lines = lines_of(killed.run.metrics)
    shown: dict[str, list[tuple[int, float]]] = {}
    for event in events_in(killed.folder):
        for value in event.summary.value:
            shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert len(list(killed.folder.glob("tensorboard/*"))) == 2
    steps = [line for line in lines if line["kind"] == "step"]
    for tag, name in (("train/loss", "loss"), ("train/lr", "lr"), ("speed/rows_per_s", "rows_per_s")):
        assert shown[tag] == [(line["step"], float(np.float32(line[name]))) for line in steps]
    validations = [line for line in lines if line["kind"] == "validation"]
    assert shown["validation/val_loss"] == [(line["step"], float(np.float32(line["val_loss"]))) for line in validations]
    assert [step for step, _ in shown["speed/goodput"]] == [8, 16, 24, 32]
    assert [step for step, _ in shown["speed/stall_s"]][:10] == [5, 8, 10, 15, 16, 20, 24, 25, 30, 32]


def test_the_rank_that_holds_up_the_others_is_named(tmp_path: Path) -> None:
    slow = case(tmp_path / "run", tmp_path / "rows", act="sleep", rank=1, seconds=0.05)
    ranks.done(slow, 2)
    found = [line for line in lines_of(slow.run.metrics) if line["kind"] == "pace"]
    assert {line["slowest_rank"] for line in found} == {1}
    assert all(line["behind"] > 0 for line in found)


def test_a_step_that_was_undone_is_not_kept() -> None:
    tally = pace.Tally()
    for step in range(1, 11):
        if step == 8:
            tally.add({"kind": "note", "step": 8, "text": "rolled back", "undone_from": 6})
        tally.add({"kind": "step", "step": step, "step_s": float(step), "rows": 4})
    spent = tally.spent([])
    assert (spent.kept, spent.lost) == (55 - 21, 21)


def test_commands_are_counted_from_their_start_to_their_end() -> None:
    def event(second: int, name: str, **more: Any) -> dict[str, Any]:
        return {"time": f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000+00:00", "event": name, **more}

    events = [
        event(0, "train running"),
        event(10, "attempt started", launch="a"),
        event(30, "attempt started", launch="a"),  # a worker died; the command went on
        event(31, pace.CONTINUES, lost_s=5.0, heard_until=event(28, "")["time"]),
        event(40, "train interrupted"),
        event(100, "train running"),
        event(110, "attempt started", launch="b"),  # killed; it wrote its last line at 150
        event(200, "train running"),
        event(205, "attempt started", launch="c"),
        event(206, pace.CONTINUES, lost_s=7.0, heard_until=event(150, "")["time"]),
        event(260, "train done"),
        event(300, "evaluate running"),
    ]
    first = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).timestamp()
    assert [(start - first, end - first) for start, end in pace.sittings(events)] == [(0, 40), (100, 150), (200, 260)]
    running = pace.sittings(events[:7], event(130, "")["time"])
    assert [(start - first, end - first) for start, end in running] == [(0, 40), (100, 130)]
    assert pace.Tally().spent(events).lost == 12


def test_stages_of_a_start_lie_between_its_events() -> None:
    def event(second: float, name: str, **more: Any) -> dict[str, Any]:
        return {"time": f"2026-01-01T00:00:{second:06.3f}+00:00", "event": name, **more}

    names = [starts.FIT, *starts.STAGES]
    first = [event(at, name, attempt=1) for name, at in zip(names, [1, 5, 5.5, 7, 10, 13, 14, 14.5], strict=True)]
    second = [event(at, name, attempt=2) for name, at in zip(names[2:], [22, 23, 26, 29, 31, 31.5], strict=True)]
    second.insert(4, event(30, pace.CONTINUES, heard_until=event(20, "")["time"]))
    events = [*first, event(21, "attempt failed", attempt=1), *second]
    one, other = starts.starts(events)
    assert (one.attempt, other.attempt) == (1, 2)
    assert list(one.stages.values()) == pytest.approx([4, 0.5, 1.5, 3, 3, 1, 0.5])
    assert list(other.stages.values()) == pytest.approx([2, 1, 3, 3, 2, 0.5])
    assert one.total_s == pytest.approx(13.5)
    assert other.total_s == pytest.approx(11.5)


def test_a_wait_for_workers_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_case = case(tmp_path / "run", tmp_path / "rows")
    run, shown, asked = waiting_case.run, io.StringIO(), list[int]()

    def free() -> tuple[float, float]:
        asked.append(1)
        return 0.5, 0.0

    waiting = follow.Waiting(run, waiting_case.plan(2), free, Reporter("lines", shown))
    run.log(starts.WAITS)
    waiting.look()
    assert not shown.getvalue(), "they may come at once"
    monkeypatch.setattr(follow, "PATIENCE_S", 0.0)
    told = "waiting for 2 workers of 1 CPU each; free now: 0.5 CPUs; Ctrl-C ends the wait\n"
    for event, times in ((starts.ASKED, 1), (starts.ASKED, 1), (starts.ALIVE, 1), (starts.WAITS, 2)):
        run.log(event)
        waiting.look()
        assert shown.getvalue() == told * times
    assert len(asked) == 2


def test_ray_exports_the_newest_figures(ray_session: None) -> None:
    import ray

    prometheus = sinks.Prometheus("flights", "0123")
    for step in range(1, 4):
        prometheus.write(
            {"kind": "step", "step": step, "rows": 8, "loss": 1 / step, "step_s": 0.25, "time": pace.now()}
        )
    prometheus.flush()
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, text = time.monotonic() + 30, ""
    while "raylway_train_steps" not in text:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        text = urllib.request.urlopen(address, timeout=10).read().decode()
    found = dict(re.findall(r"^ray_raylway_train_(\w+)\{[^}]*run=\"0123\"[^}]*\} (\S+)", text, re.MULTILINE))
    assert {name: float(value) for name, value in found.items() if "created" not in name} == {
        "loss": pytest.approx(1 / 3), "step": 3, "step_s": 0.25, "steps_total": 3, "rows_total": 24,
    }  # fmt: skip
