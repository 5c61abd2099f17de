"""Optimizers and schedules: equal to torch's own, with decay where it belongs, and the same bits after a kill."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.optim import lr_scheduler
from user_models import FOLDER, layers

from raylway.job.schema import Job
from raylway.job.training import Optimizer
from raylway.train import optim
from raylway.train.feed.order import Order
from raylway.train.plan import Plan, plan

KINDS = ("adam", "adamw", "sgd", "muon")
MATRICES = ["first.weight", "out.weight"]
FILTERS = ["filter.weight"]
DECAYED = [*MATRICES, *FILTERS]
"""Of `user_models.layers`; its norms, biases and embeddings have no decay."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Torch's threads would wait for one another on a busy machine; the models here are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def groups(model: torch.nn.Module, decayed: list[str], left_out: list[str]) -> list[dict[str, Any]]:
    named = {name: parameter for name, parameter in model.named_parameters() if name not in left_out}
    return [
        {"params": [parameter for name, parameter in named.items() if name in decayed]},
        {"params": [parameter for name, parameter in named.items() if name not in decayed], "weight_decay": 0.0},
    ]


def plain(model: torch.nn.Module, wanted: Optimizer, **how: bool) -> list[torch.optim.Optimizer]:
    """What a reader of docs/job-file.md would write with torch alone."""
    lr, decay = wanted.lr, wanted.weight_decay
    match wanted.kind:
        case "adam":
            return [torch.optim.Adam(groups(model, DECAYED, []), lr, weight_decay=decay, **how)]
        case "adamw":
            return [torch.optim.AdamW(groups(model, DECAYED, []), lr, weight_decay=decay, **how)]
        case "sgd":
            return [torch.optim.SGD(groups(model, DECAYED, []), lr, wanted.momentum, weight_decay=decay, **how)]
        case "muon":
            matrices = [parameter for name, parameter in model.named_parameters() if name in MATRICES]
            muon = torch.optim.Muon(matrices, lr, decay, adjust_lr_fn="match_rms_adamw")
            return [muon, torch.optim.AdamW(groups(model, FILTERS, MATRICES), lr, weight_decay=decay, **how)]


@given(
    kind=st.sampled_from(KINDS),
    lr=st.floats(1e-5, 0.5),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    momentum=st.sampled_from([0.0, 0.9]),
    steps=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_every_optimizer_moves_the_weights_as_torchs_own(
    kind: str, lr: float, decay: float, momentum: float, steps: int, seed: int
) -> None:
    """To the last bit the one kernel for all parameters; within rounding the plain loop over them."""
    wanted = Optimizer(kind=kind, lr=lr, weight_decay=decay, momentum=momentum if kind == "sgd" else 0.0)
    models = []
    for _ in range(3):
        torch.manual_seed(seed)
        models.append(layers(3, [3], 2))
    ours, fused, looped = models
    optimizers: list[list[torch.optim.Optimizer]] = [
        [optim.optimizer(ours, wanted)],
        plain(fused, wanted, fused=True),
        plain(looped, wanted, foreach=False, fused=False),
    ]
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        gradients = [torch.randn(each.shape, generator=draw, dtype=each.dtype) for each in ours.parameters()]
        for model, parts in zip(models, optimizers, strict=True):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            for part in parts:
                optim.set_learning_rate(part, lr / (step + 1))
                part.step()
    for (name, found), same, near in zip(ours.named_parameters(), fused.parameters(), looped.parameters(), strict=True):
        assert torch.equal(found, same), name
        torch.testing.assert_close(found, near, rtol=1e-12, atol=1e-14)
    assert not any(torch.equal(a, b) for a, b in zip(ours.parameters(), layers(3, [3], 2).parameters(), strict=True))


def test_norms_biases_and_embeddings_have_no_decay() -> None:
    """With a gradient of zero, decay is all that moves a weight."""
    model = layers(3, [3], 2)
    for kind in KINDS:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = optim.optimizer(model, Optimizer(kind=kind, lr=0.1, weight_decay=0.5))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
        assert sorted(moved) == sorted(DECAYED), kind


def test_frozen_and_shared_parameters() -> None:
    """A frozen parameter has no place; a table that is both embedding and output layer counts as an embedding."""
    model = layers(3, [3], 4)
    model.first.weight.requires_grad = False
    model.table.weight = model.out.weight
    for kind in KINDS:
        optimizer = optim.optimizer(model, Optimizer(kind=kind, lr=0.1, weight_decay=0.5))
        placed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(placed) == sorted(id(each) for each in model.parameters() if each is not model.first.weight)
        decayed = [each for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]]
        assert [id(parameter) for parameter in decayed] == [id(model.filter.weight)], kind


def after_warmup(optimizer: torch.optim.Optimizer, train: Any, found: Plan) -> lr_scheduler.LRScheduler:
    """Torch's schedule after the warm-up, begun at the step that it begins at."""
    length = max(1, found.total_steps - found.warmup_steps)
    match train.schedule.kind:
        case "constant":
            return lr_scheduler.ConstantLR(optimizer, 1.0)
        case "step":
            return lr_scheduler.StepLR(optimizer, found.decay_every_steps, train.schedule.gamma)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, length)
        case "linear":
            return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, length)
        case "wsd":
            return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, found.decay_steps)
    raise AssertionError


def job_of(**train: Any) -> Job:
    return Job.model_validate({"name": "case", "data": {"source": "a.csv", "target": "t"}, "train": train})


@given(
    kind=st.sampled_from(["constant", "step", "cosine", "linear", "wsd"]),
    lr=st.floats(1e-6, 10),
    total=st.integers(1, 60),
    warmup=st.integers(0, 30),
    every=st.integers(1, 20),
    gamma=st.floats(0.01, 1),
    decay=st.one_of(st.none(), st.integers(1, 60)),
)
@settings(max_examples=100, deadline=None)
def test_the_rate_of_each_update_is_that_of_torchs_schedule(
    kind: str, lr: float, total: int, warmup: int, every: int, gamma: float, decay: int | None
) -> None:
    """Against the closed form of each scheduler, which does not gather rounding over the steps; the warm-up is
    torch's LinearLR from 1 / steps over steps - 1."""
    warmup = min(warmup, total - 1)
    schedule: dict[str, Any] = {"kind": kind, "warmup": f"{warmup} steps"}
    if kind == "step":
        schedule |= {"every": f"{every} steps", "gamma": gamma}
    if kind == "wsd" and decay is not None:
        schedule["decay"] = f"{min(decay, total - warmup)} steps"
    job = job_of(**{"for": f"{total} steps", "optimizer": {"lr": lr}, "schedule": schedule})
    found = plan(job, "classification", 1000, 0, 4, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for updates in range(total):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
            main = after_warmup(optimizer, job.train, found)
            begins_at = {"step": 0, "constant": 0, "wsd": total - (found.decay_steps or 0)}.get(kind, warmup)
            main.step(max(0, updates - begins_at))
            expected = optimizer.param_groups[0]["lr"]
            if updates < warmup:
                rising = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=expected)
                lr_scheduler.LinearLR(rising, 1 / warmup, 1.0, warmup - 1).step(updates) if warmup > 1 else None
                expected = rising.param_groups[0]["lr"]
            rate = optim.learning_rate(job.train, found, updates)
            assert rate == pytest.approx(expected, rel=1e-12, abs=lr * 1e-15), updates


def chained(optimizer: torch.optim.Optimizer, total: int, kind: str) -> lr_scheduler.LRScheduler:
    """As one writes it with torch: 5 steps of warm-up, then the schedule; `wsd` falls over the last 10."""
    rise = lr_scheduler.LinearLR(optimizer, 0.2, 1.0, 4)
    match kind:
        case "cosine":
            parts, ends = [rise, lr_scheduler.CosineAnnealingLR(optimizer, total - 5)], [5]
        case "linear":
            parts, ends = [rise, lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total - 5)], [5]
        case "wsd":
            fall = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 10)
            parts, ends = [rise, lr_scheduler.ConstantLR(optimizer, 1.0), fall], [5, total - 10]
        case _:
            return lr_scheduler.ChainedScheduler([rise, lr_scheduler.StepLR(optimizer, 12, 0.1)], optimizer)
    return lr_scheduler.SequentialLR(optimizer, parts, ends)


TRAININGS = {
    "adam": {"kind": "cosine"},
    "adamw": {"kind": "linear"},
    "sgd": {"kind": "step", "every": "12 steps", "gamma": 0.1},
    "muon": {"kind": "wsd", "decay": "10 steps"},
}
"""A schedule for each optimizer; all with a warm-up of 5 steps."""


def asked(kind: str) -> dict[str, Any]:
    return {"kind": kind, "lr": 0.02, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "sgd" else {})


def case(folder: Path, prepared: Any, kind: str, **train: Any) -> ranks.Case:
    """30 steps: five epochs of 23 rows in batches of 4, clipped."""
    settings_ = {
        "for": "5 epochs",
        "global_batch": 4,
        "clip": 0.5,
        "optimizer": asked(kind),
        "schedule": TRAININGS[kind] | {"warmup": "5 steps"},
        "checkpoint": {"every": "7 steps", "keep": 9},
    }
    return ranks.Case(folder, prepared, settings_ | train, {"kind": "user_models:layers"}, [FOLDER])


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("workers", [1, 2])
def test_optimizers_clipping_and_schedules_train_as_plain_torch_does(tmp_path: Path, workers: int) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23)
    cases = [case(tmp_path / kind, prepared, kind) for kind in KINDS]
    reports = ranks.run(*(each.assignment(workers) for each in cases), workers=workers, folder=tmp_path)[0]
    rows, order = prepared.rows("train"), Order([shard.rows for shard in prepared.shards("train")], 42)
    for done, report, kind in zip(cases, reports, KINDS, strict=True):
        assert report.failure is None, report.failure
        torch.manual_seed(42)
        model = layers(2, [3], 2)
        optimizers = plain(model, Optimizer(**asked(kind)), foreach=False)
        schedules = [chained(optimizer, 30, kind_of_schedule(kind)) for optimizer in optimizers]
        norms = []
        for step in range(30):
            numeric, categorical, truth, _ = rows.take(order.positions(step, 4))
            output = model(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
            model.zero_grad()
            F.cross_entropy(output, torch.from_numpy(truth).long()).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
        assert max(norms) > 0.5, "nothing was clipped"
        np.testing.assert_allclose([step["grad_norm"] for step in done.steps()], norms, rtol=1e-6)
        for name, value in model.state_dict().items():
            np.testing.assert_allclose(done.weights(report.last_checkpoint)[name], value.numpy(), rtol=0, atol=1e-9)


def kind_of_schedule(kind: str) -> str:
    return str(TRAININGS[kind]["kind"])


@pytest.mark.parametrize("workers", [1, 2])
def test_every_optimizer_goes_on_to_the_last_bit(tmp_path: Path, workers: int) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23)
    whole = [case(tmp_path / kind, prepared, kind) for kind in KINDS]
    expected = ranks.run(*(each.assignment(workers) for each in whole), workers=workers, folder=tmp_path)[0]
    resumed = []
    for done, kind in zip(whole, KINDS, strict=True):
        shutil.copytree(done.folder, tmp_path / f"{kind}-again")
        again = case(tmp_path / f"{kind}-again", prepared, kind)
        for step in (14, 21, 28, 30):
            shutil.rmtree(again.run.checkpoints / f"step-{step:08d}-a001")
        resumed.append(again)
    found = ranks.run(*(each.assignment(workers) for each in resumed), workers=workers, folder=tmp_path)[0]
    for kind, one, other, was, now in zip(KINDS, whole, resumed, expected, found, strict=True):
        assert now.last_checkpoint == "step-00000030-a002", now.failure
        weights = one.weights(was.last_checkpoint)
        for name, value in other.weights(now.last_checkpoint).items():
            assert (value == weights[name]).all(), (kind, name)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23)
    ranks.done(case(tmp_path / "run", prepared, "adam", **{"for": "2 steps"}))
    for kind, name in (("adamw", "AdamW"), ("sgd", "SGD"), ("muon", "MuonWithAdamW")):
        other = case(tmp_path / "run", prepared, kind, **{"for": "20 steps"})
        (report,) = ranks.run(other.assignment(1, launch=kind), workers=1, folder=tmp_path)[0]
        assert report.failure is not None
        assert report.failure.kind == "user"
        message = str(report.failure.as_error())
        assert "the checkpoint is of another optimizer" in message
        assert f"the state of {name}" in message
        assert "that of Adam" in message
        assert "step-00000002-a001" in message
