"""How far training is: the part of a checkpoint that the loop itself reads and moves on."""

from __future__ import annotations

import msgspec


class Best(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The best validation so far."""

    value: float | None = None
    step: int = 0
    worse_since: int = 0
    """Validations since then."""


class Rollback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way back to a checkpoint after a spike of the loss."""

    to_step: int
    """Of the checkpoint."""
    first_step: int
    """The batches from this step ..."""
    last_step: int
    """... to this one, where the loss rose, are left out."""
    loss: float | None
    """There; None if it was not finite."""

    def __str__(self) -> str:
        loss = "not finite" if self.loss is None else f"{self.loss:.4g}"
        return (
            f"at step {self.last_step:,} (loss {loss}) back to step {self.to_step:,}, leaving out the batches of steps "
            f"{self.first_step:,} to {self.last_step:,}"
        )


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far training is. The step is the whole state of the data."""

    step: int = 0
    """Steps made, those that were skipped or undone included."""
    updates: int = 0
    """Steps that changed the weights; the schedule counts these."""
    skipped_in_a_row: int = 0
    best: Best = Best()
    best_checkpoint: str = ""
    """The folder of the best validation's weights; empty before the first."""
    stopped_early: bool = False
    losses: list[float] = []
    """Of the newest full steps, where the job guards against spikes."""
    anchor: str = ""
    """The folder to go back to after a spike: the newest that was due by its step, whatever else was saved."""
    rollbacks: list[Rollback] = []

    @property
    def skipped(self) -> int:
        """Steps whose overflow was skipped."""
        return self.step - self.updates - sum(found.last_step - found.first_step + 1 for found in self.rollbacks)

    def after_step(self, updated: bool, losses: list[float]) -> Progress:
        return msgspec.structs.replace(
            self,
            step=self.step + 1,
            updates=self.updates + updated,
            skipped_in_a_row=0 if updated else self.skipped_in_a_row + 1,
            losses=losses,
        )

    def without(self, lost: str, kept: Progress) -> Progress:
        """After a checkpoint could not be written: what is best, and where to go back to, is in none that is not there.

        Args:
            lost: Its folder.
            kept: In the checkpoint before, which is whole.
        """
        best, best_checkpoint, anchor = self.best, self.best_checkpoint, self.anchor
        if best_checkpoint == lost:
            # The validation of the lost one, and those since, were no better ones after all.
            since = kept.best.worse_since + 1 + best.worse_since
            best = msgspec.structs.replace(kept.best, worse_since=since) if kept.best_checkpoint else Best()
            best_checkpoint = kept.best_checkpoint
        if anchor == lost:
            anchor = kept.anchor
        return msgspec.structs.replace(self, best=best, best_checkpoint=best_checkpoint, anchor=anchor)
