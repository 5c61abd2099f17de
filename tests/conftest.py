"""One embedded Ray and one server of each kind for the whole session; the rest is made by the tests that need it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asking
import httpx
import pytest
import stores
import web_server
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# A shell's background job ignores Ctrl-C, and so would every command that the tests start and end with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("any machine", deadline=None)  # an example that waits for a busy CPU is not wrong
settings.load_profile("any machine")


LISTENERS = (
    "test_serve",
    "test_serve_application",
    "test_serve_versions",
    "test_end_to_end",
    "test_cluster",
    "test_long",
    "test_long_serve",
)
"""Files whose tests list or take the ports of a whole machine: one after the other."""


class Files(LoadFileScheduling):
    """A file is the work of one process, which keeps what its tests share."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "listeners" if Path(file).stem in LISTENERS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not list(Path("/dev").glob("nvidia[0-9]*")):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="NOT TESTED HERE: this machine has no GPU"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with four logical CPUs, token authentication on as it comes."""
    import ray

    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=400_000_000,
            _temp_dir=folder,
            logging_level="warning",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def ray_serve(ray_session: None) -> Iterator[str]:
    """Serve on the session's Ray, with Ray's own proxy; the address."""
    from ray import serve

    port = asking.free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="session")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `made.fruit`."""
    import made

    return made.fruit().stage(tmp_path_factory.mktemp("fruit") / "bundle", name="fruit")


@pytest.fixture(scope="module")
def client(fruit: Path) -> Iterator[httpx.Client]:
    """Asks that bundle's application, which is by itself in this process."""
    from raylway.bundle.predictor import Predictor
    from serve_app.service import Service

    with asking.local(Service(Predictor(fruit), 64)) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    import browsing

    with browsing.browser() as found:
        yield found


@pytest.fixture(scope="session")
def trip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `made.trips`, as a run publishes it."""
    import made

    return made.published(tmp_path_factory.mktemp("trip"), *made.trips(), hour="number", weekend="boolean")


@pytest.fixture(scope="module")
def trip_client(trip: Path) -> Iterator[httpx.Client]:
    """As `client`, of that bundle."""
    from raylway.bundle.predictor import Predictor
    from serve_app.service import Service

    with asking.local(Service(Predictor(trip), 64)) as found:
        yield found


@pytest.fixture
def page(browser: Browser, trip_client: httpx.Client) -> Iterator[Page]:
    """The page of that bundle in the browser."""
    import browsing

    with browsing.opened(browser, trip_client, reduced_motion="reduce") as found:
        yield found


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's module `made_by_test` of one test is not that of the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("made_by_test", None)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stores.Bucket]:
    with stores.s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def google_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stores.Bucket]:
    with stores.google(tmp_path_factory.mktemp("google")) as server:
        yield server


@pytest.fixture(params=["s3_server", "google_server"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[stores.Bucket]:
    """The bucket `rows` of each store in turn, named by the environment as a user would."""
    from raylway.storage import buckets

    server: stores.Bucket = request.getfixturevalue(request.param)
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    buckets.system.cache_clear()
    yield server
    buckets.system.cache_clear()


@pytest.fixture(scope="session")
def https_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[web_server.Web, Path]]:
    """A server and the certificate that it shows."""
    certificate = tmp_path_factory.mktemp("https") / "made.pem"
    web_server.certify(certificate)
    with web_server.serving(certificate) as web:
        yield web, certificate


@pytest.fixture
def web(https_server: tuple[web_server.Web, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[web_server.Web]:
    """The server, trusted by this process and those that it starts."""
    from raylway.data import web_ask

    server, certificate = https_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    web_ask._pool.cache_clear()
    server.files.clear()
    server.asked.clear()
    yield server
    web_ask._pool.cache_clear()
