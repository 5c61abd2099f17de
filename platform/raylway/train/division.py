"""How one copy of the model is divided among workers (`train.parallel`), and which jobs can't have it. Without torch.

    workers = copies x parts; worker r holds part r % parts of copy r // parts

Under `shard` each worker has rows of its own; under `tensor` and `pipeline` the workers of a copy share theirs.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from raylway.errors import UserError
from raylway.job.schema import Job
from raylway.job.training import Elastic

CHUNKS_A_STAGE = 4
"""Microbatches for each stage of a pipeline when the job names no size: the stages then wait a fifth of the time."""
_WHERE = "train.parallel"


class Division(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of the plan."""

    kind: Literal["none", "shard", "tensor", "pipeline"] = "none"
    parts: int = 1
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Of a pipeline."""

    @property
    def sharers(self) -> int:
        """Workers that see the same rows."""
        return self.parts if self.kind in ("tensor", "pipeline") else 1

    def __str__(self) -> str:
        match self.kind:
            case "none":
                return "every worker has the whole model"
            case "shard":
                return f"weights, gradients and optimizer state in {self.parts} parts, each worker with rows of its own"
            case "tensor":
                return f"each layer on {self.parts} workers, which share their rows"
            case "pipeline":
                return f"{self.parts} stages of layers, which share their rows; schedule {self.schedule}"


def division(job: Job) -> Division:
    """What the job asks for.

    Raises:
        UserError: The model or the precision does not allow it.
    """
    wanted = job.train.parallel
    for kind in ("shard", "tensor", "pipeline"):
        parts = getattr(wanted, kind)
        if parts > 1:
            found = Division(kind, parts, wanted.schedule)
            _refuse_misfits(job, found)
            return found
    return Division()


def workers(job: Job, found: Division, gpus: int) -> int:
    """Training processes, at most: as many as the job says, or one for each GPU as far as whole copies go, or one copy.

    Raises:
        UserError: They do not make whole copies of the model.
    """
    wanted = job.train.workers
    if isinstance(wanted, Elastic):
        _refuse_parts_that_come_and_go(found, wanted)
        return wanted.max
    if not isinstance(wanted, int):
        return max(1, gpus // found.parts) * found.parts
    if wanted % found.parts:
        raise UserError(
            f"{wanted} worker{'s' * (wanted > 1)} can't hold whole copies of a model in {found.parts} parts",
            where="train.workers",
            expected=f"a multiple of {found.parts}: workers = copies x train.parallel.{found.kind}",
            found=str(wanted),
            fix="change train.workers, or leave it out",
        )
    return wanted


def refuse_short_pipeline(found: Division, microbatches: int) -> None:
    """
    Raises:
        UserError: Fewer microbatches than stages: some of the stages would never have anything to do.
    """
    if found.kind == "pipeline" and microbatches < found.parts:
        raise UserError(
            "a pipeline needs at least as many microbatches as stages",
            where="train.microbatch",
            expected=f"{found.parts} or more microbatches in a step of one copy",
            found=str(microbatches),
            fix="lower train.microbatch or raise train.global_batch",
        )


def _refuse_parts_that_come_and_go(found: Division, wanted: Elastic) -> None:
    """Ray counts workers, not copies: it would start three where a copy needs two."""
    if found.kind != "none":
        raise UserError(
            "a model in parts needs a fixed number of workers",
            where="train.workers",
            expected=f"a multiple of {found.parts}: each machine that comes or goes must bring or take whole copies",
            found=f"min {wanted.min}, max {wanted.max} with train.parallel.{found.kind} {found.parts}",
            fix="name one number of workers, or leave train.parallel out",
        )


def _refuse_misfits(job: Job, found: Division) -> None:
    where, model = f"{_WHERE}.{found.kind}", job.model
    if model.kind != "mlp":
        raise UserError(
            "only our own model can be divided among workers",
            where=where,
            expected="1 for a model of your own",
            found=f"{found.parts} with model.kind {model.kind}",
            fix="leave train.parallel out: workers then train copies of the whole model",
        )
    if model.compile:
        raise UserError(
            "only whole copies of a model can be compiled",
            where="model.compile",
            expected="false beside train.parallel",
            found=f"true with {found.kind} {found.parts}",
        )
    if job.train.precision == "fp16":
        raise UserError(
            "fp16 with its loss scaling is for whole models only",
            where=where,
            expected="train.precision fp32, bf16 or auto beside train.parallel",
            found="fp16",
        )
    if job.train.optimizer.kind == "muon" and found.kind != "pipeline":
        raise UserError(
            "muon needs whole matrices",
            where=where,
            expected="adam, adamw or sgd beside shard and tensor; or a pipeline",
            found=f"train.optimizer.kind muon with {found.kind} {found.parts}",
        )
    layers = len(model.hidden) + 1
    if found.kind == "pipeline" and found.parts > layers:
        raise UserError(
            "a pipeline needs a layer for each stage",
            where=where,
            expected=f"at most {layers}, as many as model.hidden makes layers",
            found=str(found.parts),
        )
    uneven = [width for width in model.hidden if width % found.parts]
    if found.kind == "tensor" and (uneven or not model.hidden):
        raise UserError(
            "tensor divides the hidden layers into equal parts",
            where=where,
            expected=f"hidden layers whose widths are multiples of {found.parts}",
            found=f"model.hidden {model.hidden}",
            fix="change model.hidden or train.parallel.tensor",
        )
