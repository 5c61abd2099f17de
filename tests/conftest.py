"""One embedded Ray for the whole session; everything else is made by the tests that need it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# A shell's background job ignores Ctrl-C, and so would every command that the tests start and end with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("any machine", deadline=None)  # an example that waits for a busy CPU is not wrong
settings.load_profile("any machine")


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


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's module `made_by_test` of one test is not that of the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("made_by_test", None)
