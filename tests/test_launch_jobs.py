"""Submitting a job: what travels, and how its log and its end come back."""

from __future__ import annotations

import asyncio
import json
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylway.errors import RunFailed, UserError
from raylway.launch import jobs


def test_what_travels_is_what_ray_packs(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "work"
    for name in ("a.py", "secret.env", "big.bin", "deep/b.txt", "deep/skipped.log", ".venv/x", ".git/y", "runs/z"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name * 10)
    (folder / ".gitignore").write_text("secret.env\nruns/\n")
    (folder / ".rayignore").write_text("big.bin\n")
    (folder / "deep" / ".gitignore").write_text("*.log\n")
    package = tmp_path / "p.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as packed:
        expected = {each.filename: each.compress_size for each in packed.infolist()}
    found = {str(path.relative_to(folder)): size for path, size in jobs._travelling(folder)}
    assert found == expected
    assert set(found) == {"a.py", "deep/b.txt", ".gitignore", ".rayignore", "deep/.gitignore"}


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    for name, mib in (("data.bin", 90), ("old.bin", 11), ("ignored.bin", 500)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(mib << 20)  # no disk is used
    (tmp_path / ".rayignore").write_text("ignored.bin\n")
    with pytest.raises(UserError, match="too large") as raised:
        jobs._check_size(tmp_path)
    text = str(raised.value)
    assert "101 MiB" in text
    assert text.index("90.0 MiB  data.bin") < text.index("11.0 MiB  old.bin")
    assert "ignored.bin" not in text
    (tmp_path / ".rayignore").write_text("ignored.bin\nold.bin\n")
    jobs._check_size(tmp_path)


class BreakingClient:
    """A job server whose log stream breaks after given numbers of characters, each time from the log's start."""

    def __init__(self, log: str, breaks: list[int], chunk: int, status: str, code: int | None = None) -> None:
        self.log, self.breaks, self.chunk = log, breaks, chunk
        self.info = SimpleNamespace(
            status=Status("RUNNING"), message="x, last available logs: y", driver_exit_code=code
        )
        self.last = status

    def get_job_info(self, _: str) -> SimpleNamespace:
        return self.info

    def get_job_logs(self, _: str) -> str:
        return self.log

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        stop = self.breaks.pop(0) if self.breaks else None
        for place in range(0, len(self.log[:stop]), self.chunk):
            yield self.log[:stop][place : place + self.chunk]
        if stop is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        self.info.status = Status(self.last)


class Status(str):
    __slots__ = ()

    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


@settings(deadline=None, max_examples=60)
@given(
    log=st.text(alphabet="ab\né😀", max_size=60),
    breaks=st.lists(st.integers(0, 60), max_size=5),
    chunk=st.integers(1, 17),
)
def test_a_log_is_printed_once_however_often_its_stream_breaks(log: str, breaks: list[int], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_RETRY_S", 0)
        printed: list[str] = []
        patch.setattr(sys, "stdout", SimpleNamespace(write=printed.append, flush=lambda: None))
        follower = jobs._Follower(BreakingClient(log, breaks, chunk, "SUCCEEDED"), "j")  # type: ignore[arg-type]
        assert asyncio.run(follower.follow()) == 0
        assert "".join(printed) == log


@pytest.mark.parametrize(
    ("status", "driver_code", "expected", "word"),
    [
        ("SUCCEEDED", 0, 0, "succeeded"),
        ("FAILED", 2, 2, "failed: x"),
        ("FAILED", None, 1, "failed: x"),
        ("STOPPED", None, 1, "was stopped"),
        ("STOPPED", 143, 1, "was stopped"),
    ],
)
def test_submit_ends_as_the_job_did(
    status: str,
    driver_code: int | None,
    expected: int,
    word: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "_RETRY_S", 0)
    client = BreakingClient("line\n", [], 9, status, driver_code)
    assert asyncio.run(jobs._Follower(client, "job1").follow()) == expected  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("line\n", f"job1 {word}\n")


def test_a_job_that_waits_says_why_and_a_lost_cluster_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_RETRY_S", 0)
    monkeypatch.setattr(jobs, "_PENDING_NOTE_S", 0)
    monkeypatch.setattr(jobs, "_CONTACT_LOST_S", 0)
    client = BreakingClient("", [], 1, "RUNNING")
    client.info.status, client.info.message = Status("PENDING"), "waiting for resources"
    answers = iter([client.info, client.info])

    def get_job_info(_: str) -> SimpleNamespace:
        try:
            return next(answers)
        except StopIteration:
            raise ConnectionResetError("gone") from None

    monkeypatch.setattr(client, "get_job_info", get_job_info)
    with pytest.raises(RunFailed, match="job1 may still be running"):
        asyncio.run(jobs._Follower(client, "job1").follow())  # type: ignore[arg-type]
    assert "still pending after 0 s: waiting for resources" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "ray://127.0.0.1:10001"])
def test_jobs_go_to_the_dashboard(address: str) -> None:
    with pytest.raises(UserError, match="dashboard"):
        jobs._url(address)


def test_an_address_that_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert jobs._url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://there:1/")
    assert jobs._url(None) == "http://there:1"
    assert jobs._url("https://here:2") == "https://here:2"


def test_the_job_file_must_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps({"name": "j", "data": {"source": "x.csv", "target": "y"}}))
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(UserError, match="doesn't travel"):
        jobs.submit(Path("../job.yaml"), "http://127.0.0.1:1", [])
