"""Files of a real web server over https: whole, in ranges where it gives them, and never taken for another or whole."""

from __future__ import annotations

import base64
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import urllib3
import web_server
from commands import raylway
from preparing import job, prepared, read
from web_server import Served, Web

from raylway.data import csv_read, files, packed, ranged, sources, web_ask, web_copy
from raylway.errors import UserError


def frame(rows: int, start: int = 0) -> pd.DataFrame:
    numbers = range(start, start + rows)
    return pd.DataFrame({"n": numbers, "word": [f"w{n % 7}" for n in numbers], "y": ["ab"[n % 2] for n in numbers]})


def written(kind: str, table: pd.DataFrame, folder: Path) -> bytes:
    path = folder / f"written.{kind}"
    match kind.partition(".")[0]:
        case "csv":
            table.to_csv(path, index=False)
        case "jsonl":
            table.to_json(path, orient="records", lines=True)
        case "parquet":
            table.to_parquet(path, row_group_size=400)
        case _:
            made = pa.Table.from_pandas(table, preserve_index=False)
            with pa.ipc.new_file(str(path), made.schema) as writer:
                writer.write_table(made, max_chunksize=400)
    content = path.read_bytes()
    path.unlink()
    return content


def equal(found: pa.Table, wanted: pd.DataFrame) -> None:
    assert found.select(list(wanted)).to_pydict() == wanted.to_dict("list")


def refusal(folder: Path, source: Any, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        sources.sample(job(folder, {"source": source, "target": "y", **data}))
    return str(caught.value)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once, and fetches little at a time."""
    monkeypatch.setattr(web_ask, "_WAITS_S", (0.0,) * 4)
    monkeypatch.setattr(ranged, "BUFFER_BYTES", 1_000)


WAYS: dict[str, dict[str, Any]] = {
    "ranges": {},
    "no ranges": {"ranges": False},
    "no ranges, no stamp": {"ranges": False, "stamps": False},
    "ranges, no stamp": {"stamps": False},
    "chunks": {"ranges": False, "size": "chunks"},
    "chunks, no stamp": {"ranges": False, "size": "chunks", "stamps": False},
}


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "csv.zip", "csv.zst", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("way", WAYS)
def test_every_format_is_read_from_every_server(web: Web, hurried: None, tmp_path: Path, kind: str, way: str) -> None:
    table = frame(2_000)
    address = web.put(f"rows.{kind}", written(kind, table, tmp_path), **WAYS[way])
    found, _, rejects, _ = read(tmp_path, 4_000, source=address)
    assert not rejects
    equal(found, table)
    fetched = [span for _, span in web.asked if span not in ("", "bytes=0-0")]
    assert bool(fetched) == (way == "ranges")


def test_what_is_prepared_is_what_a_file_on_disk_gives(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 10_000)
    text = frame(3_000).to_csv(index=False).encode()
    (tmp_path / "rows.csv").write_bytes(text)
    address = web.put("rows.csv", text)
    mine, theirs = (prepared(tmp_path, {"source": each, "target": "y"}) for each in ("rows.csv", address))
    assert [each.checksum for each in mine.manifest.shards] == [each.checksum for each in theirs.manifest.shards]
    assert theirs.manifest.files == [address]
    web.asked.clear()
    assert prepared(tmp_path, {"source": address, "target": "y"}).manifest.fingerprint == theirs.manifest.fingerprint
    assert web.asked == [("rows.csv", "bytes=0-0")]
    web.put("rows.csv", text.replace(b"w1", b"w2", 1))
    assert prepared(tmp_path, {"source": address, "target": "y"}).manifest.fingerprint != theirs.manifest.fingerprint


def test_names_lists_partitions_and_queries(web: Web, tmp_path: Path) -> None:
    for year in (2012, 2013):
        web.put(f"in/year={year}/city=S%C3%A3o%20Paulo/a b é.csv", frame(20, year).to_csv(index=False).encode())
    folder = "city%3DS%25C3%25A3o%2520Paulo"
    names = [f"{web.address}/in/year={year}/{folder}/a b é.csv?v=a/b=1/c#part" for year in (2012, 2013)]
    found = read(tmp_path, source=names)[0].to_pandas()
    assert found["year"].tolist() == [2012] * 20 + [2013] * 20
    assert set(found["city"]) == {"São Paulo"}
    assert list(found) == ["n", "word", "y", "year", "city"]
    encoded = f"{web.address}/in/year=2012/{folder}/a%20b%20%C3%A9.csv"
    assert read(tmp_path, source=encoded)[0].num_rows == 20


def test_a_file_of_no_bytes_adds_nothing_and_alone_is_told(web: Web, tmp_path: Path) -> None:
    for ranges in (True, False):
        empty = web.put(f"empty-{ranges}.csv", b"", ranges=ranges)
        rows = web.put("rows.csv", frame(10).to_csv(index=False).encode())
        assert read(tmp_path, source=[empty, rows])[0].num_rows == 10
        assert "no rows" in refusal(tmp_path, empty)


def test_gzip_on_the_way_and_gzip_of_the_file(web: Web, tmp_path: Path) -> None:
    content = written("csv.gz", frame(50), tmp_path)
    for name in ("on the way.csv", "the file.csv.gz"):
        address = web.put(name, content, headers={"Content-Encoding": "gzip"})
        equal(read(tmp_path, source=address)[0], frame(50))
    told = refusal(tmp_path, web.put("brotli.csv", content, headers={"Content-Encoding": "br"}))
    assert "the server packs the file" in told and "br" in told


def test_redirects_are_followed_and_not_told(web: Web, tmp_path: Path) -> None:
    web.put("to/rows.csv", frame(10).to_csv(index=False).encode())

    def leading(target: str, status: int = 302) -> str:
        return web.put("from.csv", statuses=[status] * 40, headers={"Location": target})

    for status in (301, 302, 303, 307, 308):
        assert read(tmp_path, source=leading("/to/rows.csv?sig=n0t-for-any-log", status))[0].num_rows == 10
    for target, words in (
        (f"{web.address}/gone?sig=n0t-for-any-log", "is not there"),
        ("http://127.0.0.1/rows.csv?sig=n0t-for-any-log", "not encrypted"),
        ("ftp://127.0.0.1/n0t-for-any-log", "not encrypted"),
        ("https://[n0t-for-any-log/rows.csv", "leads to one that is none"),
        ("/from.csv?sig=n0t-for-any-log", "leads on and on"),
    ):
        told = refusal(tmp_path, leading(target))
        assert words in told and "from.csv" in told
        assert "n0t" not in told


@pytest.mark.parametrize("way", WAYS)
def test_a_connection_that_is_cut_is_never_taken_for_the_end(web: Web, hurried: None, tmp_path: Path, way: str) -> None:
    table = frame(2_000)
    address = web.put("rows.csv", table.to_csv(index=False).encode(), cuts=3, **WAYS[way])
    equal(read(tmp_path, source=address)[0], table)
    assert web.files["rows.csv"].cuts == 0
    told = refusal(tmp_path, web.put("others.csv", table.to_csv(index=False).encode(), cuts=10_000, **WAYS[way]))
    assert "the file can't be read from its server" in told and "4 tries" in told


def test_a_server_that_does_not_say_where_the_file_ends(web: Web, tmp_path: Path) -> None:
    content = frame(10).to_csv(index=False).encode()
    told = refusal(tmp_path, web.put("rows.csv", content, ranges=False, size="nothing"))
    assert "does not say where the file ends" in told


def test_a_busy_server_is_asked_again(web: Web, tmp_path: Path) -> None:
    content = frame(10).to_csv(index=False).encode()
    address = web.put("rows.csv", content, statuses=[503, 429], headers={"Retry-After": "0"})
    assert read(tmp_path, source=address)[0].num_rows == 10
    assert web.files["rows.csv"].statuses == []


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_changes_while_it_is_read_is_told(web: Web, hurried: None, tmp_path: Path, way: str) -> None:
    text = frame(2_000).to_csv(index=False).encode()
    address = web.put("rows.csv", text, **WAYS[way])
    [location] = files.find([address], [], "data.source")
    web.put("rows.csv", text.replace(b"w1", b"w2"), **WAYS[way])
    if location.stamp.startswith(
        web_ask.CHECKSUM
    ):  # this process still has the copy that it took the checksum of; another one has not
        with packed.opened(location) as file:
            assert file.read() == text
        web_copy._copies.clear()
    with pytest.raises(UserError, match="changed or removed while it was read"), packed.opened(location) as file:
        file.read()


def test_a_file_that_changes_between_two_ranges_is_told(web: Web, hurried: None, tmp_path: Path) -> None:
    text = frame(2_000).to_csv(index=False).encode()
    count = iter(range(1_000))

    def before(served: Served) -> None:
        if next(count) == 6:
            served.content = served.content.replace(b"w1", b"w2")

    address = web.put("rows.csv", text, before=before)
    with pytest.raises(UserError, match="changed or removed while it was read"):
        read(tmp_path, 4_000, source=address)


@pytest.mark.parametrize(
    ("path", "how", "words"),
    [
        ("*.csv", {}, ["a web server can't be searched", "list"]),
        ("part-[0-9].csv", {}, ["a web server can't be searched"]),
        ("", {}, ["folders of a web server can't be listed"]),
        ("in/", {}, ["folders of a web server can't be listed"]),
        ("gone.csv", {}, ["the source is not there", "404"]),
        ("rows.xyz", {}, ["of no known format", "data.read.format"]),
        ("rows", {}, ["of no known format"]),
        ("a.csv", {"statuses": [403] * 9}, ["the server refuses", "403", "netrc"]),
        ("a.csv", {"statuses": [401] * 9}, ["the server refuses", "401", "netrc"]),
        ("a.csv", {"statuses": [400] * 9}, ["does not give the file", "400"]),
        ("a.csv", {"statuses": [410] * 9}, ["the source is not there", "410"]),
        ("a.csv", {"statuses": [500] * 9}, ["can't be read from its server", "500", "4 tries"]),
        ("a.csv", {"headers": {"Content-Type": "text/html; charset=utf-8"}}, ["answers with a web page"]),
    ],
)
def test_what_is_refused(
    web: Web, hurried: None, tmp_path: Path, path: str, how: dict[str, Any], words: list[str]
) -> None:
    address = f"{web.address}/{path}"
    if how:
        web.put(path, b"n,y\n1,a\n", **how)
    told = refusal(tmp_path, address)
    assert all(word in told for word in [*words, address]), told


def test_an_address_that_is_none(tmp_path: Path) -> None:
    assert "this is no address" in refusal(tmp_path, "https://[half/rows.csv")
    assert "names no file" in refusal(tmp_path, "https:///rows.csv")


def test_a_declared_format_needs_no_ending(web: Web, tmp_path: Path) -> None:
    content = frame(10).to_csv(index=False).encode()
    address = web.put("export", content, headers={"Content-Type": "text/html"})
    assert read(tmp_path, source=f"{address}?as=csv", read={"format": "csv"})[0].num_rows == 10


def test_a_certificate_that_is_not_trusted(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = web.put("rows.csv", frame(10).to_csv(index=False).encode())
    monkeypatch.delenv("SSL_CERT_FILE")
    web_ask._pool.cache_clear()
    told = refusal(tmp_path, address)
    assert "certificate is not trusted" in told and "SSL_CERT_FILE" in told and "self-signed" in told
    assert web.asked == []


def test_a_server_that_does_not_answer(tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_ask, "_TIMEOUT", urllib3.Timeout(connect=0.2, read=0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        told = refusal(tmp_path, f"http://127.0.0.1:{port}/rows.csv")
        assert "can't be read from its server" in told and "timed out" in told
    assert "refused" in refusal(tmp_path, f"https://127.0.0.1:{port}/rows.csv")


def login(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_http_is_read_without_a_login_and_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password n0t\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with web_server.serving() as web:
        content = frame(10).to_csv(index=False).encode()
        address = web.put("rows.csv", content)
        assert read(tmp_path, source=address)[0].num_rows == 10
        assert "401" in refusal(tmp_path, web.put("mine.csv", content, login=login("me", "n0t")))
        monkeypatch.setenv("http_proxy", web.address)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert read(tmp_path, source="http://made.example/rows.csv")[0].num_rows == 10
        assert read(tmp_path, source=address)[0].num_rows == 10


def test_a_login_is_written_nowhere(web: Web, tmp_path: Path) -> None:
    secret = "n0t-for-any-log-5d2b"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1 login me password {secret}\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    address = web.put("rows.csv", frame(300).to_csv(index=False).encode(), login=login("me", secret))
    job(tmp_path, {"source": address, "target": "y"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "home"))
        done = raylway("prepare", "job.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read 300 rows" in done.stderr
    hidden = [secret, login("me", secret).split()[1]]
    shown = [done.stdout, done.stderr]
    shown += [path.read_bytes().decode("latin-1") for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not any(secret in text for text in shown for secret in hidden)
