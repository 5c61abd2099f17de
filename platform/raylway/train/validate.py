"""Validation: figures over all validation rows, and what follows from them."""

from __future__ import annotations

import math

import msgspec
import torch
import torch.distributed as dist

from raylway.features.learnt import Target
from raylway.train.feed.loader import Feed
from raylway.train.memory import passing
from raylway.train.progress import Best
from raylway.train.step import row_losses
from raylway.train.strategy import Groups, Parallel, evaluating


def judge(best: Best, metric: str, value: float, step: int) -> Best:
    """The best after one more validation. A figure that is no number is never better."""
    sign = 1 if metric == "val_accuracy" else -1
    better = math.isfinite(value) and (best.value is None or sign * value > sign * best.value)
    return Best(value, step) if better else msgspec.structs.replace(best, worse_since=best.worse_since + 1)


def out_of_patience(best: Best, patience: int | None) -> bool:
    return patience is not None and best.worse_since >= patience


class Validation:
    """Evaluates the model on the validation rows, each rank its share.

    Args:
        feed: This rank's share of the rows, unshuffled.
        target: Its task decides the figures.
        groups: Where the ranks' sums meet.
        device: Where the model is.
    """

    def __init__(self, feed: Feed, target: Target, groups: Groups, device: torch.device) -> None:
        self._feed, self._target, self._groups, self._device = feed, target, groups, device

    def figures(self, model: Parallel) -> dict[str, float]:
        """The figures over all rows, each counted once. All ranks call it at once.

        Returns:
            `val_loss`, weighed by class as the feed says (what training minimises under `data.balance`), and
            `val_accuracy` or `val_rmse` (in the target's own unit), in which each row counts once.

        Raises:
            PassTooLarge: Memory did not hold a microbatch.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=self._device)
        with passing(self._feed.most_rows), evaluating(model.module):
            for rows in self._feed.epoch():
                output = model.output(rows)
                if output is None or rows.stands_in:
                    continue
                losses = row_losses(self._target.task, output, rows.target).double()
                hits = (output.argmax(dim=-1) == rows.target) if self._target.task == "classification" else losses
                weighed = (losses * rows.weight).sum()
                count = torch.full_like(weighed, len(losses))
                sums += torch.stack([weighed, rows.weight.sum(), hits.double().sum(), count])
        dist.all_reduce(sums, group=self._groups.step)
        weighed_loss, weight, second, rows_seen = sums.tolist()
        if self._target.task == "classification":
            return {"val_loss": weighed_loss / weight, "val_accuracy": second / rows_seen}
        return {"val_loss": weighed_loss / weight, "val_rmse": math.sqrt(second / rows_seen) * self._target.spread}
