"""Small job files, and what they prepare in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from raylway.data import prepare
from raylway.features.prepared import Prepared
from raylway.job.load import LoadedJob, load_job
from raylway.runs.progress import Reporter


def job(folder: Path, data: dict[str, Any], **top: Any) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(json.dumps({"name": "made", "data": data, **top}))
    return load_job(path)


def prepared(folder: Path, data: dict[str, Any], **top: Any) -> Prepared:
    """Of a small source, which needs no Ray."""
    return prepare.prepare(job(folder, data, **top), folder / "runs", Reporter("lines", io.StringIO()))
