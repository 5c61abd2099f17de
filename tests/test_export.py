"""A bundle as one file: its answers are the predictor's, in ONNX Runtime and in torch, for any row."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made as making
import msgspec
import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from exporting import SECTIONS, WAYS, Case, Row, agree, columns_of, exported, own_module, session_of, trips, whatever

from raylway.bundle.mistakes import InvalidRows
from raylway.bundle.rows import RowReader
from raylway.errors import RunFailed, UserError
from raylway.export.export import export
from raylway.features.signature import Signature
from raylway.models.registry import ModelSpec


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelSpec]:
    with own_module(tmp_path_factory.mktemp("own")) as spec:
        yield spec


def test_whatever_a_row_holds(own: ModelSpec, tmp_path: Path) -> None:
    section, derive = SECTIONS["mixed"]
    case = exported(trips(section, own, derive), tmp_path, "onnx")
    session = session_of(case)
    whatever(case, 20, lambda rows: session.run(None, columns_of(case.signature, rows)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_any_number_of_rows(fruit: Case, way: str, count: int) -> None:
    rows = [{"length": 5.0 + place, "width": 2.0, "colour": "red"} for place in range(count)]
    found = WAYS[way](fruit, rows)
    assert [each.shape for each in found] == [(count,), (count, 2)]
    if rows:
        agree(fruit, found, rows)


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return exported(making.fruit(), tmp_path_factory.mktemp("fruit"))


@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_the_service_refuses_has_no_answer(fruit: Case, way: str) -> None:
    good: Row = {"length": 12.5, "width": 2.0, "colour": "red"}
    bad = [good | {"length": math.nan}, good | {"width": -math.inf}, good | {"colour": None}]
    labels, probabilities = WAYS[way](fruit, [good, *bad, good])
    assert labels.tolist() == ["yes", "", "", "", "yes"]
    assert np.isnan(probabilities).all(axis=1).tolist() == [False, True, True, True, False]
    agree(fruit, [labels[[0, 4]], probabilities[[0, 4]]], [good, good])
    for row in bad:
        with pytest.raises(InvalidRows):
            RowReader(fruit.signature).convert("rows", [row])


def test_what_a_file_says_about_itself(fruit: Case) -> None:
    record = fruit.predictor.bundle.record
    model = onnx.load(fruit.onnx)
    onnx.checker.check_model(model, full_check=True)
    (entry,) = model.metadata_props
    extra = {"raylway.json": ""}
    torch.export.load(fruit.torch, extra_files=extra)
    for text in (entry.value, extra["raylway.json"]):
        about = json.loads(text)
        assert (about["name"], about["version"], about["run"]) == ("made", record.version, record.provenance.run)
        assert msgspec.convert(about["signature"], Signature) == record.signature
    assert json.loads(extra["raylway.json"])["words"] == {"colour": ["green", "red"]}
    session = session_of(fruit)
    asked = [(each.name, each.type, each.shape) for each in session.get_inputs()]
    kinds = {"length": "tensor(double)", "width": "tensor(double)", "colour": "tensor(string)"}
    assert asked == [(name, kind, ["rows"]) for name, kind in kinds.items()]
    given_ = [(each.name, each.type, each.shape) for each in session.get_outputs()]
    assert given_ == [("predictions", "tensor(string)", ["rows"]), ("probabilities", "tensor(float)", ["rows", 2])]


def test_a_file_of_torch_holds_no_pickle(fruit: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    unpickled: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: unpickled.append(args))
    torch.export.load(fruit.torch)
    assert unpickled == []
    with zipfile.ZipFile(fruit.torch) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("raylway.json") for name in contents)
    for name, content in contents.items():
        config = json.loads(content) if name.endswith("config.json") else {"config": {}}
        assert not any(each["use_pickle"] for each in config["config"].values())
        assert not content.startswith((b"\x80", b"PK")), name


def simple(spec: ModelSpec | None = None, derive: dict[str, str] | None = None, name: str = "x") -> making.Made:
    table = pa.table({name: np.arange(20.0), "c": ["u", "v"] * 10, "d": ["v", "u"] * 10, "kind": ["a", "b"] * 10})
    kinds = {name: "number", "c": "category", "d": "category"}
    return making.made(table, "kind", kinds, spec, steps=0, derive=derive)


def of_date(derive: dict[str, str]) -> making.Made:
    days = [f"2013-01-{day:02}" for day in range(1, 21)]
    table = pa.table({"when": days, "kind": ["a", "b"] * 10})
    return making.made(table, "kind", {"when": "date"}, steps=0, derive=derive)


OWN_STEP = "def double(table):\n    return table['x']\n"
REFUSALS: list[tuple[str, Callable[[], making.Made], str]] = [
    ("onnx", lambda: simple(derive={"z": "own_step:double(x)"}), "a function of your own can't be exported"),
    ("torch-export", lambda: simple(derive={"z": "c == d"}), "a comparison of texts that is not == or !="),
    ("onnx", lambda: simple(derive={"z": 'c < "v"'}), "a comparison of texts that is not == or !="),
    ("onnx", lambda: of_date({"z": 'when == "2013-01-05"'}), "reads the text of a date can't be exported"),
    ("onnx", lambda: simple(name="predictions"), "an input has the name of an output: predictions"),
    ("torch-export", lambda: simple(ModelSpec("own_export:counting", {})), "the model can't be exported"),
    ("onx", simple, "there is no such format"),
]


@pytest.mark.parametrize(("kind", "make", "words"), REFUSALS)
def test_what_can_not_be_exported(
    own: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, make: Any, words: str
) -> None:
    (tmp_path / "own_step.py").write_text(OWN_STEP)
    monkeypatch.syspath_prepend(tmp_path)
    bundle = make().stage(tmp_path / "bundle")
    with pytest.raises(UserError, match=words):
        export(bundle, kind, str(tmp_path / "out" / "model"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_half_written(fruit: Case, tmp_path: Path) -> None:
    bundle = fruit.predictor.bundle.folder
    with pytest.raises(UserError, match="nothing is overwritten"):
        export(bundle, "onnx", str(fruit.onnx))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the file can't be written"):
        export(bundle, "onnx", str(tmp_path / "file" / "model.onnx"))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_without_its_packages(fruit: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="the packages that write ONNX are not installed") as caught:
        export(fruit.predictor.bundle.folder, "onnx", str(tmp_path / "model.onnx"))
    assert 'pip install "raylway[export]"' in caught.value.fix


def test_a_regression(tmp_path: Path) -> None:
    case = exported(making.price(), tmp_path, "torch-export")
    rows: list[Row] = [{"size": 100.0, "place": "EU"}, {"size": 50.0, "rooms": 2.0}, {"size": 60.0, "place": "nowhere"}]
    (values,) = WAYS["torch-export"](case, rows)
    assert values.dtype == np.float64
    agree(case, [values], rows)
    assert values[0] == pytest.approx(150_000, rel=0.1)


def test_a_file_that_answers_otherwise_is_not_written(own: ModelSpec, tmp_path: Path) -> None:
    bundle = simple(ModelSpec("own_export:deviating", {})).stage(tmp_path / "bundle")
    (tmp_path / "out").mkdir()
    with pytest.raises(RunFailed, match="differ from the bundle's by 0.*; nothing is written"):
        export(bundle, "torch-export", str(tmp_path / "out" / "model"))
    assert not any((tmp_path / "out").iterdir())
