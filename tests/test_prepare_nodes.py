"""Preparation on a cluster of several nodes that lose tasks, nodes and drivers: the bytes of one undisturbed process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import Nodes, cluster
from preparing import prepared

from raylway.data import csv_read, engine
from tests.test_prepare import contents, dirty, write_parts

DATA: dict[str, Any] = {"source": "in", "target": "label", "clean": {"missing": "impute"}, "derive": {"sum": "whole + real"}}
RANGE_BYTES = 2_000

DRIVER = """
    import os, sys, time
    from pathlib import Path
    from raylway.data import csv_read, passes, prepare
    from raylway.job.load import load_job
    from raylway.launch import start
    from raylway.runs.progress import Reporter

    folder, csv_read.RANGE_BYTES = Path(sys.argv[1]), int(sys.argv[2])

    def marked(name, real, marks=folder / "marks"):
        def act(task, **given):
            import ray
            item = task.item.index if name == "read" else task.facts.item
            mark = marks / f"{name} {item} {ray.get_runtime_context().get_node_id()} {os.getpid()}"
            mark.touch()
            time.sleep(0.3)
            result = real(task, **given)
            mark.rename(f"{mark} done")
            return result
        return act

    for name in ("read", "measure", "write"):
        setattr(passes, name, marked(name, getattr(passes, name)))
    loaded, reporter = load_job(folder / "job.yaml"), Reporter("lines")
    with start.connect(reporter, loaded.import_paths):
        prepare.prepare(loaded, folder / "runs", reporter)
"""


class Driver:
    """A process that prepares a job of the same source as every other, in a folder of its own; each task leaves a mark
    `pass item node pid`, with ` done` behind it at its end."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.folder, self._nodes = folder, nodes
        (folder / "marks").mkdir(parents=True)
        (folder / "in").symlink_to(folder.parent / "in")
        (folder / "job.yaml").write_text(json.dumps({"name": "made", "data": DATA}))
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(self.folder), str(RANGE_BYTES)]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, env=self._nodes.environment(), stdout=log, stderr=log)

    def marks(self) -> list[list[str]]:
        return [path.name.split(" ") for path in (self.folder / "marks").iterdir()]

    def begun(self, name: str) -> list[list[str]]:
        """The tasks of a pass that run now."""
        return [mark for mark in self.marks() if mark[0] == name and len(mark) == 4]

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while not (found := condition()):
            assert time.monotonic() < deadline and self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.005)
        return found

    def prepared(self) -> dict[str, bytes]:
        """What it made."""
        assert self.process.wait(120) == 0, (self.folder / "log").read_text()
        (manifest,) = (self.folder / "runs" / "prepared").glob("*/manifest.json")
        return contents(manifest.parent)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster() as made:
        yield made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_parts(dirty(900), folder / "in", 4)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, bytes]:
    """What one process without Ray makes of the source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_read, "RANGE_BYTES", RANGE_BYTES)
        patch.setattr(engine, "FEW", 10_000)
        (source / "alone").mkdir()
        (source / "alone" / "in").symlink_to(source / "in")
        return contents(prepared(source / "alone", DATA).folder)


def test_nodes_that_are_lost_while_they_read_and_write_change_nothing(nodes, source, expected):
    ids = [nodes.add() for _ in range(3)]
    driver = Driver(nodes, source / "lost")
    lost = []
    for name in ("read", "write"):
        mark = driver.until(lambda name=name: [mark for mark in driver.begun(name) if mark[2] not in lost])[0]
        nodes.kill(mark[2])
        lost.append(mark[2])
    assert driver.prepared() == expected
    assert {mark[2] for mark in driver.marks()} == set(ids)
    for name, node in zip(("read", "write"), lost, strict=True):
        cut = {mark[1] for mark in driver.begun(name) if mark[2] == node}
        again = {mark[1] for mark in driver.marks() if mark[0] == name and mark[2] != node and mark[-1] == "done"}
        assert cut and cut <= again
