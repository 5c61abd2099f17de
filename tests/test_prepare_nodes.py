"""Preparation on a cluster that loses nodes and drivers: the bytes of one undisturbed process, nothing read twice."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import environment
from nodes import Nodes, cluster
from preparing import prepared

from raylway.data import csv_read, engine, pieces
from tests.test_prepare import contents, dirty, write_parts

DATA: dict[str, Any] = {
    "source": "in",
    "target": "label",
    "clean": {"missing": "impute"},
    "derive": {"sum": "whole + real"},
}
RANGE_BYTES = 2_000
PASSES = ("read", "measure", "write")

DRIVER = f"""
    import os, sys, time
    from pathlib import Path
    from raylway import cli
    from raylway.data import csv_read, passes

    marks = Path("marks", str(os.getpid())).absolute()
    marks.mkdir()

    def marked(name, real, marks=marks):
        def act(task, **given):
            import ray
            item = task.item.index if name == "read" else task.facts.item
            mark = marks / f"{{name}} {{item}} {{ray.get_runtime_context().get_node_id()}} {{os.getpid()}}"
            mark.touch()
            time.sleep(0.15)
            result = real(task, **given)
            mark.rename(f"{{mark}} done")
            return result
        return act

    for name in {PASSES}:
        setattr(passes, name, marked(name, getattr(passes, name)))
    csv_read.RANGE_BYTES = {RANGE_BYTES}
    sys.argv = ["raylway", "prepare", "job.yaml"]
    cli.main()
"""


def place(source: Path, name: str) -> Path:
    """A folder with the same source as every other, and a job."""
    folder = source / name
    (folder / "marks").mkdir(parents=True)
    (folder / "in").symlink_to(source / "in")
    (folder / "job.yaml").write_text(json.dumps({"name": "made", "data": DATA}))
    return folder


class Driver:
    """`raylway prepare` in a folder; each task leaves a mark `<driver's pid>/pass item node pid`, with ` done` behind
    it at its end.

    Args:
        folder: Of `place`.
        nodes: The cluster; None for an embedded Ray.
    """

    def __init__(self, folder: Path, nodes: Nodes | None) -> None:
        self.folder = folder
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(DRIVER)],
                cwd=folder,
                env=nodes.environment() if nodes else environment(),
                stdout=log,
                stderr=log,
            )

    def marks(self) -> list[list[str]]:
        """Of all drivers in the folder."""
        return [path.name.split(" ") for path in self.folder.glob("marks/*/*")]

    def reached(self) -> str:
        """The latest pass that this driver's tasks have begun; empty for none."""
        names = {path.name.split(" ")[0] for path in self.folder.glob(f"marks/{self.process.pid}/*")}
        return max(names, key=PASSES.index, default="")

    def begun(self, name: str) -> list[list[str]]:
        """The tasks of a pass that run, or that came to no end."""
        return [mark for mark in self.marks() if mark[0] == name and len(mark) == 4]

    def whole(self) -> dict[str, int]:
        """The items that are read whole, and when each was."""
        found = (self.folder / "runs" / "prepared" / pieces.FOLDER).glob("*/facts")
        return {path.parent.name: path.stat().st_mtime_ns for path in found}

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while not (found := condition()):
            assert time.monotonic() < deadline and self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.005)
        return found

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL

    def made(self) -> dict[str, bytes]:
        """The prepared data; nothing as long as it is not whole."""
        manifests = (self.folder / "runs" / "prepared").glob("*/manifest.json")
        return next((contents(path.parent) for path in manifests), {})

    def prepared(self) -> dict[str, bytes]:
        """The prepared data, once it ends well."""
        assert self.process.wait(120) == 0, (self.folder / "log").read_text()
        return self.made()


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


def test_of_two_drivers_one_is_killed_and_the_other_reads_nothing_again(nodes, source, expected):
    nodes.have(2)
    first = Driver(place(source, "two"), nodes)
    first.until(lambda: len(first.whole()) > 1)
    second = Driver(first.folder, nodes)
    first.until(lambda: len(first.whole()) > 5)
    first.kill()
    whole = first.whole()
    assert second.process.poll() is None
    assert second.prepared() == expected
    assert whole.items() < second.whole().items()
    assert {mark[2] for mark in first.marks()} == set(nodes.ids)


@pytest.mark.parametrize("name", ["read", pytest.param("write", marks=pytest.mark.long)])
def test_a_node_that_is_lost_in_the_middle_of_its_work_changes_nothing(nodes, source, expected, name):
    nodes.have(2)
    driver = Driver(place(source, name), nodes)
    lost = driver.until(lambda: driver.begun(name))[0][2]
    nodes.kill(lost)
    assert driver.prepared() == expected
    cut = {mark[1] for mark in driver.begun(name) if mark[2] == lost}
    again = {mark[1] for mark in driver.marks() if mark[0] == name and mark[2] in nodes.ids and mark[-1] == "done"}
    assert cut and cut <= again and len(again) > 10


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["threads", "nodes"])
def test_killed_at_random_moments_of_every_pass_it_goes_on_where_it_stopped(nodes, source, expected, where):
    nodes.have(2)
    driver = Driver(place(source, where), nodes if where == "nodes" else None)
    draw, kills, whole = random.Random(4), dict.fromkeys(PASSES, 0), {}
    while min(kills.values()) < 3:
        aim = draw.choice([name for name in PASSES if kills[name] < 3])
        driver.until(lambda: driver.process.poll() is not None or driver.reached() == aim)  # noqa: B023
        time.sleep(draw.uniform(0, 0.3))
        hit = driver.reached()
        driver.process.kill()
        ended = driver.process.wait()
        assert ended in (0, -signal.SIGKILL), (driver.folder / "log").read_text()
        if ended:
            kills[hit] += 1
        found = driver.whole()
        assert whole.items() <= found.items()
        whole = found
        if made := driver.made():
            assert made == expected
            shutil.rmtree(driver.folder)
            driver.folder, whole = place(source, where), {}
        driver = Driver(driver.folder, nodes if where == "nodes" else None)
    assert driver.prepared() == expected
