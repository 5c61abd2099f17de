"""What `raylway check` sees of a source, what a user hears of a mistake, and files to predict."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from preparing import job

from raylway.data import assessment, files, items, opening, outcome, roles, sources
from raylway.errors import UserError


def table(rows: int = 60) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": range(rows),
            "size": np.arange(rows) / 4,
            "colour": ["red", "green", "blue"] * (rows // 3),
            "note": [f"a remark about {n}" for n in range(rows)],
            "sold": ["yes", "no"] * (rows // 2),
        }
    )


def test_a_small_source_is_judged_exactly_and_without_ray_or_torch(tmp_path):
    table().to_csv(tmp_path / "rows.csv", index=False)
    loaded = job(tmp_path, {"source": "rows.csv", "target": "sold", "features": {"drop": ["id"]}})
    found = sources.sample(loaded)
    assert (found.exact, found.rows, found.train, found.validation, found.test) == (True, 60, 42, 6, 12)
    assert (found.task, found.classes) == ("classification", ["no", "yes"])
    assert (found.numeric, found.categorical) == (["size"], ["colour", "note"])
    by_name = {column.name: column for column in found.columns}
    assert [column.type for column in found.columns] == ["int64", "float64", "string", "string", "string"]
    assert by_name["colour"].distinct == 3 and by_name["sold"].role == "target" and by_name["id"].role == "dropped"
    script = f"""
        import sys
        from pathlib import Path
        from raylway.data.sources import sample
        from raylway.job.load import load_job
        assert sample(load_job(Path({str(tmp_path / "job.yaml")!r}))).rows == 60
        print([name for name in ("ray", "torch") if name in sys.modules])
    """
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zip", "parquet"])
def test_a_large_source_is_estimated(tmp_path, ending):
    frame = table(30_000)
    if ending == "parquet":
        frame.to_parquet(tmp_path / "rows.parquet", row_group_size=5_000)
    else:
        frame.to_csv(tmp_path / f"rows.{ending}", index=False)
    found = sources.sample(job(tmp_path, {"source": f"rows.{ending}", "target": "sold"}), max_bytes=100_000)
    assert not found.exact and found.rows_read < 15_000
    # a gzip file tells how far it was read by the block only
    assert found.rows == pytest.approx(30_000, rel=0.5 if ending == "csv.gz" else 0.25)
    assert found.train + found.validation + found.test == found.rows
    assert (found.task, found.classes) == ("classification", ["no", "yes"])
    assert found.categorical == ["colour"] and any("'note' is no feature" in text for text in found.decisions)


def test_a_sample_may_end_within_a_quoted_cell(tmp_path):
    rows = "".join(f'{n},"{"long text " * 50}\n5"" wide",{n % 2}\n' for n in range(50))
    (tmp_path / "rows.csv").write_text("id,text,y\n" + rows + '99,a"b"c,1\n')
    found = sources.sample(job(tmp_path, {"source": "rows.csv", "target": "y"}), max_bytes=3_000)
    assert 3 <= found.rows_read <= 6 and not found.exact


def refusal(folder: Path, data: dict[str, Any], **top: Any) -> str:
    with pytest.raises(UserError) as caught:
        sources.sample(job(folder, data, **top))
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "row.csv", "target": "sold"}, ["row.csv", "did you mean rows.csv?", "data.source"]),
        ({"source": "none/*.csv", "target": "sold"}, ["none/*.csv", "not there"]),
        ({"source": "rows.xlsx", "target": "sold"}, ["rows.xlsx", "no known format", ".parquet"]),
        ({"source": "hdfs://b/rows.csv", "target": "sold"}, ["hdfs://", "not read"]),
        ({"source": "pkg://no_such_pkg/x.csv", "target": "sold"}, ["no_such_pkg", "pip install"]),
        (
            {"source": "rows.csv", "target": "sole"},
            ["'sole'", "did you mean 'sold'?", "id, size, colour", "data.target"],
        ),
        ({"source": "rows.csv", "target": "sold", "features": {"numeric": ["sise"]}}, ["'sise'", "'size'"]),
        ({"source": "rows.csv", "target": "sold", "features": {"drop": ["x"]}}, ["'x'", "features.drop"]),
        ({"source": "rows.csv", "target": "sold", "features": {"categorical": ["sold"]}}, ["'sold'", "target"]),
        (
            {"source": "rows.csv", "target": "big", "derive": {"big": "size > 3"}, "features": {"numeric": ["size"]}},
            ["'size'", "derives from it"],
        ),
        ({"source": "rows.csv", "target": "sold", "derive": {"x": "siez + 1"}}, ["'siez'", "'size'", "data.derive.x"]),
        ({"source": "rows.csv", "target": "sold", "derive": {"size": "id + 1"}}, ["'size'", "already"]),
        ({"source": "rows.csv", "target": "sold", "derive": {"": "id + 1"}}, ["has no name", "data.derive"]),
        ({"source": "x" * 5_000, "target": "sold"}, ["can't be looked for", "name too long", "data.source"]),
        ({"source": "python://sys:exit", "target": "sold"}, ["can't be read", "python://sys:exit"]),
        ({"source": "rows.csv", "target": "sold", "derive": {"a": "b + 1", "b": "a"}}, ["circle", "a, b"]),
        ({"source": "rows.csv", "target": "sold", "derive": {"a": "colour + 1"}}, ["does not fit", "colour is string"]),
        (
            {"source": "rows.csv", "target": "sold", "features": {"drop": ["id", "size", "colour", "note"]}},
            ["no column is left"],
        ),
        ({"source": "rows.csv", "target": "size", "split": {"by": "stratified"}}, ["stratified", "regression"]),
        ({"source": "rows.csv", "target": "note"}, ["'note'", "too few rows", "(1 row)"]),
    ],
)
def test_what_a_mistake_in_the_data_section_gets(tmp_path, data, words):
    table().to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    shown = refusal(tmp_path, data)
    assert all(word in shown for word in words), shown
    assert "job.yaml" in shown


@pytest.mark.parametrize(
    ("text", "top", "words"),
    [
        ("a,y\n", {}, ["no rows"]),
        ("", {}, ["no rows"]),
        ("a,y\n1,x\n2,x\n", {}, ["'y'", "single class", "'x'"]),
        ("a,y\n1,x\n2,x\n3,z\n", {}, ["'y'", "'z' (1 row)", "at least 2"]),
        ("a,y\n,x\n,z\n", {}, ["no row is left", "a (2)", "impute"]),
        ("a,y\n1,x\n2,z\n3,q,\n", {}, ["rows.csv:4", "too many cells: 3", "'3,q,'"]),
        ("a,a\n1,x\n", {}, ["rows.csv:1", "same name", "'a'"]),
        ("a,y\n1,x\n2,z\n", {"task": "regression"}, ["'y'", "text", "rows.csv:2"]),
        ("a,y\n1,1\n1e999,2\n", {}, ["rows.csv:3", "'a'", "infinite", "1e999"]),
        ("a,y\n1,1\n2,2\n", {"task": "regression"}, ["2 rows", "can't be divided"]),
    ],
)
def test_what_a_mistake_in_the_data_gets(tmp_path, text, top, words):
    (tmp_path / "rows.csv").write_text(text)
    shown = refusal(tmp_path, {"source": "rows.csv", "target": "y"}, **top)
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps([{"a": 1, "y": "p"}, {"a": 2, "y": "q"}], indent=1), ["rows.jsonl:1", "the line is not JSON"]),
        ('\n[{"a": 1, "y": "p"}, {"a": 2, "y": "q"}]\n', ["rows.jsonl:2", "no JSON object"]),
        ("a,y\n1,p\n", ["rows.jsonl:1", "not JSON", "a,y"]),
    ],
)
def test_other_json_than_lines_of_objects_is_told_by_its_line(tmp_path, text, words):
    (tmp_path / "rows.jsonl").write_text(text)
    shown = refusal(tmp_path, {"source": "rows.jsonl", "target": "y"})
    assert all(word in shown for word in [*words, "on each line one object", "lines=True"]), shown
    (tmp_path / "rows.jsonl").write_text("\n\n")
    assert "no rows to train on" in refusal(tmp_path, {"source": "rows.jsonl", "target": "y"})


def test_a_target_without_a_value_is_told_so(tmp_path):
    (tmp_path / "rows.csv").write_text("a,y\n1,\n2,\n")
    shown = refusal(tmp_path, {"source": "rows.csv", "target": "y", "clean": {"missing": "impute"}})
    assert "choose a target that has values" in shown and "set data.clean.missing" not in shown


def test_equal_rows_that_leave_nothing_to_train_on_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,y\n" + "3,1.5\n" * 40)
    data = {"source": "rows.csv", "target": "y", "clean": {"duplicates": "keep"}, "split": {"test": "60%"}}
    assert "no row is left to train on: equal rows" in refusal(tmp_path, data, task="regression")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("a,y\n1,x\n2,z\n")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may read everything
    assert "can't be read" in refusal(tmp_path, {"source": "rows.csv", "target": "y"})
    with pytest.raises(UserError, match="can't be read"):
        files.file_at(tmp_path / "rows.csv")


def test_a_package_that_fails_while_it_is_looked_into_is_named(tmp_path):
    package = tmp_path / "made_failing_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('boom')")
    shown = refusal(tmp_path, {"source": "python://made_failing_package.rows:rows", "target": "y"})
    assert "no such Python module" in shown and "RuntimeError: boom" in shown


def test_where_the_job_imputes_every_input_may_be_empty(tmp_path):
    pd.DataFrame(
        {
            "text": ["NA", "EU"] * 20,
            "gaps": ["p", ""] * 20,
            "number": ["NA", "5"] * 20,
            "wild": ["inf"] + [f"{n}.5" for n in range(39)],
            "whole": range(40),
            "y": ["a", "b"] * 20,
        }
    ).to_csv(tmp_path / "rows.csv", index=False)

    def optional(**clean: str) -> list[str]:
        loaded = job(tmp_path, {"source": "rows.csv", "target": "y", "clean": {"infinite": "missing", **clean}})
        source = opening.open_source(loaded)
        names = roles.check_names(loaded, source.columns)
        reading = items.Reading(source.columns, [], 1 << 20)
        piece, _ = items.read_head(source.parts[0], reading)
        types = assessment.types_of(loaded, names, piece.facts.seen, source.places)
        rules = assessment.rules_of(loaded, names, types)
        one, rows, _ = assessment.found_of(piece, rules, assessment.ordering_of(loaded, source))

        def count(divided, codes):
            return [assessment.counted(rows, one, codes[0], divided, divided.exceptions)]

        every = outcome.Pieces([one], assessment.columns_of([one]), [rows], count)
        found = outcome.conclude(loaded, source, names, rules, piece.facts.seen, every)
        return [each.name for each in found.signature.inputs if not each.required]

    assert optional(missing="impute") == ["text", "gaps", "number", "wild", "whole"]


def test_a_feature_derived_from_truth_values_is_refused(tmp_path):
    pd.DataFrame({"flag": [True, False] * 9, "n": range(18), "y": ["a", "b"] * 9}).to_parquet(tmp_path / "rows.parquet")
    data = {"source": "rows.parquet", "target": "y"}
    assert sources.sample(job(tmp_path, data)).categorical == ["flag"]
    assert "'off' derives from 'flag'" in refusal(tmp_path, data | {"derive": {"off": "not flag"}})


def test_files_of_a_set_must_agree_on_columns_and_format(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("x,y\n1,p\n2,q\n1,q\n")
    (tmp_path / "in" / "b.csv").write_text("y,x\np,3\nq,4\np,4\n")
    assert sources.sample(job(tmp_path, {"source": "in", "target": "y"})).rows == 6
    (tmp_path / "in" / "c.csv").write_text("x,z\n1,p\n")
    shown = refusal(tmp_path, {"source": "in", "target": "y"})
    assert "in/c.csv" in shown and "without y and with z" in shown
    (tmp_path / "in" / "c.csv").unlink()
    table().to_parquet(tmp_path / "in" / "d.parquet")
    assert "one format" in refusal(tmp_path, {"source": "in", "target": "y"})


def test_empty_blank_and_heading_only_files_add_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in (("a", "x,y\n1,p\n2,q\n3,p\n"), ("b", ""), ("c", "x,y\n"), ("d", "\n"), ("e", "x,y\n4,q")):
        (tmp_path / "in" / f"{name}.csv").write_text(text)
    (tmp_path / "in" / "_SUCCESS").write_text("")
    (tmp_path / "in" / ".hidden.csv").write_text("q\n")
    found = sources.sample(job(tmp_path, {"source": "in", "target": "y"}))
    assert found.rows == 4 and [column.name for column in found.columns] == ["x", "y"]
    assert [text for text in found.decisions if "empty" in text] == [
        "in/b.csv is empty; it adds no rows",
        "in/d.csv is empty; it adds no rows",
    ]


def test_sources_are_found_beside_the_job_then_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "jobs" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "rows.csv").write_text("x,y\n1,p\n")
    loaded = job(tmp_path / "jobs", {"source": ["*.csv", "deep/**/*.csv"], "target": "y"})
    (tmp_path / "jobs" / "deep" / "b.csv").write_text("x,y\n1,p\n")
    (tmp_path / "jobs" / "deep" / "a.csv").write_text("x,y\n1,p\n")
    assert [location.name for location in files.locate(loaded)] == ["deep/a.csv", "deep/b.csv", "rows.csv"]
    (tmp_path / "jobs" / "rows.csv").write_text("x,y\n1,p\n")
    assert files.locate(loaded)[-1].path == str(tmp_path / "jobs" / "rows.csv")


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "packed_rows"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    table().to_csv(package / "rows.csv", index=False)
    loaded = job(tmp_path, {"source": "pkg://packed_rows/rows.csv", "target": "sold"})
    assert sources.sample(loaded).rows == 60


def test_an_archive_with_one_name_twice_is_refused(tmp_path):
    """Only the last of them could be read by its name."""
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.csv", "a,y\n1,x\n")
        archive.writestr("a.csv", "a,y\n2,z\n")
    assert "same name" in refusal(tmp_path, {"source": "rows.zip", "target": "y"})


def test_an_archive_of_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        for name in ("b", "a"):
            archive.writestr(f"inner/{name}.csv", table(30).to_csv(index=False))
        archive.writestr("readme.txt", "about")
    found = sources.sample(job(tmp_path, {"source": "rows.zip", "target": "sold", "clean": {"duplicates": "keep"}}))
    assert (found.files, found.rows) == (2, 60)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def rows():\n    x = {}\n    return x['gone']\n", ["KeyError: 'gone'", "made_broken_source.py:3, in rows"]),
        ("import sys\ndef rows():\n    sys.exit('done')\n", ["SystemExit: done", "made_broken_source.py:3, in rows"]),
        ("def rows():\n    return 5\n", ["returned no table", "type int"]),
        ("def row():\n    return {}\n", ["no function 'rows'", "did you mean 'row'?"]),
        ("def rows(:\n", ["SyntaxError", "made_broken_source.py:1"]),
        ("import no_such_module\n", ["No module named 'no_such_module'", "made_broken_source.py:1"]),
        ("def rows():\n    return {'x': [[1]], 'y': ['a']}\n", ["column 'x'", "not read"]),
        (
            "import pandas as pd\ndef rows():\n    return pd.DataFrame({'x': [1, 'a'], 'y': [1, 2]})\n",
            ["column x", "one type"],
        ),
    ],
)
def test_a_broken_python_source_is_shown_with_the_users_line(tmp_path, body, words):
    (tmp_path / "made_broken_source.py").write_text(body)
    sys.modules.pop("made_broken_source", None)
    shown = refusal(tmp_path, {"source": "python://made_broken_source:rows", "target": "y"})
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize(
    ("values", "task"),
    [
        ([0, 1] * 20, "classification"),
        ([0.0, 1.0] * 20, "classification"),
        (list(range(10)) * 5, "classification"),
        (list(range(10)) * 4, "regression"),
        (list(range(40)), "regression"),
        ([0.5, 1.5] * 20, "regression"),
        (["a", "b"] * 20, "classification"),
    ],
)
def test_the_task_is_inferred(tmp_path, values, task):
    pd.DataFrame({"x": range(len(values)), "y": values}).to_csv(tmp_path / "rows.csv", index=False)
    found = sources.sample(job(tmp_path, {"source": "rows.csv", "target": "y"}))
    assert found.task == task and (task == "regression") == (found.classes == [])
