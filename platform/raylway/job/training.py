"""The section `train` of the job file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raylway.job.section import Auto, Count, Real, Section
from raylway.job.units import Duration, Interval, Progress


class Spike(Section):
    """What happens when the loss of a step jumps."""

    then: Literal["ignore", "stop", "rollback"] = "ignore"
    """`stop`, before the weights are touched; or `rollback` to the last checkpoint that was due, and go on behind the
    step that spiked, leaving out the batches between."""
    deviations: Annotated[Real, Field(gt=0)] = 6.0
    """A spike is a loss above the mean of the last steps by more than so many standard deviations."""
    window: Progress = Duration(128, "steps")
    """The last steps that it is compared with; before there are so many, and in short batches, nothing is a spike."""

    @model_validator(mode="after")
    def _compares(self) -> Spike:
        if not self.window.amount:
            raise ValueError("expected a window above zero steps")
        return self


class Optimizer(Section):
    kind: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    """`muon` is for matrices; embeddings and what has another number of dimensions get `adamw`."""
    lr: Annotated[Real, Field(gt=0)] = 1e-3
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """For the weights of layers; norms, biases and embeddings have none."""
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    """For `sgd` only."""
    ema: Annotated[Real, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; the averaged weights are validated,
    evaluated and served. Left out: no average."""
    spike: Spike = Spike()

    @model_validator(mode="after")
    def _momentum_is_for_sgd(self) -> Optimizer:
        if self.momentum and self.kind != "sgd":
            raise ValueError(f"expected momentum with sgd only; {self.kind} has its own")
        return self


class Schedule(Section):
    kind: Literal["constant", "step", "cosine", "linear", "wsd"] = "constant"
    """`cosine` and `linear` fall to zero by the last step; `wsd` stays, and falls to zero over `decay`."""
    warmup: Progress = Duration(0, "steps")
    """Linear rise from zero to the full learning rate."""
    every: Progress | None = None
    """`step` only: after each such length the rate is multiplied by `gamma`."""
    gamma: Annotated[Real, Field(gt=0, le=1)] | None = None
    decay: Progress | None = None
    """`wsd` only: the length of its linear fall; left out: a fifth of the steps."""

    @model_validator(mode="after")
    def _arguments_fit_kind(self) -> Schedule:
        given = self.every is not None or self.gamma is not None
        if self.kind == "step" and (self.every is None or self.gamma is None):
            raise ValueError("expected every and gamma, such as {kind: step, every: 30 epochs, gamma: 0.1}")
        if self.kind != "step" and given:
            raise ValueError(f"expected every and gamma with kind step only; kind is {self.kind}")
        if self.decay is not None and (self.kind != "wsd" or not self.decay.amount):
            raise ValueError(f"expected decay with kind wsd only, and above zero; kind is {self.kind}")
        return self


class Elastic(Section):
    """Workers that come and go with the machines of the cluster."""

    min: Count = 1
    """Training starts, and goes on, as soon as there are so many."""
    max: Count
    """It grows up to these."""

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.min >= self.max:
            raise ValueError(f"expected min to be below max ({self.max}); found {self.min}")
        return self


class Resources(Section):
    """What one training worker gets."""

    cpus: Count = 1
    gpus: Annotated[int, Field(ge=0)] | Auto = "auto"
    """`auto`: one where the cluster has GPUs, else none."""


class Parallel(Section):
    """How one copy of the model is divided among workers; one of the three, for models too large for one worker."""

    shard: Count = 1
    """Weights, gradients and optimizer state lie in so many parts; each worker has rows of its own."""
    tensor: Count = 1
    """Each layer is computed by so many workers together, on the same rows."""
    pipeline: Count = 1
    """The layers are cut into so many stages; microbatches pass through them one behind the other."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Of the pipeline: a backward pass follows each forward pass as soon as it can, or all of them come at the end."""

    @model_validator(mode="after")
    def _one_way(self) -> Parallel:
        chosen = [name for name in ("shard", "tensor", "pipeline") if getattr(self, name) > 1]
        if len(chosen) > 1:
            raise ValueError(f"expected one of shard, tensor and pipeline above 1; found {' and '.join(chosen)}")
        if self.schedule != "1f1b" and self.pipeline == 1:
            raise ValueError(f"expected schedule with a pipeline above 1 only; found {self.schedule}")
        return self


class Checkpoint(Section):
    every: Interval = Duration(5, "min")
    keep: Count = 3
    """How many of the newest stay; the best one always stays."""


class Validate(Section):
    every: Progress = Duration(1, "epochs")
    best: Literal["val_loss", "val_accuracy", "val_rmse"] = "val_loss"
    """The metric that picks the weights of the bundle."""
    patience: Count | None = None
    """Stop after this many validations without a better one; left out: train to the end."""


class Train(Section):
    duration: Progress | Auto = Field(default="auto", alias="for")
    """`20 epochs` or `3000 steps`; `auto`: 20 epochs, or more for small data."""
    global_batch: Count | Auto = "auto"
    """Rows in one optimizer step, whatever the number of workers."""
    microbatch: Count | Auto = "auto"
    """Rows of one worker in one forward and backward pass; accumulation follows from it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip: Annotated[Real, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient; `null` turns clipping off."""
    workers: Count | Elastic | Auto = "auto"
    """Training processes, those that share a copy of the model included. `auto`: one for each GPU of the cluster, or as
    few as `parallel` needs. `{min: 1, max: 4}`: as many of these as there is room for, at each moment."""
    resources: Resources = Resources()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validate = Field(default=Validate(), alias="validate")

    @model_validator(mode="after")
    def _way_back_is_known(self) -> Train:
        if self.optimizer.spike.then == "rollback" and self.checkpoint.every.is_time:
            raise ValueError(
                f"expected checkpoint.every in steps or epochs with optimizer.spike.then: rollback, so that the way "
                f"back does not depend on the clock; found {self.checkpoint.every}"
            )
        return self
