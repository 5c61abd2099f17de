"""The application by itself: what the three ways of serving it share, and what needs no Ray to see."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asking
import httpx
import made as making
import numpy as np
import pyarrow as pa
import pytest
import torch
from asking import ask, strict

from raylway.bundle.predictor import Predictor
from raylway.errors import UserError
from serve_app import app as serve_app
from serve_app import batching, service
from serve_app.service import Service

GOOD = {"length": 12.5, "width": 2.0, "colour": "red"}


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.fruit().stage(tmp_path_factory.mktemp("fruit") / "bundle", name="fruit")


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


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = Path(service.__file__).with_name("docs.html").read_text()
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "an argument is missing: bundle"),
        ({"bundle": "b", "replicas": 2}, "no such argument: replicas"),
        ({"bundle": "b", "max_batch": "many"}, "max_batch must be a whole number from 1"),
        ({"bundle": "b", "max_batch": "0"}, "max_batch must be a whole number from 1"),
        ({"bundle": "b", "min_replicas": True}, "min_replicas must be a whole number from 1"),
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
