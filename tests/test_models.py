"""The article's network, and models of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import prepared
from torch import nn

from raylway.errors import UserError
from raylway.features.learnt import CategoricalFeature, NumericFeature, Target
from raylway.features.prepared import Prepared
from raylway.features.transform import Transform
from raylway.job.schema import Model
from raylway.models import registry
from raylway.models.mlp import Mlp
from raylway.train.strategy import evaluating, refuse_batch_norm


def transform(numeric: int, categories: list[int], classes: int) -> Transform:
    return Transform(
        derive={},
        numeric=[
            NumericFeature(f"n{index}", f"n{index}", "", 0, 1, 0, 1, "standard", 0, 1, [], [], 0, False)
            for index in range(numeric)
        ],
        categorical=[
            CategoricalFeature(
                f"c{index}", f"c{index}", "", [str(code) for code in range(count)], [], "0", False, False
            )
            for index, count in enumerate(categories)
        ],
        target=Target("t", "classification" if classes else "regression", [str(code) for code in range(classes)], 0, 1),
        behind=[],
        drops_missing=True,
    )


class BigModel(nn.Module):
    """As the article has it, chapter 3."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1000, 512)
        self.fc2 = nn.Linear(512, 256)
        self.fc3 = nn.Linear(256, 10)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.relu(self.fc1(x)))
        x = self.dropout(self.relu(self.fc2(x)))
        return self.fc3(x)


def test_with_numbers_only_it_is_the_network_of_the_article() -> None:
    torch.manual_seed(0)
    theirs = BigModel()
    torch.manual_seed(0)
    ours = registry.build(Model(hidden=[512, 256], dropout=0.5), transform(1000, [], 10))
    assert [tuple(value.shape) for value in ours.state_dict().values()] == [
        tuple(value.shape) for value in theirs.state_dict().values()
    ]
    rows = torch.randn(7, 1000)
    for seed in (1, 2):  # in training, dropout and all
        torch.manual_seed(seed)
        expected = theirs(rows)
        torch.manual_seed(seed)
        assert torch.equal(ours(rows, torch.zeros(7, 0, dtype=torch.int64)), expected)


def test_categories_reach_the_output_and_an_unknown_one_is_nothing() -> None:
    model = Mlp(1, [3, 40], 2, [8], 0.0)
    assert [(table.num_embeddings, table.embedding_dim) for table in model.embeddings] == [(4, 3), (41, 13)]
    one = torch.zeros(1, 1)
    outputs = [model(one, torch.tensor([[code, 5]])) for code in range(4)]
    assert len({tuple(output[0].tolist()) for output in outputs}) == 4
    assert not model.embeddings[0].weight[0].any()
    outputs[0].sum().backward()
    assert not model.embeddings[0].weight.grad[0].any()


MINE = """
import torch

class Scaled(torch.nn.Module):
    def __init__(self, width, outputs, factor):
        super().__init__()
        self.layer, self.factor = torch.nn.Linear(width, outputs), factor

    def forward(self, numeric, categorical):
        return self.factor * self.layer(numeric)

def scaled(num_numeric, category_counts, num_outputs, factor=1.0):
    return Scaled(num_numeric, num_outputs, factor)

def narrow(num_numeric, category_counts, num_outputs):
    return Scaled(num_numeric, 1, 1.0)

def nothing(**facts):
    return None

def normed(num_numeric, category_counts, num_outputs, frozen):
    norm = torch.nn.BatchNorm1d(num_numeric)
    if frozen:
        norm.eval()

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = norm, torch.nn.Linear(num_numeric, num_outputs)

        def forward(self, numeric, categorical):
            return self.layer(self.norm(numeric))

    return Normed()
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    (tmp_path / "mine_too.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_too", raising=False)
    return prepared(tmp_path / "prepared", 20)


def own(function: str, **args: object) -> Model:
    return Model(kind=f"mine_too:{function}", args=args)


def test_a_model_of_the_users_own_gets_the_facts_and_its_arguments(rows: Prepared) -> None:
    model = registry.build(own("scaled", factor=3.0), rows.manifest.transform)
    numeric = torch.randn(4, 2)
    expected = 3.0 * nn.functional.linear(numeric, model.layer.weight, model.layer.bias)
    assert torch.equal(model(numeric, torch.zeros(4, 1, dtype=torch.int64)), expected)
    assert registry.source("mine_too:scaled").decode() == MINE
    assert registry.source("mlp") == b""


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        ("no_such_module:build", {}, ["no_such_module", "beside the job file"]),
        ("mine_too:no_such_function", {}, ["no_such_function", "mine_too.py"]),
        ("mine_too:scaled", {"facter": 1.0}, ["facter", "model.args", "num_outputs, factor=1.0"]),
        ("mine_too:normed", {}, ["frozen", "model.args"]),
        ("mine_too:narrow", {}, ["wrong shape", "[rows, 2]", "[2, 1]"]),
        ("mine_too:nothing", {}, ["torch.nn.Module", "NoneType"]),
    ],
)
def test_a_model_that_does_not_fit_is_named(
    rows: Prepared, kind: str, args: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        registry.build(Model(kind=kind, args=args), rows.manifest.transform)
    assert all(word in str(caught.value) for word in [*words, "model.kind"])


def test_batch_norm_is_refused_unless_it_is_frozen(rows: Prepared) -> None:
    learning = registry.build(own("normed", frozen=False), rows.manifest.transform)
    with pytest.raises(UserError, match="'norm'.*\n.*LayerNorm"):
        refuse_batch_norm(learning)
    frozen = registry.build(own("normed", frozen=True), rows.manifest.transform)
    refuse_batch_norm(frozen)
    with evaluating(frozen):
        assert not frozen.training
    assert frozen.training
    assert not frozen.norm.training
