"""One copy of the model on several workers: the article's network, in float64, against plain torch in one process."""

from __future__ import annotations

import functools
import sys
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
from raylway.train.feed.order import Order

JOBS = Path(__file__).parent.parent / "jobs"
WAYS: dict[str, dict[str, Any]] = {
    "shard": {"shard": 2},
    "tensor": {"tensor": 2},
    "1f1b": {"pipeline": 2},
    "gpipe": {"pipeline": 2, "schedule": "gpipe"},
}
CLOSE = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def article(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """600 rows of the article's job, 500 of them for training: a short last batch."""
    sys.path.insert(0, str(JOBS))
    from article_data import rows

    sys.path.remove(str(JOBS))
    table = pa.Table.from_pandas(rows().iloc[:600], preserve_index=False)
    table = table.set_column(table.num_columns - 1, "target", table["target"].cast(pa.string()))
    splits = {"train": table[:500], "validation": table[500:550], "test": table[550:]}
    return make(tmp_path_factory.mktemp("article") / "prepared", splits, "target")


def case(folder: Path, prepared: Prepared, **train: Any) -> ranks.Case:
    """The job of `jobs/article.yaml`, 20 steps of it, without dropout, with 8 microbatches in a step as the article
    feeds its pipeline, and with an optimizer that keeps the first gradient."""
    job = load_job(JOBS / "article.yaml").job
    assert (job.model.hidden, job.train.global_batch) == ([512, 256], 128)
    section = {
        "for": "20 steps",
        "global_batch": 128,
        "microbatch": 16,
        "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
        "clip": None,
        "checkpoint": {"every": "1 steps", "keep": 99},
        "validate": {"every": "20 steps"},
    }
    return ranks.Case(folder, prepared, section | train, {"hidden": job.model.hidden, "dropout": 0})


class Plain:
    """Plain torch on the whole global batches: losses, norms, first gradients, last weights."""

    def __init__(self, prepared: Prepared, steps: int, clip: float | None) -> None:
        torch.manual_seed(42)
        transform, rows = prepared.manifest.transform, prepared.rows("train")
        outputs = len(transform.target.classes)
        hidden = [512, 256] if transform.num_numeric == 1_000 else [8, 6]
        model = in_float64(lambda: Mlp(transform.num_numeric, transform.category_counts, outputs, hidden, 0.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        order = Order([shard.rows for shard in prepared.shards("train")], 42)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, np.ndarray] = {}
        for step in range(steps):
            numeric, categorical, truth, _ = rows.take(order.positions(step, 128))
            optimizer.zero_grad()
            output = model(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
            loss = F.cross_entropy(output, torch.from_numpy(truth).long())
            loss.backward()
            if not step:
                self.gradients = {name: each.grad.numpy().copy() for name, each in model.named_parameters()}
            self.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).item())
            optimizer.step()
            self.losses.append(loss.item())
        self.weights = {name: each.detach().numpy() for name, each in model.named_parameters()}


def in_float64(make_model: Any) -> torch.nn.Module:
    torch.set_default_dtype(torch.float64)
    try:
        return make_model()
    finally:
        torch.set_default_dtype(torch.float32)


@functools.cache
def plain(folder: Path, steps: int, clip: float | None) -> Plain:
    return Plain(Prepared(folder), steps, clip)


def trained(found: ranks.Case, workers: int) -> str:
    """Train in float64; the name of the last checkpoint."""
    reports = ranks.run(found.assignment(workers), workers=workers, folder=found.folder, exact=True)
    assert all(mine[0].failure is None for mine in reports), reports
    assert len({mine[0].last_checkpoint for mine in reports}) == 1
    return reports[0][0].last_checkpoint


def assert_same(found: ranks.Case, last: str, expected: Plain) -> None:
    """Losses and norms of every step, gradients of the first one, weights after the last one."""
    np.testing.assert_allclose([step["loss"] for step in found.steps()], expected.losses, **CLOSE)
    np.testing.assert_allclose([step["grad_norm"] for step in found.steps()], expected.norms, **CLOSE)
    first = checkpoint.opened(found.run.checkpoints / "step-00000001-a001").tensors("optim.")
    for name, gradient in expected.gradients.items():
        assert first[f"{name}.momentum_buffer"].dtype == torch.float64
        # Clipping scales the gradient that the optimizer sees.
        scale = min(1.0, (found.job.train.clip or np.inf) / expected.norms[0])
        np.testing.assert_allclose(first[f"{name}.momentum_buffer"].numpy(), gradient * scale, **CLOSE)
    weights = found.weights(last)
    assert weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        np.testing.assert_allclose(weights[name], value, **CLOSE)


@pytest.mark.parametrize("way", WAYS)
def test_the_articles_network_trains_as_in_one_process(tmp_path: Path, article: Prepared, way: str) -> None:
    """20 steps, the short batches at the end of 5 epochs among them (116 rows: the last microbatches are empty)."""
    found = case(tmp_path, article, parallel=WAYS[way])
    assert_same(found, trained(found, 2), plain(article.folder, 20, None))
