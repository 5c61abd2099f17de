"""Checkpoints that are damaged in every way that we could think of, and which ones stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ranks
from safetensors.numpy import load_file, save_file

from raylway.errors import RunFailed
from raylway.train import checkpoint

TRAIN = {"for": "6 steps", "global_batch": 8, "checkpoint": {"every": "1 steps", "keep": 3}}
SHARD = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ranks.Case:
    """A finished run of six steps, which keeps the checkpoints of the last three."""
    folder = tmp_path_factory.mktemp("trained")
    case = ranks.Case(folder / "run", ranks.prepared(folder / "prepared", 23, 10), TRAIN)
    ranks.done(case)
    return case


@pytest.fixture
def case(trained: ranks.Case, tmp_path: Path) -> ranks.Case:
    shutil.copytree(trained.folder, tmp_path / "run")
    return ranks.Case(tmp_path / "run", trained.prepared, trained.train)


def truncate(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: len(content) // 2])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[-7] ^= 1
    (folder / SHARD).write_bytes(content)


def change_the_state(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    assert '"step": 6' in text
    (folder / "state.json").write_text(text.replace('"step": 6', '"step": 7'))


def cut_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def raise_the_format(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(record | {"format": 99}))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "does not match its checksum": flip_a_bit,
    "bytes, found": truncate,
    "found no file": lambda folder: (folder / SHARD).unlink(),
    "state.json": change_the_state,
    "not finished": lambda folder: (folder / "manifest.json").unlink(),
    "damaged or of another version": cut_the_manifest,
    "reads format 2": raise_the_format,
    "bytes, found no file": lambda folder: (folder / "state.json").unlink(),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(case: ranks.Case, words: str) -> None:
    last = case.run.checkpoints / "step-00000006-a001"
    assert checkpoint.newest(case.run, {}).folder == last
    DAMAGE[words](last)
    broken: dict[str, str] = {}
    found = checkpoint.newest(case.run, broken)
    assert found is not None
    assert found.manifest.step == 5
    assert list(broken) == [last.name]
    assert words in broken[last.name]
    with pytest.raises(RunFailed):
        checkpoint.load_model(last)


def test_a_run_goes_on_from_the_one_before_and_removes_what_is_broken(case: ranks.Case, trained: ranks.Case) -> None:
    folder = case.run.checkpoints
    flip_a_bit(folder / "step-00000006-a001")
    (folder / "step-00000009-a001").mkdir()  # a dead attempt's, without its manifest
    (folder / ".step-00000009-a001-r0").mkdir()
    begun = folder / ".staging-step-00000007-a002-r1"  # a peer is ahead of rank 0, which tidies up
    begun.mkdir()
    report = ranks.done(case)
    assert report.last_checkpoint == "step-00000006-a002"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {f"step-{step:08d}-a001" for step in (4, 5)} | {"step-00000006-a002", report.best_checkpoint, begun.name}
    )
    for name, value in trained.weights("step-00000006-a001").items():
        np.testing.assert_array_equal(case.weights("step-00000006-a002")[name], value)
    assert [step["step"] for step in case.steps()] == [1, 2, 3, 4, 5, 6]
    assert "step-00000006-a001" in case.run.events.read_text()


def test_without_a_whole_checkpoint_it_starts_from_the_beginning(case: ranks.Case, trained: ranks.Case) -> None:
    for folder in case.run.checkpoints.iterdir():
        truncate(folder)
    report = ranks.done(case)
    assert (report.step, report.last_checkpoint) == (6, "step-00000006-a002")
    for name, value in trained.weights("step-00000006-a001").items():
        np.testing.assert_array_equal(case.weights("step-00000006-a002")[name], value)


def test_a_file_that_the_manifest_does_not_name_is_never_read(case: ranks.Case) -> None:
    last = case.run.checkpoints / "step-00000006-a001"
    before = checkpoint.load_model(last)
    stale = {name: np.full_like(value, 7.0) for name, value in load_file(last / SHARD).items()}
    for number in (1, 2):
        save_file(stale, last / f"rank-0000{number}.safetensors")
    after = checkpoint.load_model(last)
    assert all((after[name] == value).all() for name, value in before.items())


def test_a_finished_run_makes_no_step(case: ranks.Case) -> None:
    before = {path: path.stat().st_mtime_ns for path in case.run.checkpoints.rglob("*")}
    metrics = case.run.metrics.read_bytes()
    assert ranks.done(case).step == 6
    assert {path: path.stat().st_mtime_ns for path in case.run.checkpoints.rglob("*")} == before
    assert case.run.metrics.read_bytes() == metrics


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    """Large jumps: the best validation is early, and outlives the newer checkpoints."""
    train = {
        "for": "12 steps",
        "global_batch": 8,
        "clip": None,
        "optimizer": {"kind": "adam", "lr": 0.5},
        "validate": {"every": "1 steps"},
        "checkpoint": {"every": "1 steps", "keep": 2},
    }
    case = ranks.Case(tmp_path, ranks.prepared(tmp_path / "prepared", 24, 40), train, {"hidden": [4], "dropout": 0.0})
    report = ranks.done(case)
    assert 0 < report.best_step < 11
    kept = {report.best_checkpoint, "step-00000011-a001", "step-00000012-a001"}
    assert {path.name for path in case.run.checkpoints.iterdir()} == kept
    assert report.best_checkpoint == f"step-{report.best_step:08d}-a001"
    values = [line["val_loss"] for line in validations(case)]
    assert values[report.best_step - 1] == min(values) == report.best_value


def test_checkpoints_of_many_ranks_are_read_by_one(tmp_path: Path) -> None:
    """Two ranks divide the tensors between their files; the whole is in neither."""
    case = ranks.Case(tmp_path, ranks.prepared(tmp_path / "prepared", 23, 10), TRAIN)
    report = ranks.done(case, workers=2)
    folder = case.run.checkpoints / report.last_checkpoint
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) == 2
    weights = case.weights(report.last_checkpoint)
    in_files = [set(load_file(folder / name)) for name in files]
    assert not in_files[0] & in_files[1]
    assert {f"model.{name}" for name in weights} < in_files[0] | in_files[1]


def validations(case: ranks.Case) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in case.run.metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"]
