"""Every way to split, through preparation: what falls where, what is refused, and what more files change."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from preparing import job, prepared

from raylway.data import items, prepare, sources
from raylway.errors import UserError
from raylway.features.prepared import DUPLICATES, LINE_BITS, SPLITS, Prepared
from raylway.runs.progress import Reporter


def side_by_row(found: Prepared) -> dict[tuple[str, int], str]:
    """By file name and line."""
    result = {}
    for side in SPLITS:
        rows = found.rows(side)
        for row in rows.take(np.arange(len(rows)))[3].tolist():
            result[found.manifest.files[row >> LINE_BITS], row & ((1 << LINE_BITS) - 1)] = side
    return result


def features(prepared: Prepared) -> set[str]:
    transform = prepared.manifest.transform
    return {feature.column for feature in (*transform.numeric, *transform.categorical)}


def sides_of(frame: pd.DataFrame, found: Prepared) -> pd.Series:
    """The side of each row of `rows.csv`; missing if it is left out."""
    by_row = side_by_row(found)
    return pd.Series([by_row.get(("rows.csv", line)) for line in range(2, len(frame) + 2)], frame.index)


def table(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"patient": rng.integers(0, 30, rows), "x": rng.normal(size=rows).round(3)})
    frame["day"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 60, rows), "D")
    frame["day"] = frame["day"].dt.strftime("%Y-%m-%d")
    frame["y"] = np.where(rng.random(rows) < 0.4, "yes", "no")
    return frame


def test_a_group_is_on_one_side_and_is_no_feature(tmp_path):
    frame = table()
    frame.to_csv(tmp_path / "rows.csv", index=False)
    found = prepared(tmp_path, {"source": "rows.csv", "target": "y", "split": {"by": "group", "column": "patient"}})
    sides = sides_of(frame, found)
    assert (sides.groupby(frame["patient"]).nunique() == 1).all() and set(sides) == set(SPLITS)
    assert 0.1 < (sides == "test").mean() < 0.3 and 0.03 < (sides == "validation").mean() < 0.2
    assert "patient" not in features(found)
    assert any("rows of one group stay on one side" in text for text in found.manifest.decisions)


@pytest.mark.parametrize("column", ["day", "x", "patient"])
def test_the_latest_rows_are_for_test(tmp_path, column):
    frame = table()
    frame.to_csv(tmp_path / "rows.csv", index=False)
    found = prepared(tmp_path, {"source": "rows.csv", "target": "y", "split": {"by": "time", "column": column}})
    sides = sides_of(frame, found)
    bounds = {side: (frame[column][sides == side].min(), frame[column][sides == side].max()) for side in SPLITS}
    assert bounds["train"][1] < bounds["validation"][0] <= bounds["validation"][1] < bounds["test"][0]
    assert 0.15 < (sides == "test").mean() < 0.25


def test_time_is_cut_at_instants(tmp_path):
    frame = table()
    frame.to_csv(tmp_path / "rows.csv", index=False)
    data = {"source": "rows.csv", "target": "y"}
    at = {"validation": "2024-02-01", "test": "2024-02-15T00:00:00Z"}
    sides = sides_of(frame, prepared(tmp_path, data | {"split": {"by": "time", "column": "day", "at": at}}))
    expected = np.where(
        frame["day"] >= "2024-02-15", "test", np.where(frame["day"] >= "2024-02-01", "validation", "train")
    )
    assert sides.tolist() == expected.tolist()
    only_test = {"by": "time", "column": "x", "at": {"test": 0.5}}
    sides = sides_of(frame, prepared(tmp_path, data | {"split": only_test}))
    assert sides.tolist() == np.where(frame["x"] >= 0.5, "test", "train").tolist()
    with pytest.raises(UserError, match="'soon' is no place in the column 'day'"):
        prepared(tmp_path, data | {"split": {"by": "time", "column": "day", "at": {"test": "soon"}}})


def test_a_row_without_an_instant_is_named(tmp_path):
    frame = table()
    frame.loc[7, "day"] = "yesterday"
    frame.to_csv(tmp_path / "rows.csv", index=False)
    few = prepared(tmp_path, {"source": "rows.csv", "target": "y", "split": {"by": "time", "column": "day"}})
    assert few.manifest.account.quarantined == 1
    assert any("first rows.csv:9: 'yesterday'" in sentence for sentence in few.manifest.decisions)
    frame.loc[7::20, "day"] = "yesterday"
    frame.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(UserError, match=r"rows.csv:9: column 'day': no number, date or time"):
        prepared(tmp_path, {"source": "rows.csv", "target": "y", "split": {"by": "time", "column": "day"}})
    with pytest.raises(UserError, match="there is no column 'dya'") as caught:
        prepared(tmp_path, {"source": "rows.csv", "target": "y", "split": {"by": "time", "column": "dya"}})
    assert "'day'" in caught.value.fix


def test_too_few_groups_or_instants(tmp_path):
    frame = table()
    frame["patient"] = frame["patient"] % 2
    frame.to_csv(tmp_path / "rows.csv", index=False)
    for by, words in (("group", "too few groups to divide"), ("time", "too few instants to divide")):
        with pytest.raises(UserError, match=words):
            prepared(tmp_path, {"source": "rows.csv", "target": "y", "split": {"by": by, "column": "patient"}})


def test_a_column_says_the_side(tmp_path):
    frame = table()
    frame["part"] = np.resize(["train", "train", "test", "validation"], len(frame))
    again = frame.iloc[[0, 2]].assign(part=["test", "train"])
    frame = pd.concat([frame, again], ignore_index=True)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    data = {"source": "rows.csv", "target": "y", "split": {"by": "column", "column": "part"}}
    found = prepared(tmp_path, data)
    sides = sides_of(frame, found)
    assert sides[1:400].tolist() == frame["part"][1:400].tolist() and sides[400] == "test"
    assert sides[[0, 401]].isna().all()  # the row that trains leaves, whichever comes first
    assert found.manifest.account.duplicates == 2 and "part" not in features(found)
    assert any("2 train rows are left out as duplicates" in text for text in found.manifest.decisions)
    listed = pa.ipc.open_file(found.folder / DUPLICATES).read_all().to_pydict()
    assert listed == {"row_id": [2, 403], "first_row_id": [402, 4]}
    frame.loc[9, "part"] = "dev"
    frame.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(UserError, match=r"rows.csv:11: column 'part': none of train, validation and test") as caught:
        prepared(tmp_path, data)
    assert "'dev'" in caught.value.found
    frame.assign(part="test").to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(UserError, match="gives all rows to the other sides"):
        prepared(tmp_path, data)


def test_separate_files_are_the_sides(tmp_path):
    frame = table()
    frame[:300].to_csv(tmp_path / "a.csv", index=False)
    frame[299:].to_csv(tmp_path / "b.csv", index=False)
    found = prepared(tmp_path, {"source": {"train": "a.csv", "test": "b.csv"}, "target": "y"})
    sides = side_by_row(found)
    assert len(sides) == 400 and ("a.csv", 301) not in sides and sides["b.csv", 2] == "test"
    assert {side for (name, _), side in sides.items() if name == "a.csv"} == {"train"}
    assert {side for (name, _), side in sides.items() if name == "b.csv"} == {"test"}
    with pytest.raises(UserError, match="can't be on two sides"):
        prepared(tmp_path, {"source": {"train": "a.csv", "test": "a.csv"}, "target": "y"})


@pytest.mark.parametrize(
    "split", [{}, {"by": "random"}, {"by": "group", "column": "patient"}, {"by": "time", "column": "day"}]
)
def test_check_counts_what_preparation_counts(tmp_path, split):
    table().to_csv(tmp_path / "rows.csv", index=False)
    loaded = job(tmp_path, {"source": "rows.csv", "target": "y", "split": split})
    shown, account = sources.sample(loaded), prepared(tmp_path, {"source": "rows.csv", "target": "y", "split": split})
    counts = account.manifest.account
    assert (shown.train, shown.validation, shown.test) == (counts.train, counts.validation, counts.test)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of the items that are read from now on."""
    seen: list[str] = []
    real = items.read

    def counted(item, reading):
        seen.extend(part.location.name for part in item.parts)
        return real(item, reading)

    monkeypatch.setattr(items, "read", counted)
    return seen


def test_new_files_move_no_row_and_only_they_are_read(tmp_path, monkeypatch):
    frame = table(600)
    (tmp_path / "in").mkdir()
    frame[:300].to_csv(tmp_path / "in" / "b.csv", index=False)
    data = {"source": "in", "target": "y"}
    first = prepared(tmp_path, data)
    seen = reads(monkeypatch)
    frame[295:500].to_csv(tmp_path / "in" / "a.csv", index=False)
    second = prepared(tmp_path, data)
    assert seen == ["in/a.csv"] and second.manifest.files == ["in/b.csv", "in/a.csv"]
    assert second.manifest.lineage.base == first.manifest.fingerprint
    before, after = side_by_row(first), side_by_row(second)
    assert all(after[row] == side for row, side in before.items()) and second.manifest.account.duplicates == 5
    new = [side for row, side in after.items() if row not in before]
    assert (new.count("test"), new.count("validation")) == (40, 20)
    frame[500:].to_csv(tmp_path / "in" / "c.csv", index=False)
    third = prepared(tmp_path, data)
    assert seen == ["in/a.csv", "in/c.csv"] and [each.files for each in third.manifest.lineage.generations] == [1, 1, 1]
    last = side_by_row(third)
    assert all(last[row] == side for row, side in after.items())
    assert prepared(tmp_path, data).folder == third.folder
    assert prepare.fingerprint(job(tmp_path, data), tmp_path / "runs") == third.manifest.fingerprint
    frame[500:].to_csv(tmp_path / "in" / "c.csv", index=False, float_format="%.2f")
    fourth = prepared(tmp_path, data)  # c is another file now: it continues the second
    assert fourth.manifest.lineage.base == second.manifest.fingerprint
    frame[1:300].to_csv(tmp_path / "in" / "b.csv", index=False)
    anew = prepared(tmp_path, data)
    assert anew.manifest.lineage.base == "" and len(anew.manifest.lineage.generations) == 1


@pytest.mark.parametrize("split", [{"by": "group", "column": "patient"}, {"by": "time", "column": "day"}])
def test_new_rows_of_an_old_group_or_time_go_where_it_is(tmp_path, split):
    frame = table(600)
    (tmp_path / "in").mkdir()
    frame[:300].to_csv(tmp_path / "in" / "a.csv", index=False)
    data = {"source": "in", "target": "y", "split": split}
    before = side_by_row(prepared(tmp_path, data))
    frame[300:].to_csv(tmp_path / "in" / "b.csv", index=False)
    after = side_by_row(prepared(tmp_path, data))
    assert all(after[row] == side for row, side in before.items())
    lines = [*(("in/a.csv", line) for line in range(2, 302)), *(("in/b.csv", line) for line in range(2, 302))]
    unit = frame[split["column"]]
    assert (pd.Series([after[row] for row in lines]).groupby(unit).nunique() == 1).all()


@pytest.mark.parametrize("by", ["stratified", "random", "group", "time", "column", "files"])
@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_what_is_said_of_more_files_is_true(tmp_path, by, duplicates):
    """What was read now, in the product's own count; no side of an earlier row changes but as the decisions say."""
    rng = np.random.default_rng(7)
    (tmp_path / "in").mkdir()
    split = {"by": by, "column": {"group": "patient", "time": "day", "column": "side"}.get(by)}
    data = {"source": "in", "target": "y", "split": split, "clean": {"duplicates": duplicates}}
    names = ["b.csv", "z.csv", "a.csv", "m.csv"]
    if by == "files":
        names = ["train5.csv", "test5.csv", "train1.csv", "test1.csv"]
        data |= {"source": {"train": "in/train*.csv", "test": "in/test*.csv"}, "split": {}}
        few(table(60, 99), rng).to_csv(tmp_path / "in" / "test3.csv", index=False)
    before, known, moved = {}, 0, 0
    for seed, name in enumerate(names):
        frame = few(table(80, seed), rng)
        if by == "column":
            frame["side"] = rng.choice(SPLITS, 80, p=[0.6, 0.2, 0.2])
        frame.to_csv(tmp_path / "in" / name, index=False)
        said = io.StringIO()
        found = prepare.prepare(job(tmp_path, data), tmp_path / "runs", Reporter("lines", said))
        size = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
        read = f"read {size - known:,} of {size:,} bytes; the others were read before"
        assert (read in said.getvalue()) == bool(known), said.getvalue()
        after = side_by_row(found)
        changed = {row for row, side in before.items() if after.get(row) != side}
        assert all(after.get(row) is None for row in changed)  # none stands on another side
        keeps = [text for text in found.manifest.decisions if "keep their sides" in text]
        assert len(keeps) == bool(before)
        if changed:
            assert keeps[0].endswith("keep their sides, but for those that are left out as duplicates")
        assert found.manifest.leak_test is not None and found.manifest.leak_test.passed
        before, known, moved = after, size, moved + len(changed)
    assert bool(moved) == (by in ("column", "files"))


def few(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """A table some of whose rows stand in others too."""
    patient, x = rng.integers(0, 6, (2, len(frame)))
    return frame.assign(patient=patient, x=x, day=[f"2024-01-0{number + 1}" for number in patient])


@pytest.mark.parametrize("by", ["stratified", "random", "group", "time", "at", "column", "files"])
@pytest.mark.parametrize("seed", range(4))
def test_any_split_of_any_table_is_that_of_pandas(tmp_path, by, seed):
    """Exact counts, no straddling rows, the right ones left out, and each listed with the row that it repeats."""
    rng = np.random.default_rng([seed, len(by)])
    size = int(rng.integers(30, 200))
    frame = table(size, seed).assign(x=rng.integers(0, int(rng.choice([4, 40, 10**6])), size))
    frame["day"] = (frame["x"] * 7 + frame["patient"]) % 23
    duplicates = ["drop", "keep"][seed % 2]
    validation, test = [(0.1, 0.2), (0.0, 0.33), (0.05, 0.3), (0.25, 0.25)][seed]
    data = {"source": "rows.csv", "target": "y", "clean": {"duplicates": duplicates}}
    split = {"by": by, "validation": f"{100 * validation:g}%", "test": f"{100 * test:g}%"}
    split["column"] = {"group": "patient", "time": "day", "column": "side"}.get(by)
    own = pd.Series(rng.choice(SPLITS, size, p=[0.6, 0.2, 0.2]), frame.index)
    columns = list(frame)
    if by == "at":
        split = {"by": "time", "column": "day", "at": {"validation": 12, "test": 18}}
        own = pd.Series(np.select([frame["day"] >= 18, frame["day"] >= 12], ["test", "validation"], "train"))
    if by == "files":
        for side in SPLITS:
            frame[own == side].to_csv(tmp_path / f"{side}.csv", index=False)
        data["source"] = {side: f"{side}.csv" for side in SPLITS}
        place = {row: (f"{own[row]}.csv", 2 + int((own[:row] == own[row]).sum())) for row in frame.index}
    else:
        (frame.assign(side=own) if by == "column" else frame).to_csv(tmp_path / "rows.csv", index=False)
        data["split"] = split
        place = {row: ("rows.csv", row + 2) for row in frame.index}
    found = prepared(tmp_path, data)
    by_place, account = side_by_row(found), found.manifest.account
    side = pd.Series({row: by_place.get(place[row]) for row in frame.index})
    kept = frame.assign(side=side)[side.notna()]
    assert (kept.groupby(columns)["side"].nunique() == 1).all() and len(kept) == account.kept
    first = ~frame.duplicated(columns)
    if by in ("at", "column", "files"):
        furthest = own.map(SPLITS.index).groupby([frame[name] for name in columns]).transform("max")
        assert (own[kept.index] == kept["side"]).all()
        assert (kept["side"].map(SPLITS.index) == furthest[kept.index]).all()
        assert len(kept) == (first.sum() if duplicates == "drop" else (own.map(SPLITS.index) == furthest).sum())
    else:
        assert side.notna().equals(first if duplicates == "drop" else first | True)
    if by in ("stratified", "random") and duplicates == "drop":
        wanted = [int(np.floor(share * len(kept) + 0.5)) for share in (validation, test)]
        assert [account.validation, account.test] == wanted
        for name, total in zip(("validation", "test"), wanted, strict=True):
            got = kept["y"][kept["side"] == name].value_counts()
            share = total * kept["y"].value_counts() / len(kept)
            assert by == "random" or (share - got.reindex(share.index, fill_value=0)).abs().max() < 1
    if by == "group":
        assert (kept.groupby("patient")["side"].nunique() == 1).all()
    if by == "time":
        ends = kept.groupby("side")["day"].agg(["min", "max"])
        sides = [name for name in SPLITS if name in ends.index]
        assert all(ends["max"][one] < ends["min"][other] for one, other in itertools.pairwise(sides))
    _check_duplicates(frame, side, {at: row for row, at in place.items()}, found)


def _check_duplicates(frame, side, where, found):
    """Each row that is left out is listed once, with an equal row that stays."""
    listed = pa.ipc.open_file(str(found.folder / DUPLICATES)).read_all().to_pylist()
    assert len(listed) == found.manifest.account.duplicates == side.isna().sum()
    for each in listed:
        copy, original = (
            where[found.manifest.files[row >> LINE_BITS], row & ((1 << LINE_BITS) - 1)]
            for row in (each["row_id"], each["first_row_id"])
        )
        assert frame.loc[copy].equals(frame.loc[original]) and pd.isna(side[copy]) and not pd.isna(side[original])


def test_new_files_that_change_a_type_divide_all_rows_anew(tmp_path):
    frame = table(300)
    (tmp_path / "in").mkdir()
    frame.to_csv(tmp_path / "in" / "a.csv", index=False)
    data = {"source": "in", "target": "y"}
    prepared(tmp_path, data)
    frame.assign(patient=frame["patient"] + 0.5).to_csv(tmp_path / "in" / "b.csv", index=False)
    found = prepared(tmp_path, data)
    assert found.manifest.lineage.base == "" and len(found.manifest.lineage.generations) == 1
    assert any("all rows are divided anew" in text for text in found.manifest.decisions)
    assert (found.manifest.account.test, found.manifest.account.validation) == (120, 60)
