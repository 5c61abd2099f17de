"""One copy of the model on several workers, in float64, against plain torch on the whole batches in one process."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ranks
import torch
from made_prepared import make
from torch.nn import functional as F

from raylway.features.prepared import Prepared
from raylway.job.load import load_job
from raylway.models.mlp import Mlp
from raylway.train import checkpoint
from raylway.train.feed.order import Order, random_seed

JOBS = Path(__file__).parent.parent / "jobs"
WAYS: dict[str, dict[str, Any]] = {
    "shard": {"shard": 2},
    "tensor": {"tensor": 2},
    "1f1b": {"pipeline": 2},
    "gpipe": {"pipeline": 2, "schedule": "gpipe"},
}
CLOSE = {"rtol": 0, "atol": 1e-10}


class Plain:
    """Plain torch: losses, norms, first gradients, last weights and what validation finds with them."""

    def __init__(self, case: ranks.Case, steps: int) -> None:
        job, prepared = case.job, case.prepared
        self._target = prepared.manifest.transform.target
        model = self._model(case)
        optimizer = torch.optim.SGD(model.parameters(), job.train.optimizer.lr, job.train.optimizer.momentum)
        order = Order([shard.rows for shard in prepared.shards("train")], job.seed)
        self.losses: list[float] = []
        self.norms: list[float] = []
        for step in range(steps):
            torch.manual_seed(random_seed(job.seed, step, 0))
            optimizer.zero_grad()
            losses = self._losses(model, prepared, "train", order.positions(step, job.train.global_batch))
            losses.mean().backward()
            if not step:
                self.gradients = {name: each.grad.numpy().copy() for name, each in model.named_parameters()}
            self.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.clip or float("inf")).item())
            optimizer.step()
            self.losses.append(losses.mean().item())
        self.weights = {name: each.detach().numpy() for name, each in model.named_parameters()}
        model.eval()
        rows = prepared.manifest.account.validation
        self.val_loss = self._losses(model, prepared, "validation", np.arange(rows)).mean().item() if rows else None

    def _model(self, case: ranks.Case) -> torch.nn.Module:
        transform, model = case.prepared.manifest.transform, case.job.model
        torch.manual_seed(case.seed)
        torch.set_default_dtype(torch.float64)
        try:
            outputs = max(1, len(self._target.classes))
            return Mlp(transform.num_numeric, transform.category_counts, outputs, model.hidden, model.dropout)
        finally:
            torch.set_default_dtype(torch.float32)

    def _losses(self, model: torch.nn.Module, prepared: Prepared, split: str, positions: np.ndarray) -> torch.Tensor:
        numeric, categorical, truth, _ = prepared.rows(split).take(positions)
        output = model(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
        if self._target.classes:
            return F.cross_entropy(output, torch.from_numpy(truth).long(), reduction="none")
        return (output[:, 0] - torch.from_numpy((truth - self._target.mean) / self._target.spread)).square()


def trained(workers: int, *cases: ranks.Case) -> list[str]:
    """Train cases one after the other in one group of ranks, in float64; the name of each one's last checkpoint."""
    assignments = [case.assignment(workers) for case in cases]
    reports = ranks.run(*assignments, workers=workers, folder=cases[0].folder, exact=True)
    for mine in reports:
        assert all(report.failure is None for report in mine), mine
        assert [report.last_checkpoint for report in mine] == [report.last_checkpoint for report in reports[0]]
    return [report.last_checkpoint for report in reports[0]]


def assert_same(case: ranks.Case, last: str, expected: Plain) -> None:
    """Losses and norms of every step, weights after the last one, and their validation."""
    np.testing.assert_allclose([step["loss"] for step in case.steps()], expected.losses, **CLOSE)
    np.testing.assert_allclose([step["grad_norm"] for step in case.steps()], expected.norms, **CLOSE)
    weights = case.weights(last)
    assert weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        np.testing.assert_allclose(weights[name], value, **CLOSE)
    if expected.val_loss is not None:
        assert case.validations()[-1]["val_loss"] == pytest.approx(expected.val_loss, abs=1e-10)


@pytest.fixture(scope="module")
def article(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """550 rows of the article's job, 500 of them for training: the last batch of an epoch is short."""
    sys.path.insert(0, str(JOBS))
    from article_data import rows

    sys.path.remove(str(JOBS))
    table = pa.Table.from_pandas(rows().iloc[:560], preserve_index=False)
    table = table.set_column(table.num_columns - 1, "target", table["target"].cast(pa.string()))
    splits = {"train": table[:500], "validation": table[500:550], "test": table[550:]}
    return make(tmp_path_factory.mktemp("article") / "prepared", splits, "target")


def article_case(folder: Path, prepared: Prepared, steps: int, **train: Any) -> ranks.Case:
    """The job of `jobs/article.yaml` without dropout, with 8 microbatches in a step as the article feeds its pipeline,
    and with an optimizer whose state after one step is the first gradient."""
    job = load_job(JOBS / "article.yaml").job
    section = {
        "for": f"{steps} steps",
        "global_batch": job.train.global_batch,
        "microbatch": job.train.global_batch // 8,
        "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
        "clip": None,
        "checkpoint": {"every": f"{steps} steps"},
    }
    return ranks.Case(folder, prepared, section | train, {"hidden": job.model.hidden, "dropout": 0})


@pytest.fixture(scope="module")
def expected(article: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(article_case(tmp_path_factory.mktemp("plain"), article, 20), 20)


@pytest.mark.parametrize("way", WAYS)
def test_the_articles_network_trains_as_in_one_process(
    tmp_path: Path, article: Prepared, expected: Plain, way: str
) -> None:
    first = article_case(tmp_path / "1", article, 1, parallel=WAYS[way])
    whole = article_case(tmp_path / "20", article, 20, parallel=WAYS[way])
    (after_one, last) = trained(2, first, whole)
    moments = checkpoint.opened(first.run.checkpoints / after_one).tensors("optim.")
    for name, gradient in expected.gradients.items():
        assert moments[f"{name}.momentum_buffer"].dtype == torch.float64
        np.testing.assert_allclose(moments[f"{name}.momentum_buffer"].numpy(), gradient, **CLOSE)
    assert len(whole.steps()) == 20
    assert_same(whole, last, expected)


SMALL = {"for": "8 steps", "optimizer": {"kind": "sgd", "lr": 0.2, "momentum": 0.9}}


@pytest.mark.parametrize(
    ("workers", "parallel", "hidden"),
    [
        (3, {"shard": 3}, [8, 6]),  # two classes, or one number: the last layer leaves ranks without a row of it
        (4, {"shard": 2}, [8, 6]),  # two copies of each shard
        (4, {"tensor": 2}, [8]),
        (3, {"tensor": 3}, [6, 9, 3]),
        (4, {"pipeline": 2}, [8, 6]),
        (3, {"pipeline": 3}, [8, 6]),
        (3, {"pipeline": 3, "schedule": "gpipe"}, [8, 6, 5]),
    ],
)
def test_every_size_gives_the_gradient_of_the_whole_batch(
    tmp_path: Path, workers: int, parallel: dict[str, Any], hidden: list[int]
) -> None:
    """Categories, clipping, batches that don't divide, and a last batch of one row: classes, and numbers."""
    cases = []
    for target in ("label", "v"):
        prepared = ranks.prepared(tmp_path / f"prepared-{target}", 34, 7, target=target)
        for batch, microbatch in ((11, 2), (16, 3)):
            train = SMALL | {"global_batch": batch, "microbatch": microbatch, "clip": 0.1, "parallel": parallel}
            folder = tmp_path / f"{target}-{batch}"
            cases.append(ranks.Case(folder, prepared, train, {"hidden": hidden, "dropout": 0}))
    assert cases[0].plan(workers).rows_in(4) == 1
    for case, last in zip(cases, trained(workers, *cases), strict=True):
        found = Plain(case, 8)
        assert max(found.norms) > 0.1, "some gradients are clipped"
        assert_same(case, last, found)


@pytest.mark.parametrize("way", WAYS)
def test_what_else_the_job_asks_for_is_done_as_in_one_process(tmp_path: Path, way: str) -> None:
    """Weights of classes, decay, an average; muon where `check` lets it through. Other tests compare one process with
    scikit-learn and with torch's own optimizers."""
    prepared = ranks.prepared(tmp_path / "prepared", 34, 7)
    asked: dict[str, dict[str, Any]] = {
        "classes": {},
        "decay": {"optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1, "ema": 0.9}},
    }
    if "pipeline" in WAYS[way]:
        asked["muon"] = {"optimizer": {"kind": "muon", "lr": 0.01, "weight_decay": 0.1}}

    def cases(name: str, parallel: dict[str, Any]) -> list[ranks.Case]:
        train = SMALL | {"global_batch": 16, "microbatch": 4, "parallel": parallel}
        model = {"hidden": [8, 6], "dropout": 0}
        data = {key: {"balance": "weights"} if key == "classes" else {} for key in asked}
        return [
            ranks.Case(tmp_path / f"{name}-{key}", prepared, train | keys, model, data=data[key])
            for key, keys in asked.items()
        ]

    divided, plain = cases("divided", WAYS[way]), cases("plain", {})
    lasts = zip(trained(2, *divided), trained(1, *plain), strict=True)
    for mine, other, (last, expected) in zip(divided, plain, lasts, strict=True):
        for figure in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                [step[figure] for step in mine.steps()], [step[figure] for step in other.steps()], **CLOSE
            )
        weights, wanted = mine.weights(last), other.weights(expected)
        for name, value in wanted.items():
            np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-8, err_msg=f"{mine.folder.name}: {name}")


def test_ranks_that_compute_a_layer_together_drop_what_one_process_would(tmp_path: Path) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 40, 7)
    train = SMALL | {"global_batch": 16, "parallel": {"tensor": 2}}
    case = ranks.Case(tmp_path / "run", prepared, train, {"hidden": [8, 6, 4], "dropout": 0.5})
    (last,) = trained(2, case)
    assert_same(case, last, Plain(case, 8))


def test_a_checkpoint_goes_on_under_any_other_way(tmp_path: Path) -> None:
    """Every way after every other one of two workers, begun and ended in one process; as one process all the way.

    Clipping and momentum: both know the whole gradient, and the optimizer's state travels too.
    """
    prepared = ranks.prepared(tmp_path / "prepared", 34, 7)
    ways: list[dict[str, Any]] = [{}, {"shard": 2}, {"tensor": 2}, {"pipeline": 2}]
    # A walk that uses each pair of different ways once in each direction.
    walk = [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0]
    assert len(set(itertools.pairwise(walk))) == 12

    def case(steps: int, parallel: dict[str, Any]) -> ranks.Case:
        train = SMALL | {"for": f"{steps} steps", "global_batch": 11, "clip": 0.5, "parallel": parallel}
        return ranks.Case(tmp_path / "run", prepared, train, {"hidden": [8, 6], "dropout": 0})

    trained(1, case(2, {}))
    trained(2, *(case(2 * place + 4, ways[way]) for place, way in enumerate(walk)))
    steps = 2 * len(walk) + 4
    (last,) = trained(1, case(steps, {}))
    assert_same(case(steps, {}), last, Plain(case(steps, {}), steps))


def test_a_rank_that_fails_in_a_step_ends_its_peers_at_once(tmp_path: Path) -> None:
    """One row a rank and step: the first to meet the damaged shard fails alone, and no one waits 300 s for it."""
    prepared = ranks.prepared(tmp_path / "prepared", 250)
    shard = prepared.folder / prepared.shards("train")[-1].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    train = {"for": "2 epochs", "global_batch": 2, "parallel": {"shard": 2}}
    case = ranks.Case(tmp_path / "run", prepared, train, {"hidden": [8, 6], "dropout": 0})
    reports = [mine[0] for mine in ranks.run(case.assignment(2), workers=2, folder=tmp_path)]
    assert case.run.events.read_text().count("attempt failed") == 1
    for report in reports:
        assert report.failure is not None
        assert report.failure.kind == "run"


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path: Path, way: str) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 100, 7)
    train = {
        "for": "100 steps",
        "global_batch": 16,
        "microbatch": 3,
        "checkpoint": {"every": "25 steps"},
        "parallel": WAYS[way],
    }
    model = {"hidden": [32, 16], "dropout": 0.3}
    whole, broken = (ranks.Case(tmp_path / name, prepared, train, model) for name in ("whole", "broken"))
    last = ranks.done(whole, 2).last_checkpoint
    started = ranks.Ranks([broken.assignment(2)], 2, tmp_path)
    while checkpoint.newest(broken.run, {}) is None:
        time.sleep(0.001)
    os.kill(started.processes[1].pid, signal.SIGKILL)
    (peer,), killed = started.results()
    assert killed == [None]
    assert isinstance(peer, str), "the peer raises, and Ray Train starts the group again"
    assert len(broken.steps()) < 100
    report = ranks.done(broken, 2)
    assert report.last_checkpoint == last.replace("a001", "a002")
    assert [step["loss"] for step in broken.steps()] == [step["loss"] for step in whole.steps()]
    found, expected = broken.weights(report.last_checkpoint), whole.weights(last)
    assert all((found[name] == value).all() for name, value in expected.items())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_learns_in_bf16_and_under_dropout(tmp_path: Path, way: str) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 200, 50)
    train = {"for": "10 epochs", "precision": "bf16", "optimizer": {"lr": 0.01}, "parallel": WAYS[way]}
    case = ranks.Case(tmp_path / "run", prepared, train, {"hidden": [64, 32], "dropout": 0.2})
    report = ranks.done(case, 2)
    assert report.best_value is not None
    assert report.best_value < 0.25  # ln 2 = 0.69 without learning
    assert all(value.dtype == np.float32 for value in case.weights(report.best_checkpoint).values())
