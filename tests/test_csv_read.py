"""Reading CSV by ranges and streams: any text is read as Python's csv module reads it, with its line numbers."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raylway.data import csv_read, csv_text, items
from raylway.data.items import Reading, Stream
from raylway.data.location import Location
from raylway.data.packed import zip_members
from raylway.errors import UserError

PIECES = st.sampled_from(
    ["a", "b1", "ä", "😀", "\u2028", " ", "NA", ",", ";", '"', '""', "\n", "\r\n", "\r", "x y", "\0", "'", "\\"]
)
CELLS = st.lists(PIECES, max_size=4).map("".join)


def read(path: Path, step: int, by_range: bool) -> tuple[list[list[str | None]], list[int], list[tuple[int, str]]]:
    """Rows, their lines, and the rejects' lines and reasons, read about `step` bytes at a time."""
    location = Location(path.name, str(path))
    heading = csv_read.heading(location)
    assert heading is not None
    parts: list[items.Part] = [Stream(0, location, heading, location.size)]
    if by_range:
        ranges = [items.Range(0, location, heading, a, b, False, 0) for a, b in items.ranges(parts[0], step)]
        parts = items.placed([(part, items.scan(part)) for part in ranges]) or parts
    rows, lines, rejects = [], [], []
    reading = Reading(heading.columns, [], step, as_text=heading.columns)
    for part in parts:
        for piece in items.read(items.Item(0, [part]), reading):
            texts = [column.cast("string").to_pylist() for column in piece.table.columns[:-1]]
            rows += [list(row) for row in zip(*texts, strict=True)]
            lines += piece.table[items.ROW_ID].to_pylist()
            rejects += [(reject.row_id, reject.reason) for reject in piece.facts.rejects]
    return rows, lines, rejects


def reference(text: str, width: int) -> tuple[list[list[str | None]], list[int], list[int]]:
    """The same by Python's strict csv module: rows of the right width, their lines, and the lines of the others.

    Raises:
        csv.Error: A quoted cell is open at the end.
    """
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(iter(lines), strict=True)
    next(reader)
    rows, starts, others = [], [], []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error:
            if reader.line_num == len(lines) and _is_open(lines[line - 1 :]):
                raise
            others.append(line)
            continue
        if row is None:
            return rows, starts, others
        if len(row) == width:
            rows.append([cell or None for cell in row])
            starts.append(line)
        elif row:
            others.append(line)


def _is_open(record: list[str]) -> bool:
    """Whether the csv module takes a further line into the record."""
    try:
        list(csv.reader([*record, "\n"], strict=True))
    except csv.Error as error:
        return str(error) == "unexpected end of data"
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csv")


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.integers(1, 40),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_csv_writes_is_read_back_in_ranges_and_streams(folder, rows, line_end, quoting, step, bom):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator=line_end, quoting=quoting)
    writer.writerows([("p", "q", "r"), *rows])
    text = stream.getvalue()
    path = folder / "written.csv"
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
    expected = reference(text, 3)
    for by_range in (False, True):
        found, lines, rejects = read(path, step, by_range)
        assert (found, lines, [line for line, _ in rejects]) == expected
    if quoting != csv.QUOTE_MINIMAL:  # which leaves a lone CR bare, so that csv itself can't read it back
        assert expected[0] == [[cell or None for cell in row] for row in rows]


@given(st.lists(PIECES, max_size=25).map("".join), st.integers(1, 30))
@example('1,"5 inch\n2,ok\n3,"x"\n', 4)
@example('1,a"b\n2,a"\n', 4)
@example('1,5" pipe\n2,6" pipe\n', 3)
@example("1,a\r2,b\r3,c", 5)
@example('"a"b,c\n\n\n"x\r\ny",z\r\n', 2)
@settings(max_examples=120, deadline=None)
def test_any_text_is_read_as_the_csv_module_reads_it(folder, text, step):
    path = folder / "any.csv"
    path.write_bytes(("p,q\n" + text).encode())
    try:
        expected = reference("p,q\n" + text, 2)
    except csv.Error:
        expected = None
    for by_range in (False, True):
        if expected is None:
            with pytest.raises(UserError, match="never closes"):
                read(path, step, by_range)
        else:
            rows, lines, rejects = read(path, step, by_range)
            assert (rows, lines, [line for line, _ in rejects]) == expected


def test_pandas_tables_come_back_at_any_step(folder):
    frame = pd.DataFrame({"id": range(50), "text": ['say "hi"', "two\nlines", "plain", "a,b", "ü\u2028z"] * 10})
    path = folder / "pandas.csv"
    frame.to_csv(path, index=False)
    for step in (7, 64, 501, 10**6):
        rows, lines, rejects = read(path, step, by_range=True)
        assert rows == [[str(number), text] for number, text in frame.itertuples(index=False)]
        assert lines == [2 + number + (number + 3) // 5 for number in range(50)] and not rejects


def test_ragged_rows_are_named_with_line_and_text(folder):
    path = folder / "ragged.csv"
    path.write_bytes(b'p,q\n1,"two\nlines"\n\n3\n4,x,y\n5,ok')
    for step in (3, 100):
        rows, lines, rejects = read(path, step, by_range=True)
        assert rows == [["1", "two\nlines"], ["5", "ok"]] and lines == [2, 7]
        assert rejects == [
            (5, "too few cells: 1 where the heading has 2"),
            (6, "too many cells: 3 where the heading has 2"),
        ]


@given(st.lists(st.sampled_from(["", "a", "p", '"', "\n", "\0"]), max_size=6), st.integers(1, 20))
@settings(max_examples=40)
def test_a_single_column_keeps_its_empty_cells(folder, cells, step):
    path = folder / "single.csv"
    pd.DataFrame({"p": pd.Series(cells, dtype="str")}).to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    for by_range in (False, True):
        rows, _, rejects = read(path, step, by_range)
        assert rows == [[cell or None] for cell in cells] and not rejects


@pytest.mark.parametrize("quote", ["", '5" '])  # the second is irregular: the slower reader
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_heading_that_stands_again_is_no_row(folder, quote, mark):
    """Files that were joined, byte order marks and all."""
    path = folder / "joined.csv"
    part = f'{mark}"p",q,r\n1,{quote}q,r\np,{quote}q,2\n'
    path.write_text(part * 3, "utf-8")
    for step in (3, 11, 100):
        for by_range in (False, True):
            rows, lines, rejects = read(path, step, by_range)
            assert rows == [["1", f"{quote}q", "r"], ["p", f"{quote}q", "2"]] * 3 and lines == [2, 3, 5, 6, 8, 9]
            assert rejects == [(4, "the row repeats the heading"), (7, "the row repeats the heading")]


def test_text_after_a_closing_quote_is_told_and_not_mended(folder):
    path = folder / "after.csv"
    path.write_bytes(rb"p,q" b"\n" rb'1,"say \"hi\" you"' b"\n" rb'2,"fine"' b"\n" rb'3,"a\nb"c' b'\n4,"x\ny" \n5,ok\n')
    for by_range in (False, True):
        rows, lines, rejects = read(path, 5, by_range)
        assert rows == [["2", "fine"], ["5", "ok"]] and lines == [3, 7]
        assert rejects == [(line, "text follows the closing quote of a cell") for line in (2, 4, 5)]


def test_nul_is_a_character_of_a_cell(folder):
    path = folder / "nul.csv"
    path.write_bytes(b"p,q\n1,a\0b\n\0,c\n")
    for by_range in (False, True):
        assert read(path, 4, by_range) == ([["1", "a\0b"], ["\0", "c"]], [2, 3], [])


def test_a_cell_that_is_not_utf8_costs_its_row_only(folder):
    path = folder / "latin.csv"
    for quote in (b"", b'5" '):  # the second is irregular: the slower reader
        path.write_bytes(b"p,q\n1,fine\n2," + quote + b"caf\xe9\n3,\xc3\xa9\n")
        rows, lines, rejects = read(path, 100, by_range=True)
        assert rows == [["1", "fine"], ["3", "é"]] and lines == [2, 4]
        assert rejects == [(3, "the cell is not UTF-8")]


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "zip"])
def test_packed_files_read_like_plain_ones(tmp_path, ending):
    text = "p;q\n" + "".join(f'{number};"a;{number}"\n' for number in range(500))
    path = tmp_path / f"rows.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/._rows.csv", b"\0\1")
            archive.writestr("rows.csv", text)
    else:
        path.write_bytes(gzip.compress(text.encode()) if ending == "csv.gz" else text.encode())
    location = Location(path.name, str(path))
    if ending == "zip":
        (location,) = zip_members(location)
    heading = csv_read.heading(location)
    parsed = list(csv_read.read_stream(location, heading, 100))
    assert heading.delimiter == ";" and len(parsed) > 10
    assert [cell for part in parsed for cell in part.columns["q"].to_pylist()] == [f"a;{n}" for n in range(500)]
    assert [line for part in parsed for line in part.lines.tolist()] == list(range(2, 502))


def test_a_cut_archive_is_named(tmp_path):
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(gzip.compress(b"p,q\n" + b"1,2\n" * 10_000)[:-20])
    location = Location("cut.csv.gz", str(path))
    with pytest.raises(UserError, match=r"cut.csv.gz: the compressed file is damaged"):
        list(csv_read.read_stream(location, csv_text.Heading(",", ["p", "q"], 4, 2), 1 << 20))


@pytest.mark.parametrize(
    ("data", "columns", "delimiter"),
    [
        (b"a,b\n", ["a", "b"], ","),
        (b'\xef\xbb\xbf"id","b"\r\n1,2', ["id", "b"], ","),
        (b"\xef\xbb\xbf\xef\xbb\xbf\nid,b\n", ["id", "b"], ","),
        (b"\r\n\n a;b,c;d\n", [" a", "b,c", "d"], ";"),
        (b'"x,y,z"\tq\n', ["x,y,z", "q"], "\t"),
        (b"a|b", ["a", "b"], "|"),
        (b"single", ["single"], ","),
        (b'"two\nlines",b\r1,2\r', ["two\nlines", "b"], ","),
        ("größe,ort\n".encode(), ["größe", "ort"], ","),
    ],
)
def test_headings(data, columns, delimiter):
    found = csv_text.read_heading(data, True, "f.csv")
    assert (found.columns, found.delimiter) == (columns, delimiter)


@pytest.mark.parametrize("data", [b"", b"\n", b"  \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_blank_file_has_no_heading(data):
    assert csv_text.read_heading(data, True, "f.csv") is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a,b\n".encode("utf-16"), "not UTF-8"),
        ("a,b\n".encode("utf-16-le"), "UTF-16 or no text"),
        (b'a,"b"c\n', "text follows the closing quote"),
        ("größe,b\n".encode("latin-1"), "not UTF-8"),
        (b"a,b,a\n1,2,3\n", "same name"),
        (b",b\n1,2\n", "column 1 has no name"),
        (b'"a,b\n1,2\n', "does not end"),
    ],
)
def test_headings_that_are_refused(data, words):
    with pytest.raises(UserError, match=words) as caught:
        csv_text.read_heading(data, True, "f.csv")
    assert "f.csv" in str(caught.value)
