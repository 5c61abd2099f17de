"""Records on disk are whole or absent, runs are found by what people type, progress reads well in all three styles."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.job.load import load_job
from raylway.runs.progress import Reporter, Style
from raylway.runs.run import Run, find_run, run_id, summary


class Point(msgspec.Struct, forbid_unknown_fields=True):
    x: int


def make_run(root: Path, job: str, name: str) -> Run:
    root.mkdir(exist_ok=True)
    (root / "job.yaml").write_text(f"name: {job}\ndata: {{source: a.csv, target: y}}\n")
    run = Run(root / job / name)
    run.create(load_job(root / "job.yaml"), "f" * 32)
    return run


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """A process rewrites one record over and over and is killed; what is there is always a whole record."""
    target = tmp_path / "record.json"
    code = (
        "import sys, pathlib; from raylway import storage\n"
        "path = pathlib.Path(sys.argv[1]); n = 0\n"
        "while True:\n    storage.write_record(path, {'x': [n] * 20000}); n += 1\n    print(n, flush=True)\n"
    )
    for rounds in (1, 2, 3, 5, 8):
        writer = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(rounds):
            writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        assert len(set(json.loads(target.read_text())["x"])) == 1


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for content in (b"", b'{"x": 1', b'{"x": "one"}', b'{"x": 1, "y": 2}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"record\.json.*damaged"):
            storage.read_record(path, Point)
    storage.write_record(path, Point(3))
    assert storage.read_record(path, Point) == Point(3)


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken off"), storage.staged_folder(tmp_path / "made") as staged:
        (staged / "half").write_text("x")
        raise ValueError("broken off")
    assert list(tmp_path.iterdir()) == []
    with storage.staged_folder(tmp_path / "made") as first, storage.staged_folder(tmp_path / "made") as second:
        (first / "who").write_text("first")
        (second / "who").write_text("second")
    assert (tmp_path / "made" / "who").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_a_killed_process_staged_is_removed_and_what_a_living_one_stages_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from raylway import storage\n"
        "with storage.staged_folder(pathlib.Path(sys.argv[1])) as staged:\n"
        "    (staged / 'half').write_text('x'); print(staged, flush=True); time.sleep(600)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        for name in ("killed", "living")
    ]
    try:
        killed, living = (Path(writer.stdout.readline().strip()) for writer in writers if writer.stdout)
        writers[0].kill()
        writers[0].wait()
        with storage.staged_folder(tmp_path / "other"):
            pass
        assert killed.is_dir()  # not yet: it could be one that was made just now
        for folder in (killed, living):
            os.utime(folder, (1, 1))
        with storage.staged_folder(tmp_path / "another"):
            pass
        assert not killed.exists()
        assert (living / "half").exists()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_a_storage_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage_name in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/proc/nothing"):
        with pytest.raises(UserError, match="can't be written"):
            storage.prepare_root(storage_name)


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.prepare_root("~/runs") == tmp_path / "runs"


def test_a_user_without_a_name_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert make_run(tmp_path, "flights", "0123").record.user == str(os.getuid())


def test_runs_are_found_by_what_people_type(tmp_path: Path) -> None:
    first, second = make_run(tmp_path, "flights", "abc123"), make_run(tmp_path, "article", "abd456")
    for name, run in (
        (str(first.folder), first),
        ("abc", first),
        ("abd456", second),
        ("flights", first),
        ("article", second),
        ("latest", second),
    ):
        assert find_run(tmp_path, name).folder == run.folder
    with pytest.raises(UserError, match="more than one"):
        find_run(tmp_path, "ab")
    with pytest.raises(UserError, match=r"no such run[\s\S]*flights/abc123"):
        find_run(tmp_path, "zzz")
    with pytest.raises(UserError, match="none"):
        find_run(tmp_path / "elsewhere", "latest")


def test_stages_are_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path, "flights", "abc123")
    run.add_prepare(2.5, 4.0)
    run.add_prepare(0.1, 3.0)
    with run.stage("train") as facts:
        facts["best_step"] = 7
    with pytest.raises(RunFailed), run.stage("evaluate"):
        raise RunFailed("lost")
    assert run.record.stages["prepare"].elapsed_s == 2.5
    assert run.is_done("train")
    assert not run.is_done("evaluate")
    assert run.record.stages["prepare"].facts == {"ray_s": 4.0}
    assert run.record.stages["train"].facts == {"best_step": 7}
    assert summary(run)["status"] == "evaluate failed"
    events = [json.loads(line)["event"] for line in run.events.read_text().splitlines()]
    assert events == ["prepare done", "train running", "train done", "evaluate running", "evaluate failed"]


def test_the_run_id_depends_on_every_part_and_its_borders() -> None:
    assert len({run_id(b"ab", b"c"), run_id(b"a", b"bc"), run_id(b"abc"), run_id(b"ab", b"c", b"")}) == 4
    assert run_id(b"ab", b"c") == run_id(b"ab", b"c")


@pytest.mark.parametrize("style", ["live", "lines", "json"])
def test_progress_in_each_style(style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    stream = io.StringIO()
    reporter = Reporter(style, stream)
    reporter.pace_s = 0.0
    with reporter.stage("train") as stage:
        for step in (1, 2, 3):
            stage.update(step, 10, "steps", loss=0.5, lr=1e-3)
        stage.finish("3 steps, best 2")
    reporter.note("all well")
    text = stream.getvalue()
    if style == "json":
        records = [json.loads(line) for line in text.splitlines()]
        assert [record["event"] for record in records] == ["start", *["progress"] * 3, "done", "note"]
        assert records[2]["loss"] == 0.5
        assert records[3]["remaining_s"] >= 0
        assert records[4]["summary"] == "3 steps, best 2"
    else:
        for word in ("3/10 steps", "steps/s", "loss 0.5", "lr 0.001", "s left", "3 steps, best 2", "all well"):
            assert word in text
        assert ("\x1b[" in text) == (style == "live")


def test_a_failed_stage_has_no_last_line() -> None:
    stream = io.StringIO()
    with pytest.raises(RunFailed), Reporter("lines", stream).stage("train"):
        raise RunFailed("lost")
    assert "✓" not in stream.getvalue()
