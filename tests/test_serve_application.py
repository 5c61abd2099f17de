"""The application by itself: what the three ways of serving it share, and what needs no Ray to see."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asking
import httpx
import jsonschema
import made as making
import numpy as np
import pyarrow as pa
import pytest
import torch
from asking import GOOD, MISTAKES, ask, strict

from raylway.bundle import contents
from raylway.bundle.predictor import Predictor
from raylway.errors import UserError
from serve_app import app as serve_app
from serve_app import batching, keys
from serve_app.keys import Keys
from serve_app.service import Service


@pytest.fixture
def serve_here(tmp_path: Path) -> Iterator[Callable[[making.Made], httpx.Client]]:
    """Bundle and serve something by itself, until the test ends."""
    with ExitStack() as stack:

        def serve(made: making.Made) -> httpx.Client:
            service = Service(Predictor(made.stage(tmp_path / "bundle")), 64)
            return stack.enter_context(asking.local(service))

        yield serve


def test_answers_of_a_regression(serve_here: Callable[[making.Made], httpx.Client]) -> None:
    client = serve_here(making.price())
    status, answer = ask(client, {"size": 100, "place": "EU"}, {"size": 50})
    assert status == 200
    assert set(answer) == {"predictions", "model"}
    assert answer["predictions"][0] == pytest.approx(150_000, rel=0.1)
    nested = strict(client.post("/predict", json={"data": [[100, None, "EU"]]}))
    assert nested == [[answer["predictions"][0]]]
    schemas = strict(client.get("/openapi.json"))["components"]["schemas"]
    assert schemas["Row"]["required"] == ["size"]


def test_a_whole_number_category_however_it_is_written(serve_here: Callable[[making.Made], httpx.Client]) -> None:
    store = np.arange(48) % 4 + 1
    table = pa.table({"store": store, "busy": np.where(store % 2 == 1, "yes", "no")})
    client = serve_here(making.made(table, "busy", {"store": "category"}))
    _, answer = ask(client, *({"store": value} for value in (1, "1", 1.0, 2)))
    assert answer["predictions"] == ["yes", "yes", "yes", "no"]
    assert answer["probabilities"][0] == answer["probabilities"][1] == answer["probabilities"][2]


def test_the_two_letters_na_are_a_category(serve_here: Callable[[making.Made], httpx.Client]) -> None:
    country = np.array(["NA", "ZA", "FR", "US"] * 12)
    table = pa.table({"country": country, "late": np.where(country == "NA", "yes", "no")})
    client = serve_here(making.made(table, "late", {"country": "category"}))
    assert ask(client, {"country": "NA"}, {"country": "ZA"})[1]["predictions"] == ["yes", "no"]


def test_a_constant_column_served_with_another_value(serve_here: Callable[[making.Made], httpx.Client]) -> None:
    signal = np.arange(22) - 10.5
    table = pa.table({"base": [-11.512925464970229] * 22, "signal": signal, "alarm": np.where(signal > 0, "yes", "no")})
    client = serve_here(making.made(table, "alarm", {"base": "number", "signal": "number"}))
    rows = [{"base": base, "signal": 5.0} for base in (-11.512925464970229, -10, 1e300)]
    assert ask(client, *rows)[1]["predictions"] == ["yes"] * 3


def test_too_many_at_once_are_told_to_come_again(fruit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_WAITING_BATCHES", 0)
    with asking.local(Service(Predictor(fruit), 64)) as client:
        for answer in (client.post("/predict", json={"rows": [GOOD]}), client.get("/readyz")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert strict(answer)["status"] == 503
        assert client.get("/healthz").status_code == 200


def test_a_key_that_asks_too_often_waits(fruit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(keys.time, "monotonic", lambda: now)
    text = f"# of the tests\nfast {asking.KEY}  2.5/s\n\nslow another-key-for-the-tests 0.1/s"
    with asking.local(Service(Predictor(fruit), 64, Keys(text, "the test"))) as client:
        slow = {"Authorization": "bearer another-key-for-the-tests"}

        def statuses(count: int, **headers: str) -> list[int]:
            return [client.get("/signature", headers=headers).status_code for _ in range(count)]

        assert statuses(4) == [200, 200, 429, 429]  # a second's worth at once
        assert client.get("/healthz").status_code == 200
        assert statuses(2, **slow) == [200, 429]
        answer = client.post("/predict", json={"rows": [GOOD]}, headers=slow)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
        assert strict(answer)["detail"] == "the key slow may send 0.1 requests a second"
        now += 1
        assert statuses(4) == [200, 200, 429, 429]
        now += 10
        assert statuses(2, **slow) == [200, 429]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there are no API keys"),
        ("# none\n", "there are no API keys"),
        ("shop short", "16 characters or more"),
        ("\nshop", "line 2"),
        (f"shop {asking.KEY} often", "this is no API key"),
        (f"shop {asking.KEY} 0/s", "this is no API key"),
        (f"shop {asking.KEY};shop another-key-for-the-tests", "stands there twice"),
        (f"shop {asking.KEY}\nhall {asking.KEY}", "stands there twice"),
    ],
)
def test_keys_that_can_not_be_read(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        keys.read(tmp_path / "keys")
    assert asking.KEY not in str(caught.value)
    with pytest.raises(UserError, match="the API keys can't be read"):
        keys.read(tmp_path / "nowhere")


def test_an_answer_that_does_not_come_in_time(fruit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, answered = Predictor(fruit), threading.Event()
    forward = predictor._model.forward

    def slow(*inputs: Any) -> Any:
        assert answered.wait(20)
        return forward(*inputs)

    predictor._model.forward = slow
    with asking.local(Service(predictor, 64)) as client:
        answer = client.post("/predict", json={"rows": [GOOD]}, headers={"X-Request-Timeout-Ms": "50"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert strict(answer)["detail"] == "no answer within 0.05 s"
        answered.set()
        assert ask(client, GOOD)[0] == 200


def test_an_answer_that_is_not_finite_is_a_failure_with_a_reason(fruit: Path) -> None:
    predictor = Predictor(fruit)
    with torch.no_grad():
        list(predictor._model.parameters())[-1].fill_(float("nan"))
    with asking.local(Service(predictor, 64)) as client:
        status, answer = ask(client, GOOD)
    assert status == 500
    assert "not a finite number" in answer["detail"]


def test_a_model_that_raises_is_a_failure_with_a_reason(fruit: Path) -> None:
    predictor = Predictor(fruit)
    predictor._model.forward = lambda *_: {}["secret"]
    with asking.local(Service(predictor, 64)) as client:
        status, answer = ask(client, GOOD)
    assert (status, answer["detail"]) == (500, "the model raised KeyError")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "an argument is missing: bundle"),
        ({"bundle": "b", "replicas": 2}, "no such argument: replicas"),
        ({"bundle": "b", "max_batch": "many"}, "max_batch must be a whole number from 1"),
        ({"bundle": "b", "max_batch": "0"}, "max_batch must be a whole number from 1"),
        ({"bundle": "b", "min_replicas": True}, "min_replicas must be a whole number from 0"),
        ({"bundle": "b", "min_replicas": 3, "max_replicas": "2"}, "min_replicas is more than max_replicas"),
    ],
)
def test_arguments_of_the_application(args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        serve_app.build(args)


def test_the_application_imports_no_data_and_no_training() -> None:
    script = (
        "import sys, serve_app.app\n"
        "mine = {name.split('.')[1] for name in sys.modules if name.startswith('raylway.')}\n"
        "print(sorted(mine - {'bundle', 'models', 'features', 'runs', 'storage', 'job', 'errors'}))\n"
        "print([name for name in ('ray.data', 'ray.train', 'sklearn') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_the_openapi_document(client: httpx.Client, fruit: Path) -> None:
    document = strict(client.get("/openapi.json"))
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == contents.load(fruit).record.version
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            bodies = (
                operation["requestBody"]["content"]["application/json"]["examples"] if method == "post" else {"": {}}
            )
            for body in bodies.values():
                assert client.request(method, path, json=body.get("value")).status_code == 200
    resolved = json.loads(json.dumps(document["components"]).replace("#/components/", "#/"))

    def valid(name: str, value: Any) -> bool:
        schema = resolved | {"$ref": f"#/schemas/{name}"}
        jsonschema.Draft202012Validator.check_schema(schema)
        return jsonschema.Draft202012Validator(schema).is_valid(value)

    posted = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    for form, name in (("rows", "RowsRequest"), ("data", "DataRequest")):
        example = posted["examples"][form]["value"]
        assert valid(name, example)
        assert client.post("/predict", json=example).status_code == 200
    for row, _ in MISTAKES:
        assert not valid("RowsRequest", {"rows": [row]})
        assert valid("Problem", ask(client, row)[1])
    assert valid("Answers", ask(client, GOOD)[1])
    assert valid("NestedList", strict(client.post("/predict", json={"data": [[1, 2, "red"]]})))
    assert not valid("DataRequest", {"data": [[1, 2]]})
