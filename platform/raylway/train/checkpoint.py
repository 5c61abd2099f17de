"""Checkpoints: folders that count only when their manifest, written last, is there and every file matches it.

    step-00001200-a007/                      a007: the attempt that wrote it
        shard-00001-model-00001-of-00001.safetensors   one from each rank that has something to write
        state.json                           counters, optimizer settings, scaler
        manifest.json                        files with sizes, checksums and tensors; written last

Only files that the manifest names are ever read, after their checksums were compared, and none is a pickle. An attempt
never writes into the folder of another, so what a dead one left behind can't mix with what is new.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.train import messages
from raylway.train.average import Average
from raylway.train.chunks import File, Place, Wanted, as_part, chunks_in, place_of, read, shapes, whole
from raylway.train.progress import Progress
from raylway.train.strategy import Groups, Parallel, local

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL, OPTIMIZER, AVERAGE = "model.", "optim.", "ema."
_NOT_SAVED = ("params", "foreach", "fused")
_NAME = re.compile(r"step-(\d{8,})-a(\d{3,})")


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

    folder: Path
    manifest: Manifest

    @property
    def state(self) -> State:
        return storage.read_record(self.folder / STATE, State)

    def tensors(self, prefix: str, wanted: Wanted = whole) -> dict[str, torch.Tensor]:
        """Tensors whose names start with the prefix, by the rest of their names, on the CPU; see `chunks.read`."""
        return read(self.folder, self.manifest.files, prefix, wanted)


def name(step: int, attempt: int) -> str:
    return f"step-{step:08d}-a{attempt:03d}"


def opened(folder: Path) -> Checkpoint:
    """A checkpoint after every file of it was compared with the manifest.

    Raises:
        RunFailed: It is not whole; the message says what is wrong with it.
    """
    if not (folder / MANIFEST).exists():
        raise RunFailed(f"{folder}: not finished, or removed")
    try:
        manifest = storage.read_record(folder / MANIFEST, Manifest)
    except UserError as error:
        raise RunFailed(f"{folder / MANIFEST}: {error.what}: {error.found}") from None
    if manifest.format != FORMAT:
        raise RunFailed(f"{folder}: has format {manifest.format}; this version reads format {FORMAT}")
    for file in manifest.files:
        path = folder / file.name
        size = path.stat().st_size if path.exists() else None
        if size != file.bytes:
            raise RunFailed(f"{path}: expected {file.bytes} bytes, found {'no file' if size is None else size}")
        if storage.checksum(path) != file.checksum:
            raise RunFailed(f"{path}: its content does not match its checksum")
    return Checkpoint(folder, manifest)


def newest(folder: Path, broken: dict[str, str]) -> Checkpoint | None:
    """The whole checkpoint with the highest step, then attempt; None when there is none.

    Args:
        folder: The run's `checkpoints`.
        broken: Filled with the folders that were passed over because they are not whole, and why.
    """
    for found in reversed(_candidates(folder)):
        try:
            return opened(found)
        except RunFailed as error:
            broken[found.name] = str(error)
    return None


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights of one checkpoint, by parameter and buffer name, on the CPU; averaged, if it has averages.

    Raises:
        RunFailed: The checkpoint is not whole.
    """
    found = opened(folder)
    return found.tensors(MODEL) | found.tensors(AVERAGE)


def last_attempt(folder: Path) -> int:
    """The highest attempt that left a folder, whole or not; 0 for none."""
    return max((_key(path)[1] for path in _candidates(folder)), default=0)


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


class Checkpoints:
    """Writes the checkpoints of one attempt.

    Args:
        folder: The run's `checkpoints`.
        keep: How many of the newest stay; the best one always stays.
        attempt: Of this start.
        groups: All ranks.
        taken_over: Whether a later attempt has begun. Workers whose driver was killed may live on for a moment, and
            must not remove what their successors are reading.
        broken: Folders that are no whole checkpoints whatever they look like; removed after the first save.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        attempt: int,
        groups: Groups,
        taken_over: Callable[[], bool],
        broken: Iterable[str] = (),
    ) -> None:
        self._folder, self._keep, self._attempt, self._groups = folder, keep, attempt, groups
        self._taken_over = taken_over
        self._broken = frozenset(broken)
        self.written = ""
        """The newest folder that this attempt has written."""

    def save(self, tensors: dict[str, torch.Tensor], state: State) -> None:
        """Write one checkpoint, then remove what is no longer kept. Returns when this rank's part is on the disk.

        All ranks call it at the same step; it waits for the slowest, and for a missing one until the timeout. Rank 0
        writes the manifest after all parts are there, and removes old checkpoints after that.

        Args:
            tensors: From `tensors_of`.
            state: As of this step; rank 0's is written.

        Raises:
            RunFailed: The weights are not finite, or the disk refuses.
            RuntimeError: A later attempt has taken over.
        """
        if self._groups.rank == 0 and self._taken_over():
            raise RuntimeError("a later attempt has taken over this run")
        # All ranks alike refuse what one of them can see: each may hold other weights.
        for found in filter(None, messages.gathered(not_finite(tensors).encode(), self._groups.save)):
            raise RunFailed(
                f"training stopped after step {state.progress.step}: {found.decode()} is not finite, so the next loss "
                f"would be nan; no checkpoint was written. Lower train.optimizer.lr, set train.clip, or add a warm-up"
            )
        final = self._folder / name(state.progress.step, self._attempt)
        try:
            mine = self._write_tensors(final, tensors)
            parts = [
                msgspec.json.decode(part, type=list[File])
                for part in messages.gathered(msgspec.json.encode(mine), self._groups.save)
            ]
            if self._groups.rank == 0:
                storage.write_record(final / STATE, state)
                files = [file for part in parts for file in part] + [_described(final / STATE)]
                storage.write_record(final / MANIFEST, Manifest(FORMAT, state.progress.step, self._attempt, files))
                storage.sync_folder(self._folder)
                self._clean({state.progress.best_checkpoint, state.progress.anchor})
        except OSError as error:
            raise RunFailed(f"the checkpoint of step {state.progress.step} can't be written: {error}") from error
        self.written = final.name

    def opened(self, name: str) -> Checkpoint:
        """One of this run's checkpoints, after it was found to be whole."""
        return opened(self._folder / name)

    def name_of(self, step: int) -> str:
        """The folder that `save` makes for a step."""
        return name(step, self._attempt)

    def _write_tensors(self, final: Path, tensors: dict[str, torch.Tensor]) -> list[File]:
        """Write this rank's share of the tensors under a name of its own, then move it into the checkpoint's folder."""
        # Here and not above: it takes a second, and evaluation and serving read checkpoints without it.
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        staged = self._folder / f".{final.name}-r{self._groups.rank}"
        writer = HuggingFaceStorageWriter(str(staged), save_distributed=True)
        save(dict(tensors), storage_writer=writer, process_group=self._groups.save)
        final.mkdir(parents=True, exist_ok=True)
        files = []
        for path in sorted(staged.glob("*.safetensors")):
            files.append(_described(path))
            path.replace(final / path.name)
        storage.sync_folder(final)
        shutil.rmtree(staged)
        return files

    def _clean(self, needed: set[str]) -> None:
        """Remove old checkpoints and what earlier attempts left unfinished. Only after a new one is whole.

        What a later attempt writes is not touched.
        """
        whole = [path.name for path in _candidates(self._folder) if (path / MANIFEST).exists()]
        kept = {*needed, *[found for found in whole if found not in self._broken][-self._keep :]}
        for path in self._folder.iterdir():
            match = _NAME.search(path.name)
            if match and int(match[2]) <= self._attempt and path.name not in kept:
                # Without its manifest a half-removed folder is no checkpoint.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


def _candidates(folder: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first."""
    paths = folder.iterdir() if folder.exists() else iter(())
    return sorted((path for path in paths if _NAME.fullmatch(path.name)), key=_key)


def _key(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _described(path: Path) -> File:
    chunks = list(chunks_in(path)) if path.suffix == ".safetensors" else []
    return File(path.name, path.stat().st_size, storage.checksum(path), chunks)


def not_finite(tensors: dict[str, torch.Tensor]) -> str:
    """The first weight of this rank's that is no finite number, or nothing.

    A finite gradient can still overflow the weights (a learning rate of 1e30); such weights are never kept.
    """
    return next(
        (
            key.removeprefix(MODEL)
            for key, tensor in tensors.items()
            if key.startswith((MODEL, AVERAGE)) and not local(tensor).isfinite().all()
        ),
        "",
    )
