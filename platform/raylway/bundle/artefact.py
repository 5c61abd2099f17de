"""Making a bundle: staged with the weights so that it can be evaluated, then published with its metrics.

Both steps are atomic and may be repeated after a kill at any instant.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save

from raylway import storage
from raylway.bundle import code, contents, examples
from raylway.bundle.contents import RECORD, Bundle, BundleRecord, Provenance, load
from raylway.bundle.predictor import Predictor
from raylway.features import derive
from raylway.features.prepared import Manifest
from raylway.models.registry import ModelSpec
from raylway.runs.run import RunRecord
from raylway.storage import Address, Place, buckets

__all__ = ["Bundle", "load", "publish", "stage"]


def stage(
    folder: Place, weights: dict[str, torch.Tensor], model: ModelSpec, prepared: Manifest, run: RunRecord
) -> None:
    """Write a whole bundle that lacks only its metrics; whatever is in `folder` is replaced.

    Args:
        folder: `run.staged_bundle`.
        weights: Parameters and buffers by name.
        model: How the network is built again.
        prepared: Signature and fitted transform.
        run: Where the model comes from.

    Raises:
        UserError: The source of the model or of a derived column can't be carried, or the weights do not fit the
            network that the model builds.
        NotFinite: The model's answer to an ordinary row is not a finite number.
    """
    _remove(folder)
    with _written(folder) as made:
        # Copies: safetensors refuses tensors that share memory, as tied weights do.
        copies = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
        }
        storage.write_bytes(made / contents.WEIGHTS, save(copies))
        own = [model.kind.partition(":")[0]] if ":" in model.kind else []
        if own := [*own, *derive.modules(prepared.transform.derive)]:
            code.copy(own, made / contents.CODE)
        record = BundleRecord(
            format=contents.FORMAT,
            name=run.job,
            version="",
            model=model,
            signature=prepared.signature,
            transform=prepared.transform,
            files=[],
            provenance=Provenance(run.id, run.created_at, run.fingerprint, run.seed, run.commit, run.versions),
            metrics={},
            profile=prepared.profile,
            data=contents.Data.of(prepared),
        )
        examples.write(made, Predictor(Bundle(made, record)))
        record = msgspec.structs.replace(record, files=contents.listed(made))
        storage.write_sealed(made / RECORD, msgspec.structs.replace(record, version=contents.version(record)))


def publish(staged: Place, final: Place, metrics: dict[str, Any]) -> None:
    """Give a staged bundle its metrics and its final name; one that was published before is replaced.

    Args:
        staged: `run.staged_bundle`; may be gone when the bundle was published before the process was killed.
        final: `run.bundle`.
        metrics: The evaluation on the test rows.

    Raises:
        UserError: Neither folder holds a whole bundle.
    """
    if not (staged / RECORD).exists():
        load(final)
        return
    bundle = load(staged)
    record = msgspec.structs.replace(bundle.record, metrics=metrics)
    if isinstance(staged, Path):
        assert isinstance(final, Path)
        storage.write_sealed(staged / RECORD, record)
        shutil.rmtree(final, ignore_errors=True)
        staged.rename(final)
        storage.sync_folder(final.parent)
        return
    assert isinstance(final, Address)
    _remove(final)
    for file in record.files:  # from the cache: nothing can be renamed in a bucket
        buckets.upload(bundle.folder / file.path, final / file.path)
    storage.write_sealed(final / RECORD, record)
    _remove(staged)


@contextmanager
def _written(folder: Place) -> Iterator[Path]:
    """A folder of this machine to write a bundle into, which is then at its place; its record goes last."""
    if isinstance(folder, Path):
        with storage.staged_folder(folder) as made:
            yield made
        return
    with storage.scratch(folder.parent, folder.name) as made:
        yield made
        for file in contents.listed(made):
            storage.move(made / file.path, folder / file.path)
        storage.move(made / RECORD, folder / RECORD)


def _remove(folder: Place) -> None:
    """Without its record it is no bundle, so that goes first."""
    storage.remove(folder / RECORD)
    storage.remove(folder)
