"""Every way to split, through preparation: what falls where, what is refused, and what more files change."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from preparing import job, prepared

from raylway.data import items, prepare, sources
from raylway.errors import UserError
from raylway.features.prepared import DUPLICATES, LINE_BITS, SPLITS, Prepared


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
    for by, words in (("group", "2 groups can't be divided"), ("time", "2 instants can't be divided")):
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
