"""Preparation that is killed, that loses a worker, or that runs elsewhere: the same bytes, and nothing read twice."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from preparing import prepared

from raylway.data import csv_read, engine, items, passes, pieces, prepare
from raylway.errors import RunFailed, UserError
from raylway.job.load import load_job
from raylway.runs.progress import Reporter
from tests.test_prepare import contents, dirty, write_parts

DATA: dict[str, Any] = {"source": "in", "target": "label", "clean": {"missing": "impute"}}


def place(tmp_path: Path, name: str) -> Path:
    """A folder with the same source as every other."""
    if not (tmp_path / "in").exists():
        write_parts(dirty(900), tmp_path / "in", 4)
    (tmp_path / name).mkdir()
    (tmp_path / name / "in").symlink_to(tmp_path / "in")
    return tmp_path / name


def test_threads_and_ray_give_the_same_bytes(tmp_path, monkeypatch, ray_session):
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 2_000)
    found = []
    for name, few in (("threads", 10_000), ("ray", 0)):
        monkeypatch.setattr(engine, "FEW", few)
        found.append(contents(prepared(place(tmp_path, name), DATA).folder))
    assert len(found[0]) > 20 and found[0] == found[1]


def test_a_worker_that_is_killed_in_the_middle_changes_nothing(tmp_path, monkeypatch, ray_session):
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 2_000)
    monkeypatch.setattr(engine, "FEW", 0)
    expected = contents(prepared(place(tmp_path, "whole"), DATA).folder)
    marks = tmp_path / "marks"
    marks.mkdir()
    real_read, real_write = passes.read, passes.write

    def die_once(name: str) -> None:
        if not (marks / name).exists():
            (marks / name).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    def read(keyed, **given):
        if keyed.item.index == 3:
            die_once("read")
        return real_read(keyed, **given)

    def write(task, **given):
        result = real_write(task, **given)
        if task.facts.item == 2:
            die_once("write")
        return result

    monkeypatch.setattr(passes, "read", read)
    monkeypatch.setattr(passes, "write", write)
    found = contents(prepared(place(tmp_path, "broken"), DATA).folder)
    killed = {path.name: int(path.read_text()) for path in marks.iterdir()}
    assert killed.keys() == {"read", "write"} and os.getpid() not in killed.values()
    assert found == expected


def test_a_part_of_which_every_worker_dies_ends_the_preparation(tmp_path, monkeypatch, ray_session):
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 2_000)
    monkeypatch.setattr(engine, "FEW", 0)
    killed = tmp_path / "killed"
    real = passes.read

    def read(keyed, **given):
        if keyed.item.index == 2:
            with killed.open("a") as pids:
                pids.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(keyed, **given)

    monkeypatch.setattr(passes, "read", read)
    folder = place(tmp_path, "broken")
    with pytest.raises(RunFailed) as failure:
        prepared(folder, DATA)
    assert str(failure.value) == (
        "in/part-0.csv: 4 workers died one after the other while they worked on the same part of it; their memory may "
        "be too small for it, or the job's own code or model ends its process"
    )
    pids = killed.read_text().split()
    assert len(pids) == len(set(pids)) == 4 and str(os.getpid()) not in pids
    assert failure.value.exit_code == 1 and not list(folder.glob("runs/prepared/*/manifest.json"))


ONE_CPU = """
    import os, sys
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    from pathlib import Path
    from raylway.data import csv_read, engine, prepare
    from raylway.job.load import load_job
    from raylway.runs.progress import Reporter
    csv_read.RANGE_BYTES, folder = 2_000, Path(sys.argv[1])
    prepare.prepare(load_job(folder / "job.yaml"), folder / "runs", Reporter("lines"), engine.ALL)
"""


def test_one_cpu_four_and_any_order_of_the_files_give_the_same_bytes(tmp_path, monkeypatch):
    names = [f"in/part-{index}.csv" for index in range(4)]
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 2_000)
    monkeypatch.setattr(engine, "FEW", engine.ALL)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    expected = {}
    for name, data in (("list", DATA | {"source": names}), ("folder", DATA)):
        expected[name] = contents(prepared(place(tmp_path, name), data).folder)
    one = place(tmp_path, "one")
    (one / "job.yaml").write_text(json.dumps({"name": "made", "data": DATA | {"source": [*names[::-1], names[2]]}}))
    subprocess.run([sys.executable, "-c", textwrap.dedent(ONE_CPU), str(one)], check=True)
    (folder,) = (path.parent for path in (one / "runs" / "prepared").glob("*/manifest.json"))
    assert contents(folder) == expected["list"]
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: iter(list(listed(path, pattern))[::-1]))
    assert contents(prepared(place(tmp_path, "backwards"), DATA).folder) == expected["folder"]
    shards = [{name: found for name, found in each.items() if name != "manifest.json"} for each in expected.values()]
    assert len(shards[0]) > 20 and shards[0] == shards[1]


SCRIPT = """
    import io, sys, time
    from pathlib import Path
    from raylway.data import csv_read, engine, items, prepare
    from raylway.job.load import load_job
    from raylway.runs.progress import Reporter
    csv_read.RANGE_BYTES, engine.FEW = 2_000, 10_000
    real = items.read
    def slow(item, reading):
        time.sleep(0.2)
        yield from real(item, reading)
    items.read = slow
    folder = Path(sys.argv[1])
    prepare.prepare(load_job(folder / "job.yaml"), folder / "runs", Reporter("lines", io.StringIO()))
"""


def test_after_a_kill_nothing_that_was_finished_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 2_000)
    monkeypatch.setattr(engine, "FEW", 10_000)
    expected = contents(prepared(place(tmp_path, "whole"), DATA).folder)
    folder = place(tmp_path, "killed")
    (folder / "job.yaml").write_text(json.dumps({"name": "made", "data": DATA}))
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder)])
    kept = folder / "runs" / "prepared" / pieces.FOLDER
    until = time.monotonic() + 60
    while len(list(kept.glob("*/facts"))) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = {path.parent.name for path in kept.glob("*/facts")}
    assert len(finished) >= 4 and not list(kept.parent.glob("*/manifest.json"))
    (damaged,) = sorted(finished)[:1]
    (kept / damaged / "0.arrow").write_bytes(b"cut short by a power cut")

    read: list[str] = []
    real_keyed, real_read, keys = pieces.keyed, items.read, {}

    def keyed(item, reading):
        result = real_keyed(item, reading)
        keys[item.index] = result.key
        return result

    def counted(item, reading):
        read.append(keys[item.index])
        return real_read(item, reading)

    monkeypatch.setattr(pieces, "keyed", keyed)
    monkeypatch.setattr(items, "read", counted)
    assert contents(prepared(folder, DATA).folder) == expected
    assert sorted(read) == sorted(set(keys.values()) - finished | {damaged}) and len(read) < len(keys)


def test_pieces_go_when_nobody_names_them(tmp_path, monkeypatch):
    folder = place(tmp_path, "one")
    first = prepared(folder, DATA)
    kept = folder / "runs" / "prepared" / pieces.FOLDER
    keys = {path.name for path in kept.iterdir() if path.is_dir()}
    assert keys == set(json.loads((first.folder / pieces.USED).read_text()))
    stray, cut = kept / "0123", kept / min(keys) / ".cut"
    stray.mkdir()
    cut.touch()
    with pieces.in_use(kept.parent):
        pieces.sweep(kept.parent, [])
    assert cut.exists()  # it may be written just now
    pieces.sweep(kept.parent, [])
    assert not cut.exists()
    assert stray.exists()  # a killed preparation may still want it
    os.utime(stray, (0, 0))
    for key in keys:
        os.utime(kept / key, (0, 0))
    with pieces.in_use(kept.parent):
        pieces.sweep(kept.parent, [])
    assert stray.exists()  # some preparation runs
    pieces.sweep(kept.parent, [])
    assert {path.name for path in kept.iterdir() if path.is_dir()} == keys


def test_pieces_of_a_job_that_names_one_file_do_not_stay(tmp_path):
    dirty(100).to_csv(tmp_path / "in.csv", index=False)
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({"name": "made", "data": DATA | {"source": "in.csv"}}))
    prepare.prepare(load_job(path), tmp_path / "runs", Reporter("lines", io.StringIO()))
    assert not [each for each in (tmp_path / "runs" / "prepared" / pieces.FOLDER).iterdir() if each.is_dir()]


def test_a_failure_in_a_task_reaches_the_driver_from_threads_and_from_ray(monkeypatch, ray_session):
    def fail(part):
        raise UserError("the made mistake", where=part.name)

    from raylway.data.files import Location

    for few in (10, 0):
        with pytest.raises(UserError, match="here: the made mistake"):
            list(engine.run(fail, [Location("here", "/")] * 3, Location, few=few))
