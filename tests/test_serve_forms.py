"""Requests in the forms of MLflow and of the Open Inference Protocol, sent by the clients that people have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asking
import httpx
import made as making
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tritonclient.http as triton
from asking import strict
from hypothesis import given
from hypothesis import strategies as st
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
from tritonclient.utils import InferenceServerException

from raylway.bundle import contents
from raylway.bundle.mistakes import InvalidRows
from raylway.bundle.predictor import Predictor
from raylway.bundle.rows import NotJson
from serve_app.forms import Model
from serve_app.invocations import Invocations
from serve_app.problems import HttpProblem
from serve_app.service import Service
from serve_app.tensors import Tensors

NAMES = ["length", "width", "colour"]
TABLE = {"length": [12.5, 6.0, 14.0], "width": [2.0, 2.5, 1.0], "colour": ["red", "green", "blue"]}
FRAME = pd.DataFrame(TABLE)


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A regression whose `rooms` and `place` may be missing."""
    table = pa.table({"size": [20.0, 80.0], "rooms": [1, 3], "place": ["NA", "EU"], "price": [20_000.0, 130_000.0]})
    made = making.made(table, "price", {"size": "number", "rooms": "number?", "place": "category?"}, steps=3)
    bundle = made.stage(tmp_path_factory.mktemp("price") / "bundle", name="price")
    with asking.local(Service(Predictor(bundle), 64)) as found:
        yield found


@pytest.fixture(scope="module")
def model(fruit: Path) -> Model:
    return Model(Predictor(fruit))


@pytest.fixture(scope="module")
def expected(client: httpx.Client) -> Any:
    """What our own form answers."""
    return strict(client.post("/predict", json={"rows": FRAME.to_dict("records")}))


def address(client: httpx.Client) -> str:
    return f"{client.base_url.host}:{client.base_url.port}"


def mlflow(client: httpx.Client) -> ScoringServerClient:
    return ScoringServerClient(client.base_url.host, client.base_url.port)


def test_mlflows_client(client: httpx.Client, expected: Any) -> None:
    asked = mlflow(client)
    asked.ping()
    assert asked.get_version()
    answer = asked.invoke(FRAME[["colour", "length", "width"]])  # the order of columns is the client's own
    assert answer["predictions"] == expected["predictions"] == ["yes", "no", "yes"]
    assert answer["probabilities"] == expected["probabilities"]
    assert answer.get_predictions()[0].tolist() == expected["predictions"]
    with pytest.raises(Exception, match="error code 422.*row 0: length is missing"):
        asked.invoke(FRAME[["colour", "width"]])
    with pytest.raises(Exception, match="takes no params"):
        asked.invoke(FRAME, params={"temperature": 1})


def test_a_missing_cell_of_a_data_frame(prices: httpx.Client) -> None:
    frame = pd.DataFrame({"size": [50.0, 60.0], "rooms": [np.nan, 2.0], "place": ["EU", None]})
    answer = mlflow(prices).invoke(frame)
    rows = [{"size": 50, "place": "EU"}, {"size": 60, "rooms": 2}]
    assert answer["predictions"] == strict(prices.post("/predict", json={"rows": rows}))["predictions"]
    with pytest.raises(Exception, match="error code 422.*row 1: size is null"):
        mlflow(prices).invoke(frame.assign(size=[1.0, np.nan]))


BODIES: list[dict[str, Any]] = [
    {"dataframe_split": FRAME.to_dict("split")},
    {"dataframe_split": {"columns": NAMES, "data": FRAME.to_numpy().tolist()}},
    {"dataframe_records": FRAME.to_dict("records")},
    {"instances": FRAME.to_dict("records"), "params": {}},
    {"instances": FRAME.to_numpy().tolist()},
    {"inputs": TABLE},
    {"inputs": FRAME.to_numpy().tolist(), "params": None},
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: next(iter(body)))
def test_each_body_of_mlflow(client: httpx.Client, expected: Any, body: dict[str, Any]) -> None:
    answer = client.post("/invocations", json=body)
    assert (answer.status_code, strict(answer)) == (200, expected)


@pytest.mark.parametrize("kind", ["text/csv", "text/csv; charset=utf-8"])
def test_csv(client: httpx.Client, expected: Any, kind: str) -> None:
    texts = [FRAME.to_csv(index=False), FRAME[NAMES[::-1]].to_csv(index=False, lineterminator="\r\n", quoting=1)]
    for text in texts:
        answer = client.post("/invocations", content=text, headers={"Content-Type": kind})
        assert (answer.status_code, strict(answer)) == (200, expected)


def test_cells_of_csv_say_what_cells_of_files_say(prices: httpx.Client) -> None:
    text = 'size,rooms,place\n50,,EU\n6e1, 2 ,""\n70,NA,NA\n'
    answer = prices.post("/invocations", content=text, headers={"Content-Type": "text/csv"})
    rows = [{"size": 50, "place": "EU"}, {"size": 60, "rooms": 2}, {"size": 70, "place": "NA"}]
    assert strict(answer) == strict(prices.post("/predict", json={"rows": rows}))


REFUSED: list[tuple[Any, int, str]] = [
    ({}, 422, "one of the keys dataframe_split"),
    ([], 422, "one of the keys dataframe_split"),
    ({"inputs": [], "instances": []}, 422, "one of the keys"),
    ({"rows": []}, 422, "one of the keys"),
    ({"instances": 5}, 422, 'a list under "instances"'),
    ({"inputs": {"length": [1], "width": [1, 2]}}, 422, "the same length"),
    ({"inputs": {"length": 1}}, 422, "the same length"),
    ({"dataframe_split": []}, 422, '"columns" and "data"'),
    ({"dataframe_split": {"columns": ["length", "length"], "data": []}}, 422, "different names"),
    ({"dataframe_split": {"columns": NAMES, "data": [[1, 2, "red"], [1]]}}, 422, "row 1: expected a list of 3"),
    ({"dataframe_split": {"columns": ["note", *NAMES], "data": [[0, 1, 2, "red"]]}}, 422, "row 0: note is no feature"),
    ({"dataframe_records": [[12.5, 2.0, "red"]]}, 422, "row 0: expected an object"),
    ({"instances": [[12.5, 2.0, "red"], [1]]}, 422, "row 1: expected a list of 3"),
    (b'{"inputs": {"length": [NaN], "width": [2], "colour": ["red"]}}', 422, "row 0: length is null"),
    (b'{"instances": [[Infinity, NaN, "red"]]}', 400, "Infinity is not JSON"),
    (b'{"instances": [[1e999, NaN, "red"]]}', 422, "length is not a finite number (and 1 more)"),
    (b'{"instances": [["\\ud800", NaN, "red"]]}', 400, "not valid JSON"),
    (b"[" * 100_000 + b"NaN", 400, "nested too deeply"),
    (b"{", 400, "not valid JSON"),
]


@pytest.mark.parametrize(("body", "status", "words"), REFUSED)
def test_what_invocations_refuses(client: httpx.Client, body: Any, status: int, words: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/invocations", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert words in strict(answer)["detail"]


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        (b"", 400, "not valid CSV"),
        (b"length,width,colour\n1,2\n", 400, "not valid CSV"),
        (b"length,width,colour\n1,2,\xff\n", 400, "not valid CSV"),
        (b"length,length,colour\n1,2,red\n", 422, "different names"),
        (b"length,width\n1,2\n", 422, "row 0: colour is missing"),
        (b"length,width,colour\n1,2,red\ntwelve,2,red\n", 422, "row 1: length expected a number; found the text"),
        (b"length,width,colour\ninf,2,red\n", 422, "row 0: length is not a finite number"),
        (b"length,width,colour\n1,,red\n", 422, "row 0: width is null"),
    ],
)
def test_csv_that_is_refused(client: httpx.Client, text: bytes, status: int, words: str) -> None:
    answer = client.post("/invocations", content=text, headers={"Content-Type": "text/csv"})
    assert answer.status_code == status
    assert words in strict(answer)["detail"]


def tensor(name: str, values: np.ndarray, datatype: str, binary: bool) -> triton.InferInput:
    found = triton.InferInput(name, list(values.shape), datatype)
    found.set_data_from_numpy(values, binary_data=binary)
    return found


def columns(binary: bool, shape: tuple[int, ...] = (3,)) -> list[triton.InferInput]:
    return [
        tensor("colour", np.array(TABLE["colour"], object).reshape(shape), "BYTES", binary),
        tensor("length", np.array(TABLE["length"], np.float32).reshape(shape), "FP32", binary),
        tensor("width", np.array(TABLE["width"], np.float64).reshape(shape), "FP64", not binary),
    ]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_tritons_client(client: httpx.Client, fruit: Path, expected: Any, binary: bool, shape: tuple[int, ...]) -> None:
    version = contents.load(fruit).record.version
    with triton.InferenceServerClient(address(client)) as asked:
        assert asked.is_model_ready("fruit", version)
        answer = asked.infer("fruit", columns(binary, shape), request_id="a-17", model_version=version)
        assert answer.get_response()["id"] == "a-17"
        assert answer.get_response()["model_version"] == version
        labels = [each.decode() for each in answer.as_numpy("predictions")]
        assert labels == expected["predictions"]
        probabilities = np.array([[row["no"], row["yes"]] for row in expected["probabilities"]], np.float32)
        assert answer.as_numpy("probabilities").tobytes() == probabilities.tobytes()
        chosen = [triton.InferRequestedOutput("probabilities", binary_data=binary)]
        answer = asked.infer("fruit", columns(binary), outputs=chosen)
        assert answer.as_numpy("probabilities").tobytes() == probabilities.tobytes()
        assert answer.as_numpy("predictions") is None


def test_what_tritons_client_can_learn(client: httpx.Client) -> None:
    with triton.InferenceServerClient(address(client)) as asked:
        assert asked.is_server_live()
        assert asked.is_server_ready()
        assert asked.is_model_ready("fruit")
        assert not asked.is_model_ready("melon")
        assert asked.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        found = asked.get_model_metadata("fruit")
        assert found["inputs"][2] == {"name": "colour", "datatype": "BYTES", "shape": [-1]}
        assert found["outputs"][1] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]}
        for name, words in (("melon", "/v2/models/melon/infer is not here"), ("fruit", "row 0: width is missing")):
            with pytest.raises(InferenceServerException, match=words):
                asked.infer(name, columns(True)[:2])


def test_one_tensor_with_all_features(tmp_path: Path) -> None:
    names = [f"x{index}" for index in range(5)]
    table = pa.table({**{name: np.arange(8.0) for name in names}, "side": ["left", "right"] * 4})
    made = making.made(table, "side", dict.fromkeys(names, "number"), steps=0)
    predictor = Predictor(made.stage(tmp_path / "bundle"))
    rows = np.random.default_rng(3).normal(size=(7, 5)).astype(np.float32)
    right: Any = predictor.predict(pa.table(dict(zip(names, rows.T.astype(np.float64), strict=True)))).probabilities
    with asking.local(Service(predictor, 64)) as client, triton.InferenceServerClient(address(client)) as asked:
        for binary in (True, False):
            answer = asked.infer("made", [tensor("x", rows, "FP32", binary)])
            assert answer.as_numpy("probabilities").tobytes() == right.tobytes()
        with pytest.raises(InferenceServerException, match="expected the shape .rows, 5."):
            asked.infer("made", [tensor("x", rows[:, 1:], "FP32", True)])


def test_a_regression_by_tensors(prices: httpx.Client) -> None:
    rows = [{"size": 50, "place": "EU"}, {"size": 60, "rooms": 2}]
    right = strict(prices.post("/predict", json={"rows": rows}))["predictions"]
    inputs = [
        tensor("size", np.array([50, 60], np.int16), "INT16", True),
        tensor("rooms", np.array([np.nan, 2.0]), "FP64", True),
        tensor("place", np.array(["EU", ""], object), "BYTES", True),
    ]
    with triton.InferenceServerClient(address(prices)) as asked:
        assert asked.infer("price", inputs).as_numpy("predictions").tolist() == right
        inputs[1] = tensor("rooms", np.array([np.inf, 2.0]), "FP64", True)
        with pytest.raises(InferenceServerException, match="row 0: rooms is not a finite number"):
            asked.infer("price", inputs)


def infer_body(**changes: Any) -> dict[str, Any]:
    width = {"name": "width", "shape": [1], "datatype": "FP64", "data": [2.0]} | changes.pop("width", {})
    length = {"name": "length", "shape": [1], "datatype": "FP64", "data": [12.5]}
    colour = {"name": "colour", "shape": [1], "datatype": "BYTES", "data": ["red"]}
    return {"inputs": [length, width, colour]} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": {"shape": [2]}}, "does not hold 1 elements"),
        ({"width": {"shape": [-1]}}, "does not hold 1 elements"),
        ({"width": {"shape": [1, 1, 1]}}, "does not hold 1 elements"),
        ({"width": {"shape": [0], "data": []}}, "the same number of rows"),
        ({"width": {"shape": [1, 2], "data": [1, 2]}}, "[rows] or [rows, 1]"),
        ({"width": {"data": ["wide"]}}, "row 0: width expected a number; found the text"),
        ({"width": {"data": [[2.0]]}}, "row 0: width expected a number; found a list"),
        ({"width": {"data": None}}, 'width expected "data"'),
        ({"width": {"name": "length"}}, "each tensor once"),
        ({"width": {"name": "note"}}, "row 0: note is no feature of this model"),
        ({"width": {"parameters": {"binary_data_size": 8}}}, "as many bytes as binary_data_size says"),
        ({"outputs": [{"name": "scores"}]}, "no output 'scores', only predictions and probabilities"),
        ({"inputs": 5}, "Expected `array`"),
    ],
)
def test_tensors_that_are_refused(client: httpx.Client, changes: dict[str, Any], words: str) -> None:
    answer = client.post("/v2/models/fruit/infer", json=infer_body(**changes))
    assert answer.status_code == 422
    assert words in strict(answer)["error"] == strict(answer)["detail"]


def test_no_tensors_have_no_rows(client: httpx.Client) -> None:
    answer = strict(client.post("/v2/models/fruit/infer", json={"inputs": []}))
    assert [output["data"] for output in answer["outputs"]] == [[], []]


@pytest.mark.parametrize(
    ("size", "datatype", "tail", "status", "words"),
    [
        (8, "FP64", b"1234567", 422, "as many bytes"),
        (7, "FP64", b"1234567", 422, "no whole number of FP64"),
        (8, "FP65", b"12345678", 422, "expected BYTES, BOOL"),
        (8, "BYTES", b"\x05\0\0\0abcd", 422, "cut off"),
        (8, "BYTES", b"\x04\0\0\0\xff\xff\xff\xff", 422, "UTF-8"),
        (8, "FP64", b"1" * 9, 422, "1 bytes are left over"),
        (8, "FP64", None, 400, "of 10 bytes are JSON"),
    ],
)
def test_binary_tensors_that_are_refused(
    client: httpx.Client, size: int, datatype: str, tail: bytes | None, status: int, words: str
) -> None:
    width = {"datatype": datatype, "parameters": {"binary_data_size": size}}
    head = json.dumps(infer_body(width=width)).encode()
    body = b"0123456789" if tail is None else head + tail
    answer = client.post(
        "/v2/models/fruit/infer",
        content=body,
        headers={"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
    )
    assert answer.status_code == status
    assert words in strict(answer)["error"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["red", "", "NA", *NAMES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "data", "columns"]), inner),
    max_leaves=8,
)


@given(st.sampled_from(["dataframe_split", "dataframe_records", "instances", "inputs"]), JUNK)
def test_no_body_of_mlflow_is_our_failure(model: Model, key: str, value: Any) -> None:
    read(Invocations(model), json.dumps({key: value}).encode())


@given(st.lists(st.fixed_dictionaries({"name": st.sampled_from(NAMES), "shape": JUNK, "datatype": JUNK, "data": JUNK})))
def test_no_tensor_is_our_failure(model: Model, inputs: list[Any]) -> None:
    read(Tensors(model), json.dumps({"inputs": inputs}).encode())


def read(form: Any, body: bytes) -> None:
    """Read a body that may be refused in the ways that a form may refuse it in."""
    try:
        rows = form.read(body, {}).rows
    except (InvalidRows, NotJson, HttpProblem):
        return
    assert np.isfinite(rows.numbers).all()
