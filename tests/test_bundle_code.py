"""A model of the user's own in a bundle: its source travels with it, and answers where the job's folder is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import made as making
import numpy as np
import pyarrow as pa
import pytest

from raylway.bundle import code, contents
from raylway.bundle.predictor import Predictor
from raylway.errors import UserError
from raylway.models import registry

OWN_MODEL = """
import torch
from {layers} import Scale

def build(num_numeric, category_counts, num_outputs, *, width):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(num_numeric, width)
            self.scale = Scale()
            self.last = torch.nn.Linear(width, num_outputs)

        def forward(self, numeric, categorical):
            return self.last(self.scale(self.first(numeric).relu()))

    return Own()
"""
LAYERS = """
import torch

class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.factor
"""


@pytest.mark.parametrize("packaged", [False, True])
def test_a_model_of_the_users_own_travels_in_its_bundle(
    packaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded in a process that has never seen the job's folder."""
    job = tmp_path / "job"
    home = job / "own_pkg" if packaged else job
    home.mkdir(parents=True)
    if packaged:
        (home / "__init__.py").write_text("")
    module = "own_pkg.own_model" if packaged else "own_model"
    (home / "own_model.py").write_text(OWN_MODEL.format(layers=".own_layers" if packaged else "own_layers"))
    (home / "own_layers.py").write_text(LAYERS)
    (home / "unrelated.py" if not packaged else job / "unrelated.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(job))
    made = making.made(_table(), "ripe", {"length": "number"}, registry.ModelSpec(f"{module}:build", {"width": 8}))
    bundle = made.stage(tmp_path / "bundle")
    answers = Predictor(bundle).predict(_table()).probabilities
    assert answers is not None
    shutil.rmtree(job)
    code = bundle / contents.CODE
    carried = sorted(path.relative_to(code).as_posix() for path in code.rglob("*.py"))
    prefix = "own_pkg/" if packaged else ""
    assert carried == ([f"{prefix}__init__.py"] if packaged else []) + [
        f"{prefix}own_layers.py",
        f"{prefix}own_model.py",
    ]
    script = (
        "import sys, pathlib, pyarrow as pa\n"
        "from raylway.bundle.predictor import Predictor\n"
        "table = pa.table({'length': [float(x) for x in sys.argv[2:]]})\n"
        "sys.stdout.write(Predictor(pathlib.Path(sys.argv[1])).predict(table).probabilities.tobytes().hex())\n"
    )
    lengths = [repr(value) for value in _table()["length"].to_pylist()]
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle), *lengths], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == answers.tobytes().hex()


def _table() -> pa.Table:
    length = np.linspace(5, 15, 20)
    return pa.table({"length": length, "ripe": np.where(length > 10, "yes", "no")})


def test_two_bundles_with_modules_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps its own code, in one process."""
    bundles = []
    for sign in ("", "-"):
        job = tmp_path / f"job{sign}"
        job.mkdir()
        (job / "twin.py").write_text(
            f"import torch\n\ndef build(num_numeric, category_counts, num_outputs):\n    class Twin(torch.nn.Linear):\n"
            f"        def forward(self, numeric, categorical):\n            return {sign}super().forward(numeric)\n\n"
            f"    return Twin(num_numeric, num_outputs)\n"
        )
        monkeypatch.syspath_prepend(str(job))
        sys.modules.pop("twin", None)
        spec = registry.ModelSpec("twin:build", {})
        bundles.append(making.made(_table(), "ripe", {"length": "number"}, spec, steps=0).stage(tmp_path / f"b{sign}"))
    answers = [Predictor(bundle).predict(_table()).probabilities for bundle in (*bundles, bundles[0])]
    np.testing.assert_allclose(answers[0], 1 - answers[1], atol=1e-6)  # type: ignore[operator, arg-type]
    np.testing.assert_array_equal(answers[0], answers[2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "words"),
    [("nowhere_to_be_found", "no such module"), ("json", "installed package"), ("torch.nn", "installed package")],
)
def test_code_that_can_not_be_carried(module: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        code.copy([module], tmp_path / "code")
    assert not (tmp_path / "code").exists()


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_a_model_of_another_precision_answers_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    source = f"""
        import torch

        def build(num_numeric, category_counts, num_outputs):
            class Other(torch.nn.Linear):
                def forward(self, numeric, categorical):
                    return super().forward(numeric).to(torch.{precision})

            return Other(num_numeric, num_outputs)
        """
    (tmp_path / "other_precision.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    table = pa.table({"length": [5.0, 15.0] * 9, "ripe": ["no", "yes"] * 9})
    spec = registry.ModelSpec("other_precision:build", {})
    bundle = making.made(table, "ripe", {"length": "number"}, spec, steps=0).stage(tmp_path / "bundle", name="other")
    found = Predictor(bundle).predict(table.select(["length"]))
    assert found.probabilities is not None
    assert found.probabilities.dtype == np.float32
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-6)
