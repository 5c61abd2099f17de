"""The network of the article, for any number of inputs: Linear, ReLU and dropout, again and again, then Linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

_WIDEST_EMBEDDING = 50


class Mlp(nn.Module):
    """A multi-layer perceptron over standardised numbers and embedded categories.

    With numbers only and `hidden=[512, 256]` it is the article's BigModel.

    Args:
        num_numeric: D, numeric features.
        category_counts: Known categories of each of the C categorical features; code 0 is the unknown one.
        num_outputs: K, outputs: one for each class, or one.
        hidden: Widths of the hidden layers.
        dropout: Share of hidden units dropped in training.
    """

    def __init__(
        self,
        num_numeric: int,
        category_counts: Sequence[int],
        num_outputs: int,
        hidden: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        # The unknown category has the vector 0: training never shows it, so nothing can be learned for it.
        self.embeddings = nn.ModuleList(
            nn.Embedding(count + 1, embedding_width(count), padding_idx=0) for count in category_counts
        )
        width = num_numeric + sum(embedding_width(count) for count in category_counts)
        layers: list[nn.Module] = []
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)]
            width = next_width
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_outputs))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """
        Args:
            numeric: float32 [N, D]
            categorical: int64 [N, C]

        Returns:
            [N, K] in the dtype of the weights
        """
        return self.layers(joined(self.embeddings, _dtype(self.layers), numeric, categorical))


class Stage(nn.Module):
    """Some layers of a network, one behind the other, under the names that their parameters have in the whole.

    Args:
        whole: The network.
        first: The first of its linear layers that is in this stage, from 0.
        last: The one behind this stage.
    """

    def __init__(self, whole: Mlp, first: int, last: int) -> None:
        super().__init__()
        starts = [place for place, layer in enumerate(whole.layers.children()) if isinstance(layer, nn.Linear)]
        ends = [*starts, len(whole.layers)]
        self.layers = whole.layers[starts[first] : ends[last]]
        self.embeddings = whole.embeddings if first == 0 else nn.ModuleList()
        linears = [layer for layer in self.layers.children() if isinstance(layer, nn.Linear)]
        self.width_in, self.width_out = linears[0].in_features, linears[-1].out_features
        self.dtype = _dtype(self.layers)
        self._is_first = first == 0

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """
        Args:
            inputs: What `Mlp.forward` takes, or the output of the stage before, [N, width_in].

        Returns:
            [N, width_out] in the dtype of the weights
        """
        hidden = joined(self.embeddings, self.dtype, *inputs) if self._is_first else inputs[0]
        return self.layers(hidden).to(self.dtype)


def joined(
    embeddings: nn.ModuleList, dtype: torch.dtype, numeric: torch.Tensor, categorical: torch.Tensor
) -> torch.Tensor:
    """The first layer's input, [N, D and the widths of the embeddings]: numbers, then embedded categories."""
    embedded = [embedding(categorical[:, index]) for index, embedding in enumerate(embeddings)]
    # Of one part `cat` would make a copy: megabytes in each pass where the rows are wide.
    return torch.cat([numeric.to(dtype), *embedded], dim=1) if embedded else numeric.to(dtype)


def _dtype(layers: nn.Module) -> torch.dtype:
    return next(layers.parameters()).dtype


def embedding_width(count: int) -> int:
    """Of a feature with so many categories: fastai's rule (`fastai.tabular.model.emb_sz_rule`), found by trial."""
    return max(1, min(_WIDEST_EMBEDDING, round(1.6 * count**0.56)))
