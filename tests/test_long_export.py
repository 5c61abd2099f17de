"""Exported files again: each transform with many drawn rows, the article's network, the documents' programs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import made as making
import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from commands import REPOSITORY, raylway
from exporting import (
    SECTIONS,
    WAYS,
    Case,
    Row,
    agree,
    columns_of,
    exported,
    micros,
    own_module,
    session_of,
    trips,
    whatever,
)
from safetensors.numpy import load_file
from sklearn.datasets import load_iris
from sklearn.preprocessing import StandardScaler

from raylway import storage
from raylway.models.registry import ModelSpec

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelSpec]:
    with own_module(tmp_path_factory.mktemp("own")) as spec:
        yield spec


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return exported(making.fruit(), tmp_path_factory.mktemp("fruit"))


def test_iris_as_scikit_learn_and_numpy_compute_it(tmp_path: Path) -> None:
    data = load_iris(as_frame=True)
    names = [*data.data.columns]
    table = pa.table({**{name: data.data[name] for name in names}, "kind": data.target_names[data.target]})
    case = exported(making.made(table, "kind", dict.fromkeys(names, "number")), tmp_path)
    weights = load_file(case.predictor.bundle.folder / "model.safetensors")
    hidden = StandardScaler().fit_transform(data.data) @ weights["layers.0.weight"].T + weights["layers.0.bias"]
    logits = np.maximum(hidden, 0) @ weights["layers.3.weight"].T + weights["layers.3.bias"]
    right = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for ask in WAYS.values():
        labels, probabilities = ask(case, data.data.to_dict("records"))
        np.testing.assert_allclose(probabilities, right, atol=1e-6)
        assert probabilities.dtype == np.float32
        assert labels.tolist() == data.target_names[right.argmax(axis=1)].tolist()
        assert (labels == data.target_names[data.target]).mean() > 0.95


@pytest.mark.parametrize("name", SECTIONS)
def test_whatever_a_row_holds_after_each_transform(name: str, own: ModelSpec, tmp_path: Path) -> None:
    section, derive = SECTIONS[name]
    case = exported(trips(section, own, derive), tmp_path)
    session = session_of(case)
    extra = {"raylway.json": ""}
    program = torch.export.load(case.torch, extra_files=extra).module()
    words = json.loads(extra["raylway.json"])["words"]

    def by_program(rows: list[Row]) -> list[np.ndarray]:
        columns = columns_of(case.signature, rows, words)
        index, probabilities = program({key: torch.from_numpy(each) for key, each in columns.items()})
        return [np.array(case.signature.classes, object)[index.numpy()], probabilities.numpy()]

    whatever(case, 100, lambda rows: session.run(None, columns_of(case.signature, rows)), by_program)


def test_a_date_beyond_the_calendar_and_a_derived_feature_without_a_value(tmp_path: Path) -> None:
    days = [f"2013-01-{day:02}" for day in range(1, 29)]
    table = pa.table({"when": days, "a": np.arange(28.0), "b": np.arange(1.0, 29), "y": ["p", "q"] * 14})
    kinds = {"when": "date", "a": "number", "b": "number"}
    case = exported(making.made(table, "y", kinds, steps=5, derive={"ratio": "a / b"}), tmp_path)
    row = {"when": "2013-01-05", "a": 1.0, "b": 2.0}
    session = session_of(case)
    columns = columns_of(case.signature, [row, row | {"b": 0.0}, row, row, row | {"when": None}])
    columns["when"][2:4] = [micros("9999-12-31T23:59:59.999999") + 1, micros("0001-01-01") - 1]
    labels, probabilities = session.run(None, columns)
    agree(case, [labels[:1], probabilities[:1]], [row])
    assert labels[1:].tolist() == [""] * 4
    assert np.isnan(probabilities[1:]).all()


def test_the_articles_network(tmp_path: Path) -> None:
    case = exported(making.article(), tmp_path)
    rng = np.random.default_rng(1)
    for count in (1, 64):
        rows = [{each.name: float(rng.normal()) for each in case.signature.inputs} for _ in range(count)]
        for ask in WAYS.values():
            agree(case, ask(case, rows), rows)


def test_any_name_of_a_column_and_a_regression(own: ModelSpec, tmp_path: Path) -> None:
    names = ["predict ions", "add", "val_0", "rows", "features", "node_Cast_1", "/add", "x.y[0]", "é"]
    rng = np.random.default_rng(0)
    table = pa.table({**{name: rng.normal(size=20) for name in names}, "price": rng.normal(1e4, 10, 20)})
    case = exported(making.made(table, "price", dict.fromkeys(names, "number"), own, steps=0), tmp_path)
    rows = [{each.name: float(place) for place, each in enumerate(case.signature.inputs)}] * 2
    for ask in WAYS.values():
        (values,) = ask(case, rows)
        assert values.dtype == np.float64
        agree(case, [values], rows)


def test_the_documents_commands(fruit: Case, tmp_path: Path) -> None:
    """Every Python program of the page, where its files are; the first command is asked for one that is there."""
    run = tmp_path / "runs" / "fruit" / fruit.predictor.bundle.record.provenance.run
    shutil.copytree(fruit.predictor.bundle.folder, run / "bundle")
    storage.write_record(run / "run.json", msgspec.structs.replace(making.RUN, job="fruit"))
    page = (REPOSITORY / "docs" / "export.md").read_text()
    for command in re.findall(r"^raylway (export fruit .*)$", page, re.MULTILINE):
        done = raylway(*command.split(), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / command.split()[-1])
        assert re.search(
            r"checked: its answers to 24 rows and those of the bundle differ by at most (0|\S+e-\d+)\n", done.stderr
        )
    for program in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        shown = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
        assert re.search(r"\['yes',? 'no'\]", shown.stdout), shown.stdout
