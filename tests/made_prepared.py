"""Small prepared folders with hand-picked splits, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from raylway import storage
from raylway.features.fit import fit
from raylway.features.plan import FitPlan, treatments
from raylway.features.prepared import (
    MANIFEST,
    PROFILE,
    QUARANTINE,
    SPLITS,
    Account,
    Manifest,
    Prepared,
    Shard,
    shard_schema,
)
from raylway.features.schema import canonical_text, sorted_names
from raylway.features.signature import Input, Signature
from raylway.job.load import load_job
from raylway.job.schema import Transform as Section
from raylway.runs.run import Run

ROWS_A_SHARD = 100


def make(folder: Path, splits: dict[str, pa.Table], target: str, **account: int) -> Prepared:
    """Write a prepared folder from typed tables; text columns are categories, and so is the target if it is text.

    Args:
        folder: Made if it is not there.
        splits: A table for each of `train`, `validation`, `test`, all with the same columns.
        target: The column to predict.
        account: `missing`, `duplicates` or `quarantined` rows to claim.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = splits["train"]
    names = [name for name in train.column_names if name != target]
    numeric = [name for name in names if not pa.types.is_string(train[name].type)]
    categorical = [name for name in names if name not in numeric]
    classes = _classes(splits, target)
    plan = FitPlan(
        derive={},
        served=[],
        numeric=numeric,
        categorical=categorical,
        date=[],
        behind=[],
        columns=treatments(Section(), numeric, categorical, []),
        target=target,
        task="classification" if classes else "regression",
        classes=classes,
        drops_missing=True,
    )
    fitted = fit([train], plan)
    shards, row = [], 2
    counts = {}
    for split in SPLITS:
        encoded, values = fitted.encode(splits[split]), fitted.encode_target(splits[split][target])
        counts[split] = np.bincount(values, minlength=len(classes)).tolist() if classes else []
        row_ids = np.arange(row, row + len(values), dtype=np.uint64)
        row += len(values)
        schema = shard_schema(len(numeric), len(categorical), pa.int32() if classes else pa.float64())
        for start in range(0, len(values), ROWS_A_SHARD):
            part = slice(start, start + ROWS_A_SHARD)
            columns = [encoded.numeric[part].tolist(), encoded.categorical[part].tolist(), values[part], row_ids[part]]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            path = folder / f"{split}-{start // ROWS_A_SHARD:05d}.arrow"
            with pa.ipc.new_file(str(path), schema) as file:
                file.write_table(pa.table(arrays, schema=schema))
            shards.append(Shard(split, path.name, len(arrays[0]), path.stat().st_size, storage.checksum(path)))
    kept = sum(table.num_rows for table in splits.values())
    others = {"missing": 0, "duplicates": 0, "quarantined": 0} | account
    inputs = [Input(name, "number" if name in numeric else "category", True) for name in names]
    manifest = Manifest(
        format=1,
        fingerprint="0" * 32,
        account=Account(
            read=kept + sum(others.values()),
            kept=kept,
            **others,
            **{split: splits[split].num_rows for split in SPLITS},
        ),
        classes=counts,
        signature=Signature(fitted.target.task, target, inputs, classes),
        transform=fitted,
        files=["rows.csv"],
        shards=shards,
        decisions=[],
    )
    (folder / QUARANTINE).parent.mkdir()
    (folder / QUARANTINE).touch()
    storage.write_record(folder / PROFILE, {"columns": []})
    storage.write_record(folder / MANIFEST, manifest)
    return Prepared(folder)


def make_run(folder: Path, prepared: Prepared, **keys: str) -> Run:
    """A run that has only begun: of a job in `folder` with further top-level keys, over prepared data."""
    more = "".join(f"{key}: {value}\n" for key, value in keys.items())
    (folder / "demo.yaml").write_text(f"name: demo\n{more}data: {{source: rows.csv, target: answer}}\n")
    run = Run(folder / "runs" / "demo" / "0123456789ab")
    run.create(load_job(folder / "demo.yaml"), prepared.manifest.fingerprint)
    return run


def _classes(splits: dict[str, pa.Table], name: str) -> list[str]:
    column = pa.concat_tables([table.select([name]) for table in splits.values()])[name]
    return sorted_names(set(canonical_text(column).to_pylist())) if pa.types.is_string(column.type) else []
