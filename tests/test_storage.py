"""Places of folders and of buckets on real servers behave alike; the cache; and a store that refuses or goes away."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
import stores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.storage import Address, Place, buckets, cache


class Point(msgspec.Struct, forbid_unknown_fields=True):
    x: int


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLWAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["folder", "s3_server", "google_server"])
def somewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    """A place where nothing is yet, of each kind in turn."""
    if request.param == "folder":
        (tmp_path / "somewhere").mkdir()
        return storage.place(str(tmp_path / "somewhere"))
    return storage.place(named(monkeypatch, request.getfixturevalue(request.param)).address(tmp_path.name))


def named(monkeypatch: pytest.MonkeyPatch, server: stores.Bucket) -> stores.Bucket:
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    buckets.system.cache_clear()
    return server


def kept(text: str, content: bytes) -> tuple[Address, int, str]:
    """An object and what a manifest says of it."""
    address = storage.place(text)
    assert isinstance(address, Address)
    storage.write_bytes(address, content)
    with storage.scratch(address, "sum") as folder:
        (folder / "content").write_bytes(content)
        return address, len(content), storage.checksum(folder / "content")


def test_a_place_holds_what_was_written_last(somewhere: Place) -> None:
    file = somewhere / "name.json"
    assert not file.exists() and storage.size(file) is None and storage.children(somewhere) == []
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        file.unlink()
    file.unlink(missing_ok=True)
    storage.remove(file)
    for content in (b"first", b"", b"0123456789"):
        storage.write_bytes(file, content)
        assert file.exists() and file.read_bytes() == content and storage.size(file) == len(content)
    for start, stop in ((0, 4), (4, 10), (8, 30), (10, 12)):
        assert storage.read_range(file, start, stop) == b"0123456789"[start:stop]
    assert (file.name, file.parent, storage.place(str(file))) == ("name.json", somewhere, file)
    storage.write_record(file, Point(3))
    assert storage.read_record(file, Point) == Point(3)
    storage.write_bytes(file, b"{")
    with pytest.raises(UserError, match=r"name\.json.*damaged"):
        storage.read_record(file, Point)


def test_a_folder_is_listed_and_removed(somewhere: Place, tmp_path: Path) -> None:
    (tmp_path / "somewhere" / "deep").mkdir(parents=True, exist_ok=True)
    for name in ("b", "a", "deep/c"):
        storage.write_bytes(somewhere / name, name.encode())
    assert [each.name for each in storage.children(somewhere)] == ["a", "b", "deep"]
    storage.remove(somewhere / "a")
    storage.remove(somewhere / "deep")
    storage.remove(somewhere / "nothing")
    assert not (somewhere / "deep" / "c").exists()
    assert [each.name for each in storage.children(somewhere)] == ["b"]


def test_a_file_is_moved_whole_or_not_at_all(somewhere: Place) -> None:
    large = os.urandom(21 << 20)  # more than one part of an upload
    with storage.scratch(somewhere, "made") as folder:
        (folder / "content").write_bytes(large)
        storage.move(folder / "content", somewhere / "below" / "large")
        assert not (folder / "content").exists()
    assert (somewhere / "below" / "large").read_bytes() == large
    assert storage.read_range(somewhere / "below" / "large", 11 << 20, (11 << 20) + 9) == large[11 << 20 :][:9]
    with pytest.raises(ValueError, match="broken off"), storage.written(somewhere / "half") as path:
        path.write_bytes(b"half")
        raise ValueError("broken off")
    with storage.written(somewhere / "whole") as path:
        path.write_bytes(b"whole")
    assert [each.name for each in storage.children(somewhere)] == ["below", "whole"]


def test_an_interrupted_upload_leaves_no_object(
    s3_server: stores.Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process uploads through a pipe that never ends, has sent some parts, and is interrupted."""
    address = named(monkeypatch, s3_server).address(f"{tmp_path.name}/interrupted")
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import sys, pathlib; from raylway import storage; from raylway.storage import buckets\n"
        "buckets.upload(pathlib.Path(sys.argv[1]), storage.place(sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "pipe", address], stderr=subprocess.DEVNULL)
    with (tmp_path / "pipe").open("wb") as pipe:
        pipe.write(os.urandom(24 << 20))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    assert not storage.place(address).exists()


def test_an_object_is_fetched_once_and_anew_when_it_is_damaged(
    s3_server: stores.Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named(monkeypatch, s3_server)
    downloads = counted(monkeypatch)
    content = b"rows" * 1000
    address, size, checksum = kept(s3_server.address(f"{tmp_path.name}/shard"), content)
    copy = storage.local(address, size, checksum)
    assert copy.read_bytes() == content and storage.local(address, size, checksum) == copy and len(downloads) == 1
    other = kept(s3_server.address(f"{tmp_path.name}/same-content"), content)[0]
    assert storage.local(other, size, checksum) == copy and len(downloads) == 1
    for damaged in (content[:-1], b"x" + content[1:]):
        copy.write_bytes(damaged)
        cache._verified.clear()  # as in a new process
        assert storage.local(address, size, checksum).read_bytes() == content
    assert len(downloads) == 3
    storage.write_bytes(address, b"x" + content[1:])
    copy.unlink()
    with pytest.raises(RunFailed, match=r"shard: the object is damaged"):
        storage.local(address, size, checksum)
    storage.remove(address)
    with pytest.raises(FileNotFoundError):
        storage.local(address, size, checksum)
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


def test_processes_share_one_download(
    s3_server: stores.Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named(monkeypatch, s3_server)
    described = kept(s3_server.address(f"{tmp_path.name}/shard"), os.urandom(1 << 20))
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)

    def fetch() -> None:
        def counting(address: Address, target: Path) -> None:
            with count:
                count.value += 1
            original(address, target)

        original, buckets.download = buckets.download, counting
        assert storage.checksum(storage.local(*described)) == described[2]

    # Arrow's client does not outlive a fork; the first process would have made one in this one
    buckets.system.cache_clear()
    processes = [context.Process(target=fetch) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert count.value == 1


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(uses=st.lists(st.integers(0, 7), min_size=1, max_size=30), limit=st.integers(1, 6))
def test_the_least_recently_used_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uses: list[int], limit: int
) -> None:
    """Against a list that is kept in order of use; every content is of 1,000 bytes."""
    folder = tmp_path / f"{time.monotonic_ns()}"
    contents = [f"{number}".encode() * 1000 for number in range(8)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}").write_bytes(content)
    sums = [storage.checksum(tmp_path / f"{number}") for number in range(8)]
    expected: list[int] = []
    ticks = iter(range(10**9))
    with monkeypatch.context() as patch:
        patch.setenv("RAYLWAY_CACHE", str(folder))
        patch.setenv("RAYLWAY_CACHE_GB", f"{limit * 1000 / 1e9}")
        patch.setattr(
            buckets, "download", lambda address, target: target.write_bytes(contents[int(address.name)]) and None
        )
        patch.setattr(cache, "touch", lambda path: os.utime(path, (tick := next(ticks), tick)))
        for use in uses:
            cache.fetched(Address("s3", f"b/{use}"), 1000, sums[use])
            expected = [*[each for each in expected if each != use], use][-limit:]
            assert sorted(path.name for path in (folder / "objects").iterdir()) == sorted(sums[n] for n in expected)


def test_what_is_removed_from_the_cache_can_be_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    contents = {"a": b"a" * 1000, "b": b"b" * 1000}
    monkeypatch.setattr(buckets, "download", lambda address, target: target.write_bytes(contents[address.name]))
    monkeypatch.setenv("RAYLWAY_CACHE_GB", f"{1500 / 1e9}")
    sums = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        sums[name] = storage.checksum(tmp_path / name)
    first = cache.fetched(Address("s3", "bucket/a"), 1000, sums["a"])
    mapped = pa.memory_map(str(first)).read_buffer()
    cache.fetched(Address("s3", "bucket/b"), 1000, sums["b"])
    assert not first.exists() and mapped.to_pybytes() == contents["a"]


def test_a_bucket_that_cannot_be_used_is_told(
    s3_server: stores.Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named(monkeypatch, s3_server)
    root = storage.prepare_root(s3_server.address(tmp_path.name))
    assert isinstance(root, Address) and [each for each in storage.children(root) if each.exists()] == []
    with pytest.raises(UserError, match="there is no such bucket"):
        storage.prepare_root("s3://no-such-bucket/runs")
    for variables in ({"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "nobody"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            buckets.system.cache_clear()
            for use in (storage.prepare_root, lambda text: storage.write_bytes(storage.place(text) / "x", b"")):
                with pytest.raises(UserError, match="the bucket refuses these credentials") as caught:
                    use(s3_server.address("runs"))
                assert "AWS_ACCESS_KEY_ID" in str(caught.value)
                assert stores.SECRET not in str(caught.value) and "wrong" not in str(caught.value)
    buckets.system.cache_clear()


@pytest.mark.parametrize("text", ["s3://key:n0t@rows/runs", "gs://rows/runs?access_token=n0t"])
def test_an_address_with_credentials_is_refused_and_not_shown(text: str) -> None:
    for use in (storage.place, storage.prepare_root):
        with pytest.raises(UserError, match="the address holds credentials") as caught:
            use(text)
        assert "n0t" not in str(caught.value)


@pytest.mark.parametrize("text", ["https://made.example/runs", "s3://", "ftp://a/b"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="it must be a folder or a bucket"):
        storage.place(text)


def test_a_store_that_goes_away_is_asked_again_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody listens at first; a second later a server does. Then one that never comes."""
    (tmp_path / "server").mkdir()
    port = stores.free_ports(1)[0]
    names = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    buckets.system.cache_clear()
    with pytest.raises(UserError, match="the bucket can't be read"):
        storage.prepare_root("s3://rows/runs")
    monkeypatch.setattr(buckets, "GIVE_UP_AFTER_S", 1.5)
    attempts: list[float] = []
    original = buckets._read
    monkeypatch.setattr(buckets, "_read", lambda address: (attempts.append(time.monotonic()), original(address))[1])
    with pytest.raises(RunFailed, match=r"s3://rows/runs/x: the bucket can't be reached, tried for 1\.5 s"):
        (storage.place("s3://rows/runs") / "x").read_bytes()
    assert len(attempts) > 1
    monkeypatch.setattr(buckets, "GIVE_UP_AFTER_S", 60)
    attempts.clear()
    with pytest.raises(RunFailed, match="the bucket can't be reached"):
        (storage.place("s3://rows/runs") / "x").read_bytes()
    assert len(attempts) == 1  # given up before: a run that ends for it ends at once
    buckets._silent.clear()
    attempts.clear()
    answer = threading.Timer(1.0, stores.answering, args=(port, b"here again"))
    answer.start()
    assert (storage.place("s3://rows/runs") / "x").read_bytes() == b"here again"
    answer.join(10)
    assert len(attempts) > 1 and not buckets._silent
    buckets.system.cache_clear()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that are downloaded from now on."""
    downloads: list[str] = []
    original = buckets.download

    def download(address: Address, target: Path) -> None:
        downloads.append(str(address))
        original(address, target)

    monkeypatch.setattr(buckets, "download", download)
    return downloads
