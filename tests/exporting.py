"""Bundles of every kind in both formats, and their answers as the documents say that a file is asked."""

from __future__ import annotations

import datetime
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made as making
import msgspec
import numpy as np
import onnxruntime
import pyarrow as pa
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from raylway.bundle.predictor import Predictor
from raylway.bundle.rows import RowReader
from raylway.export.export import export
from raylway.features.signature import Signature
from raylway.job import schema
from raylway.models.registry import ModelSpec

Row = dict[str, Any]
CLOSE = 1e-5
logging.getLogger("torch.__trace").handlers.clear()  # pytest would have a line of each traced operation
NOT_A_TIME = np.iinfo(np.int64).min
BOUNDED = """
import torch

class Bounded(torch.nn.Module):
    \"\"\"Every number counts, and none for more than 1: far out numbers leave nothing to rounding.\"\"\"

    def __init__(self, width, counts, outputs):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = torch.nn.Parameter(torch.randn(width, outputs, generator=generator))
        self.tables = torch.nn.ParameterList(torch.randn(n + 1, outputs, generator=generator) for n in counts)

    def forward(self, numeric, categorical):
        found = (numeric / (1 + numeric.abs())) @ self.weights
        for place, table in enumerate(self.tables):
            found = found + table[categorical[:, place]]
        return found

def build(num_numeric, category_counts, num_outputs):
    return Bounded(num_numeric, category_counts, num_outputs)

class Deviating(Bounded):
    def forward(self, numeric, categorical):
        return super().forward(numeric, categorical) + torch.eye(2)[0] * torch.compiler.is_exporting()

def deviating(num_numeric, category_counts, num_outputs):
    return Deviating(num_numeric, category_counts, num_outputs)

class Counting(Bounded):
    def forward(self, numeric, categorical):
        found = super().forward(numeric, categorical)
        return found + 0 * sum(range(len(numeric)))

def counting(num_numeric, category_counts, num_outputs):
    return Counting(num_numeric, category_counts, num_outputs)
"""


@dataclass(frozen=True)
class Case:
    """One bundle in both formats."""

    predictor: Predictor
    onnx: Path
    torch: Path

    @property
    def signature(self) -> Signature:
        return self.predictor.signature


@contextmanager
def own_module(folder: Path) -> Iterator[ModelSpec]:
    """The module above, importable while bundles are made."""
    (folder / "own_export.py").write_text(BOUNDED)
    sys.path.insert(0, str(folder))
    yield ModelSpec("own_export:build", {})
    sys.path.remove(str(folder))


def exported(made: making.Made, folder: Path, *kinds: str) -> Case:
    bundle = made.stage(folder / "bundle")
    files = [folder / "model.onnx", folder / "model.pt2"]
    for kind, file in zip(("onnx", "torch-export"), files, strict=True):
        if kinds and kind not in kinds:
            continue
        done = export(bundle, kind, str(file))
        assert (done.place, done.rows >= 8, done.largest_difference < CLOSE) == (str(file), True, True)
    return Case(Predictor(bundle), *files)


def columns_of(signature: Signature, rows: list[Row], words: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """Rows as the documents say that a file takes them; `words` are those in a file of torch's."""
    found: dict[str, Any] = {}
    for each in signature.inputs:
        cells = [row.get(each.name) for row in rows]
        if each.type == "number":
            found[each.name] = np.array([math.nan if cell is None else cell for cell in cells], np.float64)
        elif each.type == "date":
            instants = [NOT_A_TIME if cell is None else micros(cell) for cell in cells]
            found[each.name] = np.array(instants, np.int64)
        elif words is None:
            found[each.name] = np.array(["" if cell is None else cell for cell in cells], object)
        else:
            listed = words[each.name]
            codes = [-1 if cell is None else listed.index(cell) + 1 if cell in listed else 0 for cell in cells]
            found[each.name] = np.array(codes, np.int64)
    return found


def micros(text: str) -> int:
    zoned = datetime.datetime.fromisoformat(text)
    zoned = zoned if zoned.tzinfo else zoned.replace(tzinfo=datetime.UTC)
    return (zoned - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)


def session_of(case: Case) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(case.onnx, options, providers=["CPUExecutionProvider"])


def by_onnx(case: Case, rows: list[Row]) -> list[np.ndarray]:
    return session_of(case).run(None, columns_of(case.signature, rows))


def by_torch(case: Case, rows: list[Row]) -> list[np.ndarray]:
    extra = {"raylway.json": ""}
    program = torch.export.load(case.torch, extra_files=extra)
    about = json.loads(extra["raylway.json"])
    columns = columns_of(case.signature, rows, about["words"])
    shuffled = {name: torch.from_numpy(columns[name]) for name in sorted(columns, reverse=True)}
    found = [each.numpy() for each in program.module()(shuffled)]
    if about["signature"]["classes"]:
        names = np.array([*about["signature"]["classes"], ""], object)
        found[0] = names[found[0]]
    return found


WAYS = {"onnx": by_onnx, "torch-export": by_torch}


def agree(case: Case, found: list[np.ndarray], rows: list[Row]) -> None:
    """The answers to rows that the service would answer."""
    read = RowReader(case.signature).read(msgspec.json.encode({"rows": rows})).rows
    assert not case.predictor.problems(read)
    right = case.predictor.outputs(read)
    target = case.predictor.bundle.record.transform.target
    np.testing.assert_allclose(found[-1], right, rtol=CLOSE, atol=CLOSE * (target.spread if not target.classes else 1))
    if target.classes:
        chosen = [right[row, target.classes.index(label)] for row, label in enumerate(found[0])]
        assert (right.max(axis=1) - chosen <= CLOSE).all()


def trips(section: schema.Transform, own: ModelSpec, derive: dict[str, str]) -> making.Made:
    """Rows of every type, any of which may lack a cell."""
    rng, count = np.random.default_rng(4), 400
    when = np.datetime64("2013-01-01T00:00:00", "s") + np.arange(count) * 31_557
    table = pa.table(
        {
            "distance": rng.lognormal(5, 2, count),
            "fare": np.where(rng.random(count) < 0.2, np.nan, rng.normal(0, 1e-6, count)),
            "seats": rng.integers(1, 5, count).astype(float),
            "same": np.full(count, 7.25),
            "when": [f"{each}Z" for each in when],
            "carrier": rng.choice(["AA", "B6", "UA", "naïve ✈", "YV"], count, p=[0.4, 0.3, 0.2, 0.09, 0.01]),
            "direct": rng.choice(["true", "false"], count),
            "late": rng.choice(["no", "yes", "perhaps"], count),
        }
    )
    kinds = {"distance": "number", "fare": "number?", "seats": "number?", "same": "number?", "when": "date?"}
    kinds |= {"carrier": "category?", "direct": "category?"}
    return making.made(table, "late", kinds, own, steps=0, derive=derive, section=section)


DERIVE = {
    "ratio": "distance / (seats - 2)",
    "far": "distance * 2 > 300 and not (seats == 4 or carrier != \"AA\")",
    "twice": "-ratio + 2 * far",
    "known": "fare < 1 or fare >= 1 or direct == \"true\"",
    "steps": "1 < seats < 4 or carrier == \"nobody\"",
}  # fmt: skip
SECTIONS: dict[str, tuple[schema.Transform, dict[str, str]]] = {
    "standard": (schema.Transform(), {}),
    "robust": (schema.Transform(scale="robust", impute="median", indicator=True, categories="one_hot", rare=10), {}),
    "quantile": (schema.Transform(scale="quantile", impute="most_frequent", rare=10), {}),
    "log": (schema.Transform(scale="log", impute=-1.0, indicator=True), {}),
    "bins": (schema.Transform(bins=6, categories="one_hot"), {}),
    "none": (schema.Transform(scale="none"), DERIVE),
    "mixed": (
        schema.Transform.model_validate(
            {
                "indicator": True,
                "columns": {
                    "distance": {"bins": 5, "indicator": False},
                    "fare": {"scale": "log"},
                    "seats": {"scale": "quantile"},
                    "when": {"categories": "one_hot", "impute": "2014-02-28", "bins": 3},
                    "carrier": {"categories": "one_hot", "impute": "nowhere", "rare": 30},
                },
            }
        ),
        {"ratio": DERIVE["ratio"]},
    ),
}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.floats(-1e4, 1e4) | st.integers(-5, 5).map(float)
SMALL = st.floats(-1e-5, 1e-5)
WORDS = st.sampled_from(["AA", "B6", "UA", "YV", "naïve ✈", "aa", "nowhere", "nobody", "NA", " "]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=5
)
DATES = st.datetimes(datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31)).map(lambda each: each.isoformat())
TRIPS = st.fixed_dictionaries(
    {
        "distance": NUMBERS,
        "fare": st.none() | NUMBERS | SMALL,
        "seats": st.none() | NUMBERS,
        "same": st.none() | NUMBERS,
        "when": st.none()
        | DATES
        | st.sampled_from(["2012-02-29", "1969-12-31T23:59:59.999999Z", "2013-06-01T23+02:00"]),
        "carrier": st.none() | WORDS,
        "direct": st.none() | st.sampled_from(["true", "false", "True", "FALSE", "tRuE", "maybe"]),
    }
)


def whatever(case: Case, examples: int, *ways: Callable[[list[Row]], list[np.ndarray]]) -> None:
    """Drawn rows have the predictor's answers by each of the ways."""

    @given(st.lists(TRIPS, min_size=1, max_size=12))
    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
    def check(rows: list[Row]) -> None:
        for ask in ways:
            agree(case, ask(rows), rows)

    check()
