"""Preparation of random dirty files, in one piece and in tiny ones, against a reference in plain Python."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from preparing import prepared

from raylway.data import csv_read, engine, reading
from raylway.features.prepared import LINE_BITS, SPLITS

WHOLE = st.integers(-9, 99).map(str)
POOLS = {
    "whole": WHOLE,
    "real": st.floats(-5, 5).map(repr) | WHOLE | st.sampled_from(["-0.0", "1e3", "2.0"]),
    "word": st.sampled_from(
        ["é", "e\u0301", "NA", "👩‍🚀", "a,b", 'q"q', "l\nm", "x\r\ny", " s ", "\u2028", "\0", "None"]
    ),
    "mixed": st.sampled_from(["1", "2.5", "x", "NA"]),
    "date": st.sampled_from(["2013-01-01", "2013-01-02T05:00:00Z"]),
    "large": st.sampled_from(["4611686018427387905", "4611686018427387906", "9223372036854775807"]),
    "odd": st.sampled_from(["007", "1.50", "+5", "1e5", "-0", " 3", "nan"]),
}
WORDS = {"NA", "N/A", "NaN", "nan", "null", "NULL", "None"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@st.composite
def files(draw) -> tuple[dict[str, bytes], list[tuple[tuple[str, int], dict[str, str] | None]]]:
    """Files by name, and their records in order: place and cells, None of a record with a cell too many."""
    kinds = draw(st.lists(st.sampled_from(list(POOLS)), min_size=1, max_size=4))
    cells = {
        f"{kind}{index}": POOLS[kind] | st.sampled_from([["", "oops", "1"][draw(st.integers(0, 2))]])
        for index, kind in enumerate(kinds)
    }
    rows = st.fixed_dictionaries({**cells, "y": st.sampled_from("uuuvvv") | st.just("")})
    made, records = {}, []
    for index in range(draw(st.integers(1, 3))):
        name, order = f"part-{index}.csv", draw(st.permutations([*cells, "y"]))
        stream = io.StringIO(newline="")
        dialect = {"delimiter": draw(st.sampled_from(",;\t|")), "lineterminator": draw(st.sampled_from(["\n", "\r\n"]))}
        writer = csv.writer(stream, quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])), **dialect)
        writer.writerow(order)
        for row in draw(st.lists(rows, min_size=2, max_size=12)):
            line = 1 + len(re.findall("\r\n|\n|\r", stream.getvalue()))
            whole = draw(st.integers(0, 30)) > 0
            writer.writerow([row[column] for column in order] + ["more"] * (not whole))
            records.append(((name, line), row if whole else None))
        made[name] = ("\ufeff" * draw(st.booleans()) + stream.getvalue()).encode(
            draw(st.sampled_from(["utf-8", "utf-16"]))
        )
    return made, records


def expected(records: list[Any], missing: str, duplicates: str) -> dict[str, Any]:
    """What becomes of each record, with half of the cells of a column of numbers allowed to be none."""
    good = [row for _, row in records if row]
    kinds = {name: kind([row[name] for row in good if row[name]]) for name in (good[0] if good else {})}
    found: dict[str, Any] = {"kept": [], "quarantined": [], "duplicates": 0, "missing": 0}
    seen = set()
    for place, row in records:
        values = {name: value(cell, kinds[name]) for name, cell in sorted((row or {}).items())}
        if row is None or "invalid" in values.values():
            found["quarantined"].append(place)
        elif None in (values.values() if missing == "drop" else [values["y"]]):
            found["missing"] += 1
        elif duplicates == "drop" and tuple(values.values()) in seen:
            found["duplicates"] += 1
        else:
            found["kept"].append(place)
            seen.add(tuple(values.values()))
    return found


def kind(cells: list[str]) -> str:
    numbers = [cell.strip(" ") for cell in cells if NUMBER.fullmatch(cell.strip(" "))]
    bad = len(cells) - len(numbers) - sum(cell in WORDS for cell in cells)
    if not numbers or 2 * bad > len(cells) or any(re.match(r"[+-]?0\d", number) for number in numbers):
        return "text"
    return "whole" if all(re.fullmatch(r"[+-]?\d+", number) for number in numbers) else "real"


def value(cell: str, kind: str) -> Any:
    if not cell or (kind != "text" and cell in WORDS):
        return None
    if kind == "text":
        return f"text {cell}"
    if not NUMBER.fullmatch(cell.strip(" ")):
        return "invalid"
    return int(cell) if kind == "whole" else float(cell)


def places(found: Any, name: str) -> list[tuple[str, int]]:
    path = found.folder / name
    return [(Path(each["file"]).name, each["line"]) for each in map(json.loads, path.read_bytes().splitlines())]


@settings(max_examples=12)
@given(files(), st.sampled_from(["drop", "impute"]), st.sampled_from(["drop", "keep"]), st.sampled_from([5, 30, 100]))
def test_every_record_has_the_fate_that_the_rules_say(made, missing, duplicates, step):
    content, records = made
    wanted = expected(records, missing, duplicates)
    counts = {key: len(each) if isinstance(each, list) else each for key, each in wanted.items()}
    rows = dict(records)
    kept = [rows[place] for place in wanted["kept"]]
    features = [name for name in (kept[0] if kept else {}) if name != "y" and any(row[name].strip() for row in kept)]
    assume(len(kept) > 2 and features and len({row["y"] for row in kept}) == 2)  # otherwise it is refused
    assume(2 * counts["quarantined"] <= len(records))
    data = {
        "source": "in",
        "target": "y",
        "clean": {"missing": missing, "duplicates": duplicates, "max_invalid": "50%"},
        "split": {"by": "random", "validation": "0%", "test": "20%"},
        "features": {"categorical": features},
    }
    for size in (16 << 20, step):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            for place, name, number in (
                (csv_read, "RANGE_BYTES", size),
                (engine, "FEW", 10**6),
                (reading, "FEW_HERE", 10**6),
            ):
                patch.setattr(place, name, number)
            (Path(folder) / "in").mkdir()
            for name, text in content.items():
                (Path(folder) / "in" / name).write_bytes(text)
            found = prepared(Path(folder), data, task="classification")
            account = found.manifest.account
            assert {key: getattr(account, key) for key in counts} == counts and account.read == len(records)
            assert places(found, "quarantine/rows.jsonl") == wanted["quarantined"]
            ids = np.concatenate([found.rows(side).take(np.arange(len(found.rows(side))))[3] for side in SPLITS])
            names = found.manifest.files
            places_kept = [(Path(names[row >> LINE_BITS]).name, int(row) & (2**LINE_BITS - 1)) for row in ids.tolist()]
            assert sorted(places_kept) == wanted["kept"]
