"""Sources in buckets of real servers of both stores, with credentials from the environment only."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from commands import raylway
from preparing import prepared
from stores import KEY, SECRET, Bucket, free_ports

from raylway.data import csv_read, remote, sources
from raylway.errors import UserError
from raylway.job.load import LoadedJob, load_job
from raylway.storage import buckets


def frame(rows: int, start: int = 0) -> pd.DataFrame:
    numbers = range(start, start + rows)
    return pd.DataFrame({"n": numbers, "word": [f"w{n % 7}" for n in numbers], "y": ["ab"[n % 2] for n in numbers]})


def job(folder: Path, source: Any, **data: Any) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(
        json.dumps({"name": "made", "storage": str(folder), "data": {"source": source, "target": "y", **data}})
    )
    return load_job(path)


def assert_nowhere(secret: str, folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    """But in the job file of the test itself."""
    assert secret not in done.stdout + done.stderr
    for path in folder.rglob("*"):
        assert secret not in path.name
        if path.is_file() and path != folder / "job.yaml":
            assert secret.encode() not in path.read_bytes()


def refusal(folder: Path, source: str) -> str:
    with pytest.raises(UserError) as caught:
        sources.sample(job(folder, source))
    return str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet", "jsonl"])
def test_a_file_a_folder_and_a_glob_of_a_bucket(bucket: Bucket, tmp_path: Path, ending: str) -> None:
    write = {
        "csv": lambda part, path: part.to_csv(path, index=False),
        "csv.gz": lambda part, path: part.to_csv(path, index=False),
        "parquet": lambda part, path: part.to_parquet(path),
        "jsonl": lambda part, path: part.to_json(path, orient="records", lines=True),
    }[ending]
    for index in range(2):
        write(frame(50, 50 * index), tmp_path / f"part.{ending}")
        bucket.write(f"{ending}/deep/part-{index}.{ending}", (tmp_path / f"part.{ending}").read_bytes())
    bucket.write(f"{ending}/_SUCCESS", b"")
    bucket.write(f"{ending}/notes.md", b"no data")
    folder = bucket.address(ending)
    for source, rows in (
        (f"{folder}/deep/part-1.{ending}", 50),
        (folder, 100),
        (f"{folder}/**/part-*.{ending}", 100),
        (f"{folder}/*/part-0.{ending}", 50),
    ):
        sample = sources.sample(job(tmp_path, source))
        assert (sample.rows, sample.exact, sample.numeric) == (rows, True, ["n"])


def test_a_large_file_of_a_bucket_is_prepared_in_ranges(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 10_000)
    text = frame(3_000).to_csv(index=False).encode()
    bucket.write("large.csv", text)
    (tmp_path / "large.csv").write_bytes(text)
    data = {"target": "y", "split": {"by": "random"}}
    theirs = prepared(tmp_path, {"source": bucket.address("large.csv"), **data})
    mine = prepared(tmp_path, {"source": "large.csv", **data})
    assert theirs.manifest.account == mine.manifest.account and mine.manifest.account.kept == 3_000
    assert theirs.manifest.fingerprint != mine.manifest.fingerprint
    assert [each.checksum for each in theirs.manifest.shards] == [each.checksum for each in mine.manifest.shards]
    again = bucket.address("large.csv")
    bucket.write("large.csv", text)
    assert (
        bucket.scheme == "gs"
        or prepared(tmp_path, {"source": again, **data}).manifest.fingerprint == theirs.manifest.fingerprint
    )
    bucket.write("large.csv", text.replace(b"w1", b"w2", 1))
    assert prepared(tmp_path, {"source": again, **data}).manifest.fingerprint != theirs.manifest.fingerprint


@pytest.mark.parametrize(
    "command", [["prepare"], pytest.param(["run", "--set", "train.for=1 steps"], marks=pytest.mark.long)]
)
def test_no_secret_is_written(
    s3_server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    s3_server.write("small.csv", frame(300).to_csv(index=False).encode())
    job(tmp_path, "s3://rows/small.csv", read={"format": "csv"})
    with store_named(monkeypatch, s3_server.variables):
        done = raylway(command[0], "job.yaml", *command[1:], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_nowhere(SECRET, tmp_path, done)


def test_what_is_not_there_is_told(bucket: Bucket, tmp_path: Path) -> None:
    assert "the source is not there" in refusal(tmp_path, bucket.address("nothing-here"))
    assert "the source is not there" in refusal(tmp_path, bucket.address("*/nothing-here"))
    bucket.write("odd/rows.xyz", b"1,2\n")
    assert "of no known format" in refusal(tmp_path, bucket.address("odd/rows.xyz"))


@pytest.mark.parametrize("scheme", ["s3", "gs", "https", "http"])
def test_credentials_in_an_address_are_not_told(tmp_path: Path, scheme: str) -> None:
    for secret in ("n0t", "n0/t", "n0?t", "n0#t", "n0@t"):
        for address in (f"{scheme}://{KEY}:{secret}@rows/a.csv", f"{scheme}://rows/a.csv?access_token={secret}"):
            told = refusal(tmp_path, address)
            assert "the address holds credentials" in told
            assert secret not in told


def test_credentials_in_an_address_are_written_nowhere(tmp_path: Path) -> None:
    job(tmp_path, f"s3://{KEY}:{SECRET}@rows/a.csv")
    done = raylway("run", "job.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert_nowhere(SECRET, tmp_path, done)


def test_runs_are_kept_in_folders_and_buckets_only(tmp_path: Path) -> None:
    frame(20).to_csv(tmp_path / "rows.csv", index=False)
    job(tmp_path, "rows.csv")
    place = "https://made.example/runs"
    done = raylway("prepare", "job.yaml", "--set", f"storage={place}", folder=tmp_path)
    assert done.returncode == 2 and "must be a folder or a bucket" in done.stderr and place in done.stderr


def test_wrong_credentials_of_s3(s3_server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_named(monkeypatch, {**s3_server.variables, "AWS_SECRET_ACCESS_KEY": "wrong"}):
        told = refusal(tmp_path, "s3://rows/odd")
    assert "the bucket refuses these credentials" in told
    assert "AWS_ACCESS_KEY_ID" in told


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "Cannot open credentials file"), ("{}", "Unsupported credential type")],
)
def test_wrong_credentials_of_google(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "key.json").write_text(content)
    with store_named(monkeypatch, {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json")}):
        told = refusal(tmp_path, "gs://rows/odd")
    assert "the bucket refuses these credentials" in told and words in told
    assert "GOOGLE_APPLICATION_CREDENTIALS" in told


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setattr(buckets, "_TIMEOUT_S", 2)
    names = {"AWS_ENDPOINT_URL_S3": address, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    with store_named(monkeypatch, {**names, "STORAGE_EMULATOR_HOST": address}):
        told = refusal(tmp_path, f"{scheme}://rows/odd")
    assert "the bucket can't be read" in told
    assert ("AWS_ENDPOINT_URL_S3" if scheme == "s3" else "STORAGE_EMULATOR_HOST") in told


@contextmanager
def store_named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Iterator[None]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    buckets.system.cache_clear()
    try:
        yield
    finally:
        buckets.system.cache_clear()


def test_a_file_that_changes_while_it_is_read_is_told(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("moving.csv", b"n,y\n1,a\n2,b\n")
    [location] = remote.find(bucket.address("moving.csv"), "data.source", None)
    with remote.opened(location) as file:
        assert file.read() == b"n,y\n1,a\n2,b\n"
    with remote.opened(location) as file:
        bucket.write("moving.csv", b"n,y\n1,b\n2,a\n")  # as long as before
        with pytest.raises(UserError, match="changed or removed while it was read"):
            file.seek(4)
            file.read()
    with pytest.raises(UserError, match="changed or removed while it was read"):
        remote.opened(location)


def test_arrow_files_of_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    table = pa.Table.from_pandas(frame(40), preserve_index=False)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    bucket.write("arrow/a.arrow", (tmp_path / "a.arrow").read_bytes())
    assert sources.sample(job(tmp_path, bucket.address("arrow"))).rows == 40
