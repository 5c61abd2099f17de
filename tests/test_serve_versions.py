"""Several models at once, new versions in the place of old ones, and the Serve config file."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asking
import httpx
import loading
import made as making
import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from asking import GOOD, ask, strict
from commands import raylway
from ruamel.yaml import YAML
from typer.testing import CliRunner

from raylway import cli, storage
from raylway.bundle import contents, examples
from raylway.bundle.predictor import Predictor
from raylway.errors import RunFailed, UserError
from raylway.job.schema import Replicas, Serve
from raylway.launch import applications, proxy, replacing, services, serving, start
from raylway.launch.applications import Model
from raylway.models import registry
from raylway.runs.progress import Reporter
from serve_app import app as serve_app
from serve_app import index, recent, service, trial
from serve_app.keys import Keys
from serve_app.service import Service


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fruit, one that says yes where the first says no, a price, and one that is higher by a spread of the target."""
    folder = tmp_path_factory.mktemp("bundles")
    fruit, price = making.fruit(), making.price()
    found = {"fruit": fruit.stage(folder / "fruit", name="fruit"), "price": price.stage(folder / "price", name="price")}
    with torch.no_grad():
        for parameter in list(fruit.model.parameters())[-2:]:
            parameter.copy_(parameter.flip(0))
        list(price.model.parameters())[-1].add_(1.0)
    return found | {
        "turned": fruit.stage(folder / "turned", name="fruit"),
        "dearer": price.stage(folder / "dearer", name="price"),
    }


@pytest.fixture(scope="module")
def fruit(bundles: dict[str, Path]) -> Path:
    return bundles["fruit"]


@pytest.fixture(scope="module")
def turned(bundles: dict[str, Path]) -> Path:
    return bundles["turned"]


@pytest.fixture(scope="module")
def price(bundles: dict[str, Path]) -> Path:
    return bundles["price"]


@pytest.fixture
def tampered(turned: Path, tmp_path: Path) -> Path:
    """A whole bundle whose model does not answer as its maker's did."""
    return tamper(turned, tmp_path / "tampered")


def tamper(bundle: Path, folder: Path) -> Path:
    import shutil

    shutil.copytree(bundle, folder)
    made = examples.read(folder)
    storage.write_record(folder / contents.EXAMPLES, msgspec.structs.replace(made, outputs=made.outputs[::-1]))
    record = storage.read_record(folder / contents.RECORD, contents.BundleRecord)
    storage.write_record(folder / contents.RECORD, msgspec.structs.replace(record, files=contents.listed(folder)))
    return folder


def version(bundle: Path) -> str:
    return contents.load(bundle).record.version


def asked(bundle: Path, *requests: dict[str, Any]) -> list[recent.Recorded]:
    """What a service has kept of requests."""
    served = Service(Predictor(bundle), 64, Keys(asking.KEYS, "the test"))
    with asking.local(served) as client:
        for each in requests:
            client.post(**each)
    return served.recent.all()


ROWS = {"url": "/predict", "json": {"rows": [GOOD, GOOD | {"length": 6}]}}
LISTS = {"url": "/predict", "json": {"data": [[7, 2.0, "red"]]}}
CSV = {"url": "/invocations", "content": "length,width,colour\n12,2,red\n", "headers": {"Content-Type": "text/csv"}}


def test_the_requests_that_were_answered_are_kept_for_a_while_and_no_key_is(
    fruit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = asked(fruit, ROWS, LISTS, CSV, {"url": "/predict", "json": {"rows": [{"length": 1}]}}, {"url": "/nowhere"})
    assert [each.form for each in kept] == ["predict", "predict", "invocations"]
    assert [each.answers for each in kept] == [["yes", "no"], ["no"], ["yes"]]
    assert [json.loads(kept[0].body), json.loads(kept[1].body)] == [ROWS["json"], LISTS["json"]]
    assert kept[2].headers == {b"content-type": b"text/csv"}
    assert asking.KEY not in repr(kept)
    size = len(kept[0].body) + 16  # and two rows of two probabilities
    monkeypatch.setattr(recent, "LARGEST_BYTES", size)
    monkeypatch.setattr(recent, "MOST_BYTES", 2 * size)
    monkeypatch.setattr(recent, "EVERY_S", 0)
    large = {"url": "/predict", "json": {"rows": [GOOD] * 3}}
    assert [json.loads(each.body) for each in asked(fruit, LISTS, ROWS, ROWS, large)] == [ROWS["json"]] * 2
    monkeypatch.setattr(recent, "LARGEST_BYTES", size - 1)  # the answers count, too
    assert asked(fruit, ROWS) == []
    monkeypatch.setattr(recent, "LARGEST_BYTES", size)
    monkeypatch.setattr(recent, "EVERY_S", 60)
    assert [json.loads(each.body) for each in asked(fruit, ROWS, ROWS, LISTS)] == [ROWS["json"]] * 2
    monkeypatch.setattr(recent, "MOST_REQUESTS", 2)
    assert len(asked(fruit, LISTS, ROWS, LISTS)) == 2  # those that come at once, once there are enough, are not kept


def test_a_bundle_is_tried_on_requests_of_all_forms(fruit: Path, turned: Path) -> None:
    tensor = {"name": "all", "shape": [1, 3], "datatype": "BYTES", "data": ["12", "2", "red"]}
    parts = [{"name": name, "shape": [1], "datatype": kind, "data": [value]} for name, kind, value in PARTS]
    kept = asked(fruit, ROWS, LISTS, CSV, {"url": "/v2/models/fruit/infer", "json": {"inputs": parts}})
    assert len(kept) == 4, tensor
    assert trial.attempt(str(fruit), kept) == trial.Trial(None, 4, 5, "0 of 5 rows get another label (0.0%)")
    assert trial.attempt(str(turned), kept) == trial.Trial(None, 4, 5, "5 of 5 rows get another label (100.0%)")
    assert trial.attempt(str(turned), []) == trial.Trial()


PARTS = [("length", "FP64", 12.0), ("width", "FP64", 2.0), ("colour", "BYTES", "red")]


def test_how_far_values_differ(bundles: dict[str, Path]) -> None:
    rows = [{"size": 100, "place": "EU"}, {"size": 50, "place": "US"}]
    kept = asked(bundles["price"], {"url": "/predict", "json": {"rows": rows}})
    spread = contents.load(bundles["price"]).record.transform.target.spread
    found = trial.attempt(str(bundles["dearer"]), kept)
    assert found.differences == f"values differ by {spread:.3g} in the median, by {spread:.3g} at most"
    assert found.failure is None


def test_a_bundle_that_refuses_what_clients_send_is_named_with_the_reason(fruit: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    columns = {name: rng.uniform(0, 9, 40) for name in ("length", "width", "weight")}
    table = pa.table(columns | {"colour": ["red"] * 40, "ripe": ["yes", "no"] * 20})
    kinds = {"length": "number", "width": "number", "weight": "number", "colour": "category"}
    needs_more = making.made(table, "ripe", kinds, steps=1).stage(tmp_path / "more", name="fruit")
    kept = asked(fruit, ROWS, CSV)
    failure = trial.attempt(str(needs_more), kept).failure
    expected = "it refuses 2 of 2 recorded requests; one of them: row 0: weight is missing; expected a number"
    expected += " (and 1 more)"
    assert failure == expected
    kinds = {"length": "number", "width": "number", "colour": "number"}
    other = making.made(table.set_column(3, "colour", [rng.uniform(0, 9, 40)]), "ripe", kinds, steps=1)
    failure = trial.attempt(str(other.stage(tmp_path / "other", name="fruit")), kept).failure
    assert failure is not None
    assert failure.endswith("row 0: colour expected a number")  # and not the client's value


def test_a_bundle_that_fails_by_itself(fruit: Path, tampered: Path, tmp_path: Path) -> None:
    failure = trial.attempt(str(tampered), []).failure
    assert failure is not None
    assert "the model's answers to the bundle's own examples differ" in failure
    assert "there is no whole bundle here" in str(trial.attempt(str(tmp_path), []).failure)


PICKY = """
import torch

def build(num_numeric, category_counts, num_outputs):
    class Picky(torch.nn.Linear):
        def forward(self, numeric, categorical):
            return super().forward(numeric).log() if (numeric > 100).any() else super().forward(numeric)

    return Picky(num_numeric, num_outputs)
"""


def test_a_bundle_whose_answer_to_a_recorded_request_is_no_number(
    fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picky_model.py").write_text(PICKY)
    monkeypatch.syspath_prepend(str(tmp_path))
    table = pa.table(
        {"length": [5.0, 15.0] * 9, "width": [1.0, 2.0] * 9, "colour": ["red"] * 18, "ripe": ["no", "yes"] * 9}
    )
    kinds = {"length": "number", "width": "number", "colour": "category"}
    spec = registry.ModelSpec("picky_model:build", {})
    picky = making.made(table, "ripe", kinds, spec, steps=1).stage(tmp_path / "bundle", name="fruit")
    far = {"url": "/predict", "json": {"rows": [GOOD | {"length": 1e9}]}}
    assert trial.attempt(str(picky), asked(fruit, ROWS)).failure is None
    assert "not a finite number" in str(trial.attempt(str(picky), asked(fruit, ROWS, far)).failure)


def test_a_model_that_is_stuck_in_a_batch_is_not_healthy(fruit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, begun, go_on = Predictor(fruit), threading.Event(), threading.Event()
    forward = predictor._model.forward

    def slow(*inputs: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return forward(*inputs)

    predictor._model.forward = slow
    served = Service(predictor, 64)
    with asking.local(served) as client:
        thread = threading.Thread(target=ask, args=(client, GOOD))
        thread.start()
        assert begun.wait(20)
        served.check_health()
        monkeypatch.setattr(service, "STUCK_S", 0.0)
        with pytest.raises(RuntimeError, match="the model has been at one batch for 0 s"):
            served.check_health()
        go_on.set()
        thread.join()
        served.check_health()


@pytest.fixture(params=[True, False], ids=["with keys", "without keys"])
def listed(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    keys = Keys(asking.KEYS, "the test") if request.param else None
    with asking.local(index.Index(["flights", "fruit"], keys)) as client:
        if not request.param:
            client.headers.pop("authorization")
        yield client


def test_the_list_of_models(listed: httpx.Client) -> None:
    models = [{"name": "flights", "path": "/flights"}, {"name": "fruit", "path": "/fruit"}]
    assert strict(listed.get("/")) == {"models": models}
    page = listed.get("/", headers={"Accept": "text/html,*/*"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert '<a href="fruit">fruit</a>' in page.text
    assert listed.head("/").content == b""
    assert strict(listed.get("/readyz")) == {"status": "ok"}
    assert strict(listed.get("/predict"))["status"] == 404
    assert listed.get("/predict").headers["content-type"] == "application/problem+json"
    assert (listed.post("/").status_code, listed.post("/").headers["allow"]) == (405, "GET, HEAD")
    stranger = httpx.get(f"{listed.base_url}")
    assert stranger.status_code == (401 if "authorization" in listed.headers else 200)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"bundle": "b", "cpus": "many"}, "cpus must be a number from 0"),
        ({"bundle": "b", "cpus": True}, "cpus must be a number from 0"),
        ({"bundle": "b", "cpus": -1}, "cpus must be a number from 0"),
        ({"bundle": "b", "max_replicas": 0}, "max_replicas must be a whole number from 1"),
    ],
)
def test_arguments_of_the_application(args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        serve_app.build(args)


def test_arguments_of_the_list() -> None:
    for args in ({}, {"models": "fruit"}, {"models": [], "bundle": "b"}):
        with pytest.raises(UserError, match="not the arguments of the list of models"):
            index.build(args)


def a_run(folder: Path, bundle: Path, name: str) -> Path:
    """The folder of a finished run, as far as serving looks at it."""
    folder.mkdir()
    (folder / "bundle").symlink_to(bundle)
    (folder / "job.yaml").write_text(
        f"name: {name}\ndata: {{source: rows.csv, target: x}}\nserve: {{replicas: {{min: 0, max: 2}}}}\n"
    )
    storage.write_record(folder / "run.json", making.RUN)
    return folder


def test_the_config_file_says_what_would_be_served(fruit: Path, price: Path, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    runs = [str(a_run(tmp_path / name, bundle, name)) for name, bundle in (("fruit", fruit), ("price", price))]
    (tmp_path / "keys").write_text(asking.KEYS)
    file = tmp_path / "serve.yaml"
    done = raylway("serve", *runs, "--config", file, "--keys", "keys", "--host", "0.0.0.0", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"serve deploy {file}" in done.stderr
    assert done.stderr.count("each node of a cluster must see it") == 2
    config = YAML(typ="safe").load(file)
    read = ServeDeploySchema.model_validate(config)
    assert (read.http_options.host, read.http_options.port) == ("0.0.0.0", 8000)
    assert [(each.name, each.route_prefix) for each in read.applications] == [
        ("fruit", "/fruit"),
        ("price", "/price"),
        ("_models", "/"),
    ]
    assert read.applications[0].args == {
        "bundle": str(tmp_path / "fruit" / "bundle"),
        "min_replicas": 0,
        "max_replicas": 2,
        "max_batch": 64,
        "keys": str(tmp_path / "keys"),
    }
    for each in read.applications:
        assert each.import_path in ("serve_app.app:build", "serve_app.index:build")
    assert read.applications[-1].name == index.NAME
    alone = CliRunner().invoke(cli.app, ["serve", runs[0], "--config"])
    assert [each["route_prefix"] for each in YAML(typ="safe").load(alone.stdout)["applications"]] == ["/"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ONE", "ONE"], "two models have one name"),
        ([], "name a run"),
        (["ONE", "--replace", "--rollback"], "only one of --replace, --rollback and --config"),
        (["ONE", "ONE", "--rollback"], "one at a time"),
        (["ONE", "--replace"], "there is not one model of this name that is served"),
        (["--rollback"], "it is not clear which model is meant"),
        (["ONE", "--config", "a.yaml", "b.yaml"], "one config file is written"),
        (["ONE", "--config", "nowhere/a.yaml"], "the file can't be written"),
        (["ONE", "--config", "JOB"], "there is another file in this place"),
        (
            ["fruit", "--rollback", "--keys", "keys"],
            "rollback: --keys can't be given here",
        ),
        (["--rollback", "--port", "8000"], "--port can't be given here"),
        (["ONE", "--replace", "--host", "::1", "--port", "1"], "--host and --port can't be given here"),
    ],
)
def test_what_can_not_be_served(
    words: list[str], expected: str, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "_FOLDERS", tmp_path)  # whatever else is served on this machine
    monkeypatch.setattr(start, "is_connected", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "")
    run = a_run(tmp_path / "one", fruit, "fruit")
    named, job = {"ONE": str(run), "JOB": str(run / "job.yaml")}, (run / "job.yaml").read_text()
    with pytest.raises(UserError, match=expected):
        CliRunner().invoke(cli.app, ["serve", *(named.get(word, word) for word in words)], catch_exceptions=False)
    assert (run / "job.yaml").read_text() == job


def test_a_service_of_this_machine_is_found_as_long_as_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "_FOLDERS", tmp_path)
    found = services.Service("127.0.0.1:1", "http://127.0.0.1:2", ["fruit"])
    with services.announced(found, Reporter("lines")), start.temporary_folder(Reporter("lines")):
        assert services.running() == [found]
        (folder,) = (file.parent for file in tmp_path.glob("*/serving.json"))
        assert folder.stat().st_mode & 0o077 == 0
        with monkeypatch.context() as patch:
            patch.setattr(start.os, "getuid", lambda: folder.stat().st_uid + 1)
            assert services.running() == []
    assert services.running() == []
    folder.mkdir()  # as a process leaves it that was killed
    storage.write_record(folder / "serving.json", found)
    (folder / ".lock").touch()
    assert services.running() == []


def test_before_haproxy_knows_an_application_clients_are_told_to_come_again(tmp_path: Path) -> None:
    """By the program that Ray starts in HAProxy's place: it changes the configuration, which HAProxy itself checks."""
    haproxy = proxy._haproxy()
    if haproxy is None:
        pytest.skip("HAProxy is not here")
    settings = proxy._haproxy_settings(tmp_path, haproxy)
    port, free = settings["RAY_SERVE_HAPROXY_METRICS_PORT"], settings["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]
    config = tmp_path / "haproxy.cfg"
    not_found = "http-request return status 404 content-type text/plain lf-string \"Path '%[path]' not found.\""
    text = (
        "defaults\n    mode http\n    timeout connect 1s\n    timeout client 1s\n    timeout server 1s\n"
        f"frontend metrics\n    bind :{port}\nfrontend all\n    bind 127.0.0.1:{free}\n"
        "    # for use_backend selection below\n    USE\n"
        "    default_backend nothing\n"
        f"backend nothing\n    {not_found}\nbackend some\n    server one 127.0.0.1:1\n"
    )
    for use, expected in (("", "status 503 content-type text/plain string starting hdr Retry-After 1\n"), (USE, "404")):
        config.write_text(text.replace("USE", use))
        checked = [settings["RAY_SERVE_HAPROXY_BINARY_PATH"], "-c", "-f", str(config)]
        done = subprocess.run(checked, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert expected in config.read_text()
        assert f"bind 127.0.0.1:{port}\n" in config.read_text()


@pytest.fixture
def exchanged(fruit: Path, monkeypatch: pytest.MonkeyPatch) -> Exchanged:
    """What Ray Serve would be told, and no Ray."""
    return Exchanged(fruit, monkeypatch)


class Exchanged:
    """An application as `replacing` sees it: its arguments, which `put` changes."""

    def __init__(self, bundle: Path, patch: pytest.MonkeyPatch) -> None:
        self.arguments: dict[str, Any] = serve_app.bound({"bundle": str(bundle)})._bound_deployment.user_config
        self.puts: list[tuple[str, str | None, bool]] = []
        self.failures: list[BaseException] = []
        self.keys_of_list: list[Path] = []
        listed = applications.Running(index.NAME, "/", {}, {}, 1, is_declared=False)
        patch.setattr(applications, "running", lambda: {index.NAME: listed})
        patch.setattr(applications, "put_list", lambda _, keys: self.keys_of_list.append(keys))
        patch.setattr(replacing, "_visited", self._visited)
        patch.setattr(applications, "code_version", lambda _: "of old")
        patch.setattr(replacing, "_recorded", lambda *_: [])
        patch.setattr(replacing, "_try", lambda *_: None)
        for name, stand_in in {"put": self._put, "wait_until_ready": lambda *_: None, "address": lambda: ""}.items():
            patch.setattr(applications, name, stand_in)
        patch.setattr(applications, "require_everywhere", lambda *_: None)

    @contextmanager
    def _visited(self, *_: Any) -> Iterator[applications.Running]:
        yield applications.Running("fruit", "/", self.arguments, {}, 1, is_declared=False)

    def _put(
        self, _old: applications.Running, given: dict[str, Any], code_version: str | None = None, wait: bool = True
    ) -> None:
        self.arguments = serve_app.bound(given)._bound_deployment.user_config
        self.puts.append((given["bundle"], code_version, wait))
        if self.failures:
            raise self.failures.pop(0)

    def replace(self, bundle: Path, keys: Path | None = None) -> None:
        replacing.replace([Model("fruit", bundle, Serve())], Reporter("lines"), keys)

    def rollback(self) -> None:
        replacing.rollback("fruit", Reporter("lines"))

    @property
    def held(self) -> tuple[Path, str | None]:
        return Path(self.arguments["bundle"]), self.arguments.get("keys")


def test_the_way_back_brings_the_bundle_and_leaves_the_keys(fruit: Path, turned: Path, exchanged: Exchanged) -> None:
    exchanged.replace(turned, keys=Path("/keys/first"))
    assert exchanged.held == (turned, "/keys/first")
    exchanged.rollback()  # to a bundle that was served without keys
    assert exchanged.held == (fruit, "/keys/first")
    exchanged.replace(turned, keys=Path("/keys/second"))
    exchanged.rollback()  # to one whose keys have been revoked since
    assert exchanged.held == (fruit, "/keys/second")
    assert exchanged.keys_of_list == [Path("/keys/first"), Path("/keys/second")]
    exchanged.arguments.pop("keys")
    exchanged.rollback()
    assert exchanged.held == (turned, None)


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_exchange_that_is_stopped_is_taken_back(
    end: BaseException, fruit: Path, turned: Path, exchanged: Exchanged
) -> None:
    exchanged.failures = [end]
    with pytest.raises(type(end)):
        exchanged.replace(turned)
    assert exchanged.puts == [(str(turned), None, True), (str(fruit), "of old", False)]
    with pytest.raises(UserError, match="nothing was replaced here"):
        exchanged.rollback()


def test_neither_the_new_bundle_nor_the_old_one_starts(fruit: Path, turned: Path, exchanged: Exchanged) -> None:
    exchanged.failures = [RunFailed("no memory"), RunFailed("no disk")]
    with pytest.raises(RunFailed) as caught:
        exchanged.replace(turned)
    reasons = f"{turned} does not start: no memory\nfruit can't go on with {fruit} either: no disk"
    assert str(caught.value) == reasons
    assert exchanged.puts == [(str(turned), None, True), (str(fruit), "of old", True)]


def test_what_has_keys_and_asks_for_none_is_not_served(
    fruit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a cluster whose Ray was started without the keys of the command's environment."""
    with asking.local(Service(Predictor(fruit), 64)) as client:
        url = str(client.base_url)
        with pytest.raises(RunFailed, match="answer without an API key, although there are keys"):
            serving._require_guarded([url], True, Reporter("lines"))
        for host in ("::", "127.0.0.1"):
            monkeypatch.setattr(applications, "host", lambda host=host: host)
            serving._require_guarded([url], False, Reporter("lines"))
    assert capsys.readouterr().err.count("there are no API keys: whoever reaches") == 1
    with asking.local(Service(Predictor(fruit), 64, Keys(asking.KEYS, "the test"))) as client:
        monkeypatch.setattr(applications, "host", lambda: "0.0.0.0")
        serving._require_guarded([str(client.base_url)], True, Reporter("lines"))
        serving._require_guarded([str(client.base_url)], False, Reporter("lines"))  # keys of `ray start`
    assert capsys.readouterr().err == ""


def test_nodes_that_do_not_say_what_they_see(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def look() -> list[str]:
        return ["seen"]

    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise OSError

    nodes = [{"NodeManagerAddress": f"10.0.0.{number}"} for number in (1, 2, 3)]
    assert applications._answers(nodes[:1], [look.remote()]) == [["seen"]]
    monkeypatch.setattr(applications, "_LOOK_TIMEOUT_S", 1)
    stuck = look.options(resources={"nowhere": 1}).remote()
    with pytest.raises(UserError) as caught:
        applications._answers(nodes, [ray.put(["seen"]), fail.remote(), stuck])
    assert caught.value.where.endswith("(OSError) on 10.0.0.2, GetTimeoutError on 10.0.0.3"), caught.value
    ray.cancel(stuck)


def test_what_a_replica_needs_of_a_machine_stays(turned: Path, exchanged: Exchanged) -> None:
    exchanged.arguments["cpus"] = 0.5
    exchanged.replace(turned)
    assert exchanged.arguments["cpus"] == 0.5
    options = serve_app.bound(exchanged.arguments, {"num_cpus": 2, "num_gpus": 0.5})._bound_deployment.ray_actor_options
    assert options == {"num_cpus": 2, "num_gpus": 0.5}


def test_the_same_bundle_once_more_leaves_the_way_back(fruit: Path, turned: Path, exchanged: Exchanged) -> None:
    exchanged.replace(fruit, keys=Path("/keys/first"))
    assert "before" not in exchanged.arguments
    exchanged.replace(turned)
    exchanged.replace(turned, keys=Path("/keys/second"))
    assert exchanged.held == (turned, "/keys/second")
    exchanged.rollback()
    assert exchanged.held == (fruit, "/keys/second")


def process_ids(name: str) -> set[int]:
    """Of the replicas that take requests."""
    from ray.serve.context import _get_global_client

    found: Any = _get_global_client()
    replicas = found.get_serve_details()["applications"][name]["deployments"]["model"]["replicas"]
    return {each["pid"] for each in replicas if each["state"] == "RUNNING"}


def an_exchange_is_taken_back(bundle: Path) -> None:
    """As on Ctrl-C."""
    now = applications.running()["fruit"]
    made_of = applications.code_version(now)
    applications.put(now, now.arguments | {"bundle": str(bundle)}, wait=False)
    deadline = time.monotonic() + 60
    while applications.code_version(now) == made_of:  # Serve's controller has not looked yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
    applications.put(now, now.arguments, made_of)


def the_list_gets_keys(client: httpx.Client, folder: Path) -> None:
    (folder / "keys").write_text(asking.KEYS)
    applications.put_list(applications.running()[index.NAME], folder / "keys")
    deadline = time.monotonic() + 60
    while client.get("/").status_code != 401:  # until the proxy has heard of it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    names = [each["name"] for each in strict(client.get("/", headers=asking.ALLOWED))["models"]]
    assert names == ["fruit", "price"]


USE = "use_backend some if { path_beg /some }"


def test_models_from_a_config_file_and_another_bundle_in_the_place_of_one(
    fruit: Path,
    turned: Path,
    price: Path,
    tampered: Path,
    ray_serve: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the schema of `serve deploy`, on Ray's own proxy. The long campaign does it with HAProxy, again and again."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from raylway.launch import serve_config

    options = Serve(replicas=Replicas(min=1, max=1))
    models = [Model("fruit", fruit, options), Model("price", price, options)]
    config = YAML(typ="safe").load(serve_config.content(models, "127.0.0.1", 8000, None))
    for each in config["applications"][:2]:
        each["args"]["cpus"] = 0.5
        each["deployments"] = [{"name": "model", "ray_actor_options": {"num_cpus": 0.25, "memory": 1e6}}]
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)
    with httpx.Client(base_url=ray_serve, timeout=60) as client:
        assert [each["name"] for each in strict(client.get("/"))["models"]] == ["fruit", "price"]
        assert strict(client.get("/price/signature"))["model"]["name"] == "price"
        assert strict(client.get("/price/predict"))["status"] == 405
        assert "/predict" in strict(client.get("/fruit/openapi.json"))["paths"]
        with (
            pytest.raises(UserError, match="there is an application in this place"),
            applications.deployed(models[:1], {}),
        ):
            pass
        with loading.load(f"{ray_serve}/fruit", clients=1) as load:
            with pytest.raises(RunFailed, match="answers to the bundle's own examples differ") as caught:
                replacing.replace([Model("fruit", tampered, options)], Reporter("lines"))
            assert f"fruit goes on with {fruit}" in str(caught.value)
            assert set(load.versions) == {version(fruit)}
            old = process_ids("fruit")
            an_exchange_is_taken_back(turned)
            assert process_ids("fruit") == old
            replacing.replace([Model("fruit", turned, options)], Reporter("lines"))
            assert process_ids("fruit").isdisjoint(old)
            assert ask(httpx.Client(base_url=f"{ray_serve}/fruit", timeout=60), GOOD)[1]["predictions"] == ["no"]
        assert load.failed == {}, load.failures
        assert load.versions.keys() == {version(fruit), version(turned)}
        told = capsys.readouterr().err
        assert "rows get another label (100.0%)" in told
        assert "fruit comes from a Serve config file" in told
        before = applications.running()["fruit"].arguments["before"]
        needs = applications.running()["fruit"].actor_options
        assert (needs["num_cpus"], needs["memory"]) == (0.25, 1e6)
        assert before == {"bundle": str(fruit), "cpus": 0.5, "min_replicas": 1, "max_replicas": 1, "max_batch": 64}
        with pytest.raises(UserError, match="nothing was replaced here"):
            replacing.rollback("price", Reporter("lines"))
        the_list_gets_keys(client, tmp_path)
    for name in ("fruit", "price", index.NAME):
        serve.delete(name)
