"""The graph as a file of `torch.export`, which torch loads without our code.

Such a file is an archive of JSON and raw tensors; only the inputs that a program was traced with are pickled into it
(torch 2.13, `torch/export/pt2_archive/_package.py`). They are left out here, so no byte of the file is a pickle.
Torch's loader would unpickle one all the same if somebody put it there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch

METADATA = "raylway.json"


def content(program: torch.export.ExportedProgram, about: str) -> bytes:
    """The file.

    Args:
        program: Its example inputs are forgotten.
        about: What the file says about itself.
    """
    program.example_inputs = None
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: about})
    return file.getvalue()


def answers(file: bytes, columns: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What the program in the file answers.

    Args:
        file: As `content` gives it.
        columns: By input float64 [N], int64 [N] of a date, or codes [N] of a category (`Graph.forward`).
    """
    program = torch.export.load(io.BytesIO(file))
    with torch.inference_mode():
        found = program.module()({name: torch.from_numpy(column) for name, column in columns.items()})
    return [each.numpy() for each in found]
