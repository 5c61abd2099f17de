"""Checkpoints: folders that count only when their manifest, written last, is there and every file matches it.

`saving` writes them:

    step-00001200-a007/                      a007: the attempt that wrote it
        shard-00001-model-00001-of-00001.safetensors   one from each rank that has something to write
        state.json                           counters, optimizer settings, scaler
        manifest.json                        files with sizes, checksums and tensors; written last

Only files that the manifest names are ever read, after their checksums were compared, and none is a pickle. An attempt
never writes into the folder of another, so what a dead one left behind can't mix with what is new. Workers whose driver
was killed may live on for a while and still write: what an attempt has reached beyond the step that a later one began
from is left aside too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.runs.run import Run
from raylway.train import failures
from raylway.train.average import Average
from raylway.train.chunks import File, Place, Wanted, as_part, place_of, read, shapes, whole
from raylway.train.failures import Attempt
from raylway.train.progress import Progress
from raylway.train.strategy import Parallel, local

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL, OPTIMIZER, AVERAGE = "model.", "optim.", "ema."
_NOT_SAVED = ("params", "foreach", "fused")
NAME = re.compile(r"step-(\d{8,})-a(\d{3,})")


class Broken(RunFailed):
    """A folder that is no whole checkpoint; says why."""


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of training that is not a tensor: `state.json`."""

    progress: Progress
    microbatch: int
    workers: int
    metrics_bytes: int
    """Length of metrics.jsonl at this step."""
    scaler: dict[str, Any]
    optimizer: list[dict[str, Any]]
    """From `settings_of`."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    step: int
    attempt: int
    files: list[File]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole."""

    folder: storage.Place
    manifest: Manifest

    @property
    def state(self) -> State:
        return storage.read_record(self.folder / STATE, State)

    def tensors(self, prefix: str, wanted: Wanted = whole) -> dict[str, torch.Tensor]:
        """Tensors whose names start with the prefix, by the rest of their names, on the CPU; see `chunks.read`."""
        return read(self.folder, self.manifest.files, prefix, wanted)


def name(step: int, attempt: int) -> str:
    return f"step-{step:08d}-a{attempt:03d}"


def opened(folder: storage.Place, verify: bool = True) -> Checkpoint:
    """A checkpoint after every file of it was compared with the manifest.

    Args:
        folder: Its own.
        verify: Compare the contents too; False where another process has just done so.

    Raises:
        Broken: It is not whole; the message says what is wrong with it.
    """
    if not (folder / MANIFEST).exists():
        raise Broken(f"{folder}: not finished, or removed")
    try:
        manifest = storage.read_record(folder / MANIFEST, Manifest)
    except UserError as error:
        raise Broken(f"{folder / MANIFEST}: {error.what}: {error.found}") from None
    if manifest.format != FORMAT:
        raise Broken(f"{folder}: has format {manifest.format}; this version reads format {FORMAT}")
    for file in manifest.files:
        path = folder / file.name
        size = storage.size(path)
        if size != file.bytes:
            raise Broken(f"{path}: expected {file.bytes} bytes, found {'no file' if size is None else size}")
        if verify and storage.checksum(path) != file.checksum:
            raise Broken(f"{path}: its content does not match its checksum")
    return Checkpoint(folder, manifest)


def newest(run: Run, broken: dict[str, str], verify: bool = True) -> Checkpoint | None:
    """The whole checkpoint with the highest step, then attempt; None when there is none.

    Args:
        run: Whose.
        broken: Filled with the folders that were passed over because they are not whole or were written by an attempt
            that another had replaced, and why.
        verify: As of `opened`.
    """
    starts = failures.starts(run)
    for found in reversed(candidates(run.checkpoints)):
        later = replaced_by(found.name, starts)
        if later is not None:
            broken[found.name] = f"{found}: attempt {later.attempt} had begun from step {later.from_step} before it"
            continue
        try:
            return opened(found, verify)
        except Broken as error:
            broken[found.name] = str(error)
    return None


def load_model(folder: storage.Place) -> dict[str, torch.Tensor]:
    """The model's weights of one checkpoint, by parameter and buffer name, on the CPU; averaged, if it has averages.

    Raises:
        Broken: The checkpoint is not whole.
    """
    found = opened(folder)
    return found.tensors(MODEL) | found.tensors(AVERAGE)


def last_attempt(folder: storage.Place) -> int:
    """The highest attempt that left a folder, whole or not; 0 for none."""
    return max((_key(path.name)[1] for path in candidates(folder)), default=0)


def candidates(folder: storage.Place) -> list[storage.Place]:
    """Folders named like checkpoints, oldest first."""
    found = [path for path in storage.children(folder) if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: _key(path.name))


def replaced_by(name: str, starts: list[Attempt]) -> Attempt | None:
    """The later attempt that began from a step before this checkpoint, which was therefore not there yet; None for
    none."""
    step, attempt = _key(name)
    return next((start for start in starts if start.attempt > attempt and start.from_step < step), None)


def _key(name: str) -> tuple[int, int]:
    match = NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2])


def tensors_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: `model.<name>`, `optim.<parameter>.<entry>` and `ema.<parameter>`."""
    tensors = {MODEL + key: tensor for key, tensor in module.state_dict().items()}
    tensors |= {AVERAGE + key: tensor for key, tensor in average.weights.items()}
    for parameter_name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{OPTIMIZER}{parameter_name}.{key}"] = value
    return tensors


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups, each with the optimizer's `kind`, as JSON holds them; without their parameters, and
    without what is chosen for this machine."""
    kind = {"kind": type(optimizer).__name__}
    return [
        kind | {key: value for key, value in group.items() if key not in _NOT_SAVED} for group in optimizer.param_groups
    ]


def restore(found: Checkpoint, model: Parallel, optimizer: torch.optim.Optimizer, average: Average) -> None:
    """Put a checkpoint's weights, their average and the optimizer's state where training left them; each rank reads the
    parts it holds.

    Raises:
        UserError: The checkpoint is of another model or optimizer.
    """
    _refuse_another(found, model)
    _refuse_other_settings(found, optimizer, average)
    for prefix, here in ((MODEL, model.module.state_dict()), (AVERAGE, average.weights)):
        for key, part in found.tensors(prefix, _place_in(here)).items():
            local(here[key]).copy_(part)
    parameters = dict(model.module.named_parameters())

    def wanted(key: str, shape: list[int]) -> Place | None:
        parameter = parameters.get(key.rpartition(".")[0])
        if parameter is None:
            return None
        return place_of(parameter) if shape == list(parameter.shape) else whole(key, shape)

    entries: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    for key, part in found.tensors(OPTIMIZER, wanted).items():
        parameter_name, _, entry = key.rpartition(".")
        parameter = parameters[parameter_name]
        is_like_it = part.shape == local(parameter).shape
        entries.setdefault(parameter, {})[entry] = as_part(part, parameter) if is_like_it else part
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {parameter: place for place, parameter in enumerate(order)}
    groups = [
        group
        | {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items() if key in group}
        | {"params": [index[parameter] for parameter in group["params"]]}
        for settings, group in zip(found.state.optimizer, optimizer.param_groups, strict=True)
    ]
    state = {index[parameter]: entries[parameter] for parameter in order if parameter in entries}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _place_in(here: dict[str, torch.Tensor]) -> Wanted:
    return lambda key, shape: place_of(here[key]) if key in here else None


def _refuse_another(found: Checkpoint, model: Parallel) -> None:
    here = {key: list(shape) for key, shape in model.shapes.items()}
    there = shapes(found.manifest.files, MODEL)
    if here == there:
        return
    differ = sorted(key for key in here.keys() | there.keys() if key not in here or key not in there)
    raise UserError(
        "the checkpoint is of another model",
        where=str(found.folder),
        expected="the same parameters with the same shapes",
        found=f"differences in {', '.join(differ) or 'shapes'}",
        fix="remove the run's folder to train the changed model from the start",
    )


def _refuse_other_settings(found: Checkpoint, optimizer: torch.optim.Optimizer, average: Average) -> None:
    kinds = [
        [str(settings.get("kind")) for settings in groups] for groups in (settings_of(optimizer), found.state.optimizer)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            "the checkpoint is of another optimizer",
            where=str(found.folder),
            expected=f"the state of {kinds[0][0]}",
            found=f"that of {', '.join(dict.fromkeys(kinds[1]))}",
            fix="remove the run's folder to train with the changed optimizer from the start",
        )
    averaged = shapes(found.manifest.files, AVERAGE)
    if bool(averaged) != bool(average.weights):
        raise UserError(
            "the checkpoint does not fit train.optimizer.ema",
            where=str(found.folder),
            expected="averaged weights" if average.weights else "no averaged weights",
            found="some" if averaged else "none",
            fix="remove the run's folder to train from the start",
        )
