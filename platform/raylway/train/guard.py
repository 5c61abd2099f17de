"""What becomes of a step once all ranks know its loss: an update, a skipped overflow, a way back, or the end.

Everything is computed from numbers that all ranks have agreed on and that are in the checkpoints, so all decide alike,
and a resumed run decides again what the unbroken one did.
"""

from __future__ import annotations

import math
import statistics
from enum import Enum, auto

import msgspec
import torch

from raylway.errors import RunFailed
from raylway.job.training import Spike
from raylway.train.plan import Plan
from raylway.train.progress import Progress, Rollback
from raylway.train.step import Agreed

MOST_SKIPS_IN_A_ROW = 20
"""The scale starts at 65,536 and halves at each overflow: after 20 of them it is not the scale."""
MOST_ROLLBACKS = 3
"""To one checkpoint: what spikes a fourth time has another cause than its batches."""


class Verdict(Enum):
    UPDATE = auto()
    SKIP = auto()
    """An overflow, which belongs to fp16."""
    ROLL_BACK = auto()


class Guard:
    """Judges the steps.

    Args:
        spike: What the job says about spikes of the loss.
        plan: Lengths.
        may_skip: Overflows are part of this precision.
    """

    def __init__(self, spike: Spike, plan: Plan, may_skip: bool) -> None:
        self._spike, self._plan, self._may_skip = spike, plan, may_skip
        self._window = spike.window.in_steps(plan.steps_per_epoch) if spike.then != "ignore" else 0

    def judge(self, progress: Progress, agreed: Agreed, norm: torch.Tensor) -> Verdict:
        """What becomes of the step after `progress`; nothing has been touched yet.

        Args:
            progress: Before this step.
            agreed: Of this step.
            norm: Of the gradient.

        Raises:
            RunFailed: On all ranks alike: the run must not go on.
        """
        step = progress.step + 1
        if not agreed.finite:
            if self._may_skip and progress.skipped_in_a_row + 1 < MOST_SKIPS_IN_A_ROW:
                return Verdict.SKIP
            again = f", {MOST_SKIPS_IN_A_ROW} steps in a row" if self._may_skip else ""
            trouble = f"step {step}{again}: loss {agreed.loss:g}, gradient norm {norm.item():g}: not finite"
        elif (limit := self._limit(progress)) is not None and agreed.loss > limit:
            trouble = f"step {step}: loss {agreed.loss:g}: a spike, above {limit:g}"
        else:
            return Verdict.UPDATE
        if self._spike.then == "rollback" and progress.anchor:
            return Verdict.ROLL_BACK
        raise RunFailed(
            f"training stopped at {trouble}. The weights were left as they were before this step. Lower "
            f"train.optimizer.lr, set train.clip, or add a warm-up"
        )

    def remembered(self, progress: Progress, agreed: Agreed) -> list[float]:
        """The losses that the steps after this one are compared with."""
        if not (self._window and self._is_full(progress.step + 1) and math.isfinite(agreed.loss)):
            return progress.losses
        return [*progress.losses, agreed.loss][-self._window :]

    def rolled_back(self, progress: Progress, saved: Progress, loss: float) -> Progress:
        """Where training goes on after the way back.

        The steps between the checkpoint and here keep their numbers and are not made again: their batches are left out.
        What was best stays the best.

        Args:
            progress: After the step that was judged.
            saved: In the checkpoint.
            loss: Of the step.

        Raises:
            RunFailed: This checkpoint was gone back to before, again and again.
        """
        before = [found for found in progress.rollbacks if found.to_step == saved.step]
        if len(before) >= MOST_ROLLBACKS:
            raise RunFailed(
                f"training stopped at step {progress.step}: the loss ({loss:g}) rises after each of {MOST_ROLLBACKS} "
                f"ways back to step {saved.step}, whatever batches follow. Lower train.optimizer.lr, or set train.clip"
            )
        first = 1 + (before[-1].last_step if before else saved.step)
        made = Rollback(saved.step, first, progress.step, loss if math.isfinite(loss) else None)
        return msgspec.structs.replace(
            saved,
            step=progress.step,
            anchor=progress.anchor,
            rollbacks=[*progress.rollbacks, made],
            best=progress.best,
            best_checkpoint=progress.best_checkpoint,
        )

    def _limit(self, progress: Progress) -> float | None:
        """The loss above which this step is a spike; None while there is too little to compare with."""
        is_known = self._window and len(progress.losses) == self._window and self._is_full(progress.step + 1)
        if not is_known or (self._spike.then == "rollback" and not progress.anchor):
            return None
        return statistics.fmean(progress.losses) + self._spike.deviations * statistics.pstdev(progress.losses)

    def _is_full(self, step: int) -> bool:
        """The short last batch of an epoch may be a single row: its loss says nothing."""
        return self._plan.rows_in(step) == self._plan.rows_in(1)
