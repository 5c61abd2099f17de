"""Checkpoints that are written while training goes on: to folders and to a bucket, whole, failed, stale, and kept."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import stores
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from raylway import storage
from raylway.errors import RunFailed
from raylway.runs.run import Run
from raylway.storage import buckets
from raylway.train import checkpoint, chunks, failures
from raylway.train.checkpoint import State
from raylway.train.chunks import Part
from raylway.train.division import Division
from raylway.train.memory import Chosen
from raylway.train.progress import Best, Progress
from raylway.train.saving import Checkpoints, Ended
from raylway.train.strategy import Groups
from raylway.train.worker import Start

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    """One rank, this process."""
    meeting = tmp_path_factory.mktemp("meeting") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield Groups.create(Division(), 300.0)
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run")


@pytest.fixture
def in_bucket(run: Run, s3_server: stores.Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Its checkpoints are in a bucket."""
    for name, value in (s3_server.variables | {"RAYLWAY_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    buckets.system.cache_clear()
    run.checkpoints = storage.place(s3_server.address(f"{tmp_path.name}/checkpoints"))
    yield run
    buckets.system.cache_clear()


def begun(run: Run, groups: Groups, keep: int = 2, sync: Callable[[], Any] = lambda: None, at: int = 0) -> Checkpoints:
    """An attempt, as `worker` begins one."""
    attempt = failures.begin(run, f"launch {at}", at, 1, checkpoint.last_attempt(run.checkpoints))
    return Checkpoints(run, keep, Start(attempt, "", [], Chosen(4)), groups, Progress(step=at), sync)


def saved(checkpoints: Checkpoints, step: int, value: float | None = None, **progress: Any) -> Ended | None:
    """What becomes of a save of one tensor."""
    tensors = {"model.weight": torch.full((3, 2), float(step if value is None else value))}
    checkpoints.save(tensors, state(step, **progress))
    return checkpoints.settle()


def state(step: int, **progress: Any) -> State:
    return State(Progress(step=step, **progress), microbatch=4, workers=1, metrics_bytes=0, scaler={}, optimizer=[])


class Gate:
    """Holds up the thread that writes, just before the manifest."""

    def __init__(self) -> None:
        self._may_pass, self.reached = threading.Event(), threading.Event()
        self.open()

    def __call__(self) -> None:
        self.reached.set()
        self._may_pass.wait()

    def open(self) -> None:
        self._may_pass.set()

    def close(self) -> None:
        self._may_pass.clear()
        self.reached.clear()


def names(run: Run) -> list[str]:
    return [each.name for each in storage.children(run.checkpoints)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(TYPES), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_the_files_are_what_other_tools_read(
    shapes: list[list[int]], dtypes: list[torch.dtype], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """safetensors' own reader, the one of `torch.distributed.checkpoint`, and ours: whole, and any part."""
    folder = tmp_path_factory.mktemp("file")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.{index}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    path = folder / "a.safetensors"
    file = chunks.write(path, {key: Part(value, [0] * value.dim()) for key, value in tensors.items()})
    assert (file.bytes, file.checksum) == (path.stat().st_size, storage.checksum(path))
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    ours = chunks.read(folder, [file], "model.", chunks.whole)
    for key, value in tensors.items():
        for found in (theirs[key], ours[key.removeprefix("model.")]):
            assert found.dtype == value.dtype and torch.equal(found, value)

    bounds = {key: [(size // 3, size - size // 4) for size in value.shape] for key, value in tensors.items()}
    parts = chunks.read(folder, [file], "", lambda key, shape: bounds[key])
    for key, value in tensors.items():
        assert torch.equal(parts[key], value[tuple(slice(*bound) for bound in bounds[key])])
    if all(value.numel() for value in tensors.values()):
        into = {key: torch.zeros_like(value) for key, value in tensors.items()}
        load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        assert all(torch.equal(into[key], value) for key, value in tensors.items())


def test_the_loop_goes_on_and_changes_its_tensors_while_a_copy_is_written(run: Run, groups: Groups) -> None:
    gate = Gate()
    checkpoints = begun(run, groups, sync=gate)
    started_at = time.monotonic()
    assert saved(checkpoints, 1) is not None
    time.sleep(2 * (time.monotonic() - started_at))  # steps that take longer than a save
    gate.close()
    weight = torch.full((3, 2), 2.0)
    checkpoints.save({"model.weight": weight}, state(2))
    weight.fill_(7.0)
    assert not checkpoints.has_ended
    assert checkpoint.newest(run, {}).manifest.step == 1
    gate.open()
    ended = checkpoints.settle()
    assert ended is not None and (ended.name, ended.error, ended.in_a_row) == ("step-00000002-a001", "", 0)
    assert ended.kept == Progress(step=2)
    found = checkpoint.newest(run, {})
    assert found is not None and found.manifest.step == 2
    assert torch.equal(found.tensors("model.")["weight"], torch.full((3, 2), 2.0))
    assert checkpoints.stalled_s() > 0 and checkpoints.stalled_s() == 0
    assert checkpoints.settle() is None


def test_the_first_is_waited_for_and_so_is_one_that_takes_longer_than_the_steps(run: Run, groups: Groups) -> None:
    checkpoints = begun(run, groups, sync=lambda: time.sleep(0.05))
    for step in (1, 2):
        checkpoints.save({"model.weight": torch.ones(3)}, state(step))
        assert checkpoints.has_ended
        checkpoints.settle()


@pytest.mark.parametrize("where", ["run", "in_bucket"])
def test_the_newest_and_the_needed_stay_and_all_else_goes(
    where: str, request: pytest.FixtureRequest, groups: Groups
) -> None:
    run = request.getfixturevalue(where)
    left = run.folder / "left"  # by one that was killed
    left.write_bytes(b"x")
    storage.move(left, run.checkpoints / "step-00000009-a001" / "rank-00000.safetensors")
    checkpoints = begun(run, groups)
    for step in range(1, 6):
        best = {"best_checkpoint": "step-00000001-a002", "best": Best(0.5, 1)}
        assert saved(checkpoints, step, **best).error == ""
    assert names(run) == [f"step-{step:08d}-a002" for step in (1, 4, 5)]
    assert checkpoint.newest(run, {}).state.progress.best == Best(0.5, 1)
    assert checkpoint.load_model(run.checkpoints / "step-00000001-a002")["weight"].tolist() == [[1.0, 1.0]] * 3


def test_a_bucket_that_goes_away_fails_two_saves_and_comes_back(
    in_bucket: Run, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = begun(in_bucket, groups)
    kept = saved(checkpoints, 1).kept
    there, nowhere = os.environ["AWS_ENDPOINT_URL_S3"], f"http://127.0.0.1:{stores.free_ports(1)[0]}"
    monkeypatch.setattr(buckets, "GIVE_UP_AFTER_S", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", nowhere)
    buckets.system.cache_clear()
    for step, in_a_row in ((2, 1), (3, 2)):
        ended = saved(checkpoints, step)
        assert "the bucket can't be reached" in ended.error
        assert (ended.in_a_row, ended.kept, checkpoints.written) == (in_a_row, kept, "step-00000001-a001")
    with pytest.raises(RunFailed, match="can't be reached"):  # not: no checkpoint is there
        checkpoint.newest(in_bucket, {})
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", there)
    buckets.system.cache_clear()
    assert checkpoint.newest(in_bucket, {}).manifest.step == 1
    assert checkpoints.again()
    assert checkpoints.settle().error == ""
    found = checkpoint.newest(in_bucket, {})
    assert found.manifest.step == 3
    assert found.tensors("model.")["weight"].tolist() == [[3.0, 3.0]] * 3
    assert not checkpoints.again()


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_object_is_named_and_passed_over(in_bucket: Run, groups: Groups, damage: str) -> None:
    checkpoints = begun(in_bucket, groups)
    for step in (1, 2):
        saved(checkpoints, step)
    file = in_bucket.checkpoints / "step-00000002-a001" / "rank-00000.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        storage.write_bytes(file, content[:-3] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    broken: dict[str, str] = {}
    assert checkpoint.newest(in_bucket, broken).manifest.step == 1
    words = {"cut": f"expected {len(content)} bytes, found", "flipped": "checksum", "missing": "found no file"}
    assert list(broken) == ["step-00000002-a001"] and words[damage] in broken["step-00000002-a001"]
    assert str(file) in broken["step-00000002-a001"]


def test_what_a_replaced_attempt_still_writes_is_never_read_and_goes(run: Run, groups: Groups) -> None:
    """It has copied, and may write again when its successor has begun from the checkpoint before."""
    gate = Gate()
    stale = begun(run, groups, sync=gate)
    started_at = time.monotonic()
    saved(stale, 5)
    time.sleep(2 * (time.monotonic() - started_at))  # steps that take longer than a save
    gate.close()
    stale.save({"model.weight": torch.full((3, 2), -1.0)}, state(9))
    assert gate.reached.wait(30)
    successor = begun(run, groups, keep=1, at=5)
    gate.open()
    ended = stale.settle()
    assert ended is not None and ended.error == ""  # the fault: it is there, and whole
    assert checkpoint.opened(run.checkpoints / "step-00000009-a001")
    assert names(run) == ["step-00000005-a001", "step-00000009-a001"], "a replaced attempt removes nothing"
    broken: dict[str, str] = {}
    assert checkpoint.newest(run, broken).folder.name == "step-00000005-a001"
    assert "attempt 2 had begun from step 5 before it" in broken["step-00000009-a001"]
    saved(successor, 6)
    assert checkpoint.newest(run, {}).folder.name == "step-00000006-a002"
    assert names(run) == ["step-00000006-a002"]
    stale.save({"model.weight": torch.ones(3, 2)}, state(10))
    with pytest.raises(RuntimeError, match="a later attempt has taken over this run"):
        stale.settle()
    assert checkpoint.newest(run, {}).folder.name == "step-00000006-a002"


def test_a_disk_without_room_is_not_filled_up(
    run: Run, groups: Groups, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoints = begun(run, groups)
    saved(checkpoints, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10 << 30, 10 << 30, 8 << 20))
    ended = saved(checkpoints, 2)
    assert ended is not None and "No space left on device" in ended.error and "rank-00000.safetensors" in ended.error
    assert names(run) == ["step-00000001-a001"]


def test_weights_that_are_not_finite_leave_no_checkpoint(run: Run, groups: Groups) -> None:
    checkpoints = begun(run, groups)
    saved(checkpoints, 1)
    with pytest.raises(RunFailed, match="after step 2: weight is not finite"):
        saved(checkpoints, 2, float("inf"))
    assert names(run) == ["step-00000001-a001"]


def test_a_checkpoint_that_failed_is_neither_the_best_nor_a_way_back() -> None:
    kept = Progress(step=4, best=Best(0.5, 2, 1), best_checkpoint="two", anchor="four")
    later = Progress(step=9, updates=9, best=Best(0.3, 6, 2), best_checkpoint="six", anchor="six")
    # Validations at 2, one after it, at 6, and two after it: four since the best that is left.
    assert later.without("six", kept) == msgspec.structs.replace(
        kept, step=9, updates=9, best=Best(0.5, 2, worse_since=4)
    )
    assert later.without("eight", kept) == later
    assert later.without("six", Progress()) == Progress(step=9, updates=9)
