"""Small bundles for the tests of `bundle` and `serve_app`, trained by a plain torch loop on data made here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import torch

from raylway.bundle import artefact
from raylway.features.derive import derived, parsed
from raylway.features.fit import fit
from raylway.features.plan import FitPlan, treatments
from raylway.features.prepared import Account, Manifest
from raylway.features.profile import profile
from raylway.features.signature import Input, Signature
from raylway.features.transform import Transform
from raylway.job import schema
from raylway.models import registry
from raylway.runs.run import RunRecord

METRICS = {"accuracy": 0.9034963112312697, "log_loss": 0.25718, "roc_auc": None}
RUN = RunRecord(1, "0123456789ab", "made", "2026-01-01T00:00:00+00:00", "f" * 32, 7, [], "u", "h", None, {"torch": "2"})


@dataclass(frozen=True)
class Made:
    """What a bundle is made from."""

    signature: Signature
    transform: Transform
    spec: registry.ModelSpec
    model: torch.nn.Module

    @property
    def manifest(self) -> Manifest:
        account = Account(0, 0, 0, 0, 0, 0, 0, 0)
        return Manifest(1, "f" * 32, account, {}, self.signature, self.transform, [], [], [])

    def stage(self, folder: Path, name: str = "made") -> Path:
        run = RunRecord(**{field: getattr(RUN, field) for field in RUN.__struct_fields__} | {"job": name})
        artefact.stage(folder, self.model.state_dict(), self.spec, self.manifest, run)
        return folder


def made(
    table: pa.Table,
    target: str,
    inputs: dict[str, str],
    spec: registry.ModelSpec | None = None,
    steps: int = 300,
    derive: dict[str, str] | None = None,
    section: schema.Transform | None = None,
) -> Made:
    """Fit a transform and train a small network on a table.

    Args:
        table: Training rows, features and target.
        target: A text column for classification, a number for regression.
        inputs: Type of each raw input by name, with a `?` behind it if a row may lack it; derived features are numbers.
        spec: The network, a small mlp if left out.
        steps: Full-batch Adam steps.
        derive: Derived features by name.
        section: The job's `data.transform`.
    """
    derive = derive or {}
    optional = [name for name, kind in inputs.items() if kind.endswith("?")]
    inputs = {name: kind.rstrip("?") for name, kind in inputs.items()}
    numeric = [name for name, kind in inputs.items() if kind == "number"] + list(derive)
    categorical = [name for name, kind in inputs.items() if kind == "category"]
    raw = table[target]
    is_text = pa.types.is_string(raw.type)
    date = [name for name, kind in inputs.items() if kind == "date"]
    plan = FitPlan(
        derive=derive,
        served=list(derive),
        numeric=numeric,
        categorical=categorical,
        date=date,
        behind=[],
        columns=treatments(section or schema.Transform(), numeric, categorical, date),
        target=target,
        task="classification" if is_text else "regression",
        classes=sorted(set(raw.to_pylist())) if is_text else [],
        drops_missing=not optional,
    )
    whole = derived(table, parsed(derive))
    transform = fit([whole], plan)
    signature = Signature(
        plan.task,
        target,
        [Input(name, kind, name not in optional) for name, kind in inputs.items()],  # type: ignore[arg-type]
        plan.classes,
    )
    spec = spec or registry.ModelSpec("mlp", {"hidden": [16], "dropout": 0.1})
    torch.manual_seed(0)
    model = registry.build(spec, transform)
    _train(model, transform, whole, raw, steps)
    return Made(signature, transform, spec, model)


def _train(model: torch.nn.Module, transform: Transform, table: pa.Table, raw: Any, steps: int) -> None:
    encoded = transform.encode(table)
    numbers = torch.from_numpy(encoded.numeric)
    codes = torch.from_numpy(encoded.categorical).long()
    target = torch.tensor(transform.encode_target(raw))
    if transform.target.task == "regression":
        target = ((target - transform.target.mean) / transform.target.spread).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(numbers, codes)
        if transform.target.task == "regression":
            loss = torch.nn.functional.mse_loss(output.reshape(-1), target)
        else:
            loss = torch.nn.functional.cross_entropy(output, target.long())
        loss.backward()
        optimizer.step()
    model.eval()


def fruit() -> Made:
    """200 rows `length, width, colour`; ripe is yes exactly when length is above 10, and never between 9 and 11."""
    rng = np.random.default_rng(21)
    high = np.arange(200) % 2 == 1
    length = np.round(np.where(high, rng.uniform(11, 15, 200), rng.uniform(5, 9, 200)), 2)
    table = pa.table(
        {
            "length": length,
            "width": np.round(rng.uniform(1, 4, 200), 2),
            "colour": rng.choice(["green", "red"], 200),
            "ripe": np.where(high, "yes", "no"),
        }
    )
    return made(table, "ripe", {"length": "number", "width": "number", "colour": "category"})


def price() -> Made:
    """300 rows `size, rooms, place` where the price is a plain function of size and place; rooms may be left out."""
    rng = np.random.default_rng(5)
    size, place = rng.uniform(20, 200, 300), rng.choice(["NA", "EU"], 300)
    table = pa.table(
        {
            "size": size,
            "rooms": rng.integers(1, 6, 300),
            "place": place,
            "price": 1000 * size + np.where(place == "EU", 50_000.0, 0.0),
        }
    )
    inputs = {"size": "number", "rooms": "number?", "place": "category?"}
    return made(table, "price", inputs, steps=600)


def article() -> Made:
    """The article's network, 1000-512-256-10, with its first weights: for bits and speed, not for sense."""
    rng = np.random.default_rng(0)
    names = [f"f{index:03d}" for index in range(1000)]
    columns: dict[str, Any] = {name: rng.normal(size=50) for name in names}
    table = pa.table({**columns, "target": [str(index % 10) for index in range(50)]})
    spec = registry.ModelSpec("mlp", {"hidden": [512, 256], "dropout": 0.5})
    return made(table, "target", dict.fromkeys(names, "number"), spec, steps=0)


def trips() -> tuple[pa.Table, str, dict[str, str]]:
    """Every type of input; `delay` and `carrier` may be missing."""
    rng, count = np.random.default_rng(8), 600
    days = np.datetime64("2013-01-01") + rng.integers(0, 200, count)
    times = np.datetime64("2013-01-01T00:00:00") + rng.integers(0, 200 * 86_400, count)
    table = pa.table(
        {
            "day": rng.integers(1, 32, count),
            "fare": np.round(rng.uniform(2, 90, count), 2),
            "delay": rng.normal(5, 20, count),
            "carrier": rng.choice(["AA", "B, 6", 'U"A'], count, p=[0.7, 0.2, 0.1]),
            "hour": rng.integers(5, 24, count),
            "stop": [f"stop {index % 150:03d}" for index in range(count)],
            "weekend": rng.random(count) < 0.3,
            "booked": days.astype(str).tolist(),
            "left": [f"{text}Z" for text in times.astype(str).tolist()],
            "late": rng.choice(["no", "yes"], count),
        }
    )
    kinds = ["number", "number", "number?", "category?", "category", "category", "category", "date", "date"]
    return table, "late", dict(zip(table.column_names[:-1], kinds, strict=True))


def published(
    folder: Path, table: pa.Table, target: str, inputs: dict[str, str], name: str = "trips", **values: str
) -> Path:
    """A published bundle with all that a real run's has: profile, account, metrics; `values` by category."""
    found = made(table, target, inputs, steps=30)
    known = [name for name, kind in inputs.items() if kind.startswith("category")]
    listed = [msgspec.structs.replace(each, values=values.get(each.name, "text")) for each in found.signature.inputs]
    signature = msgspec.structs.replace(found.signature, inputs=listed)
    manifest = msgspec.structs.replace(
        found.manifest,
        signature=signature,
        account=Account(1000, 900, 60, 30, 10, 700, 90, 110),
        files=["s3://bucket/private/trips.csv?signature=secret", "/home/me/more.csv"],
        classes={"train": list(range(100, 100 + len(signature.classes)))},
        profile=profile(table, signature, known, {}),
    )
    run = msgspec.structs.replace(RUN, job=name)
    artefact.stage(folder / "staged", found.model.state_dict(), found.spec, manifest, run)
    artefact.publish(folder / "staged", folder / "bundle", METRICS)
    return folder / "bundle"
