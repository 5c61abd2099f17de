"""Models as a user writes them, and as faults would have them: they record what they see, break, or kill themselves."""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER = str(Path(__file__).parent)
"""For `import_paths`."""


class Net(nn.Module):
    """A small network over numbers and one category, in float64."""

    def __init__(self, width: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 5).double()
        self.table = nn.Embedding(4, 5).double()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(5, outputs).double()

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.hidden(numeric.double()) + self.table(categorical[:, 0]))
        return self.out(self.dropout(hidden))


def net(num_numeric: int, category_counts: list[int], num_outputs: int) -> nn.Module:
    return Net(num_numeric, num_outputs)


class Frequencies(nn.Module):
    """One logit for each class, at first 0: the smallest language model there is."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(outputs, dtype=torch.float64))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(numeric), -1)


def frequencies(num_numeric: int, category_counts: list[int], num_outputs: int) -> nn.Module:
    return Frequencies(num_outputs)


class Layers(nn.Module):
    """Every kind of parameter that an optimizer treats apart, in float64."""

    def __init__(self, width: int, rows: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 4)
        self.filter = nn.Conv1d(1, 1, 3, padding=1)
        self.norm = nn.LayerNorm([1, 4])  # its weight has two dimensions
        self.table = nn.Embedding(rows, 4)
        self.out = nn.Linear(4, outputs)
        self.double()

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.filter(self.first(numeric.double())[:, None])))[:, 0]
        return self.out(hidden + self.table(categorical[:, 0]))


def layers(num_numeric: int, category_counts: list[int], num_outputs: int) -> nn.Module:
    return Layers(num_numeric, 1 + category_counts[0], num_outputs)


class Watched(Net):
    """Does something before a forward pass in training, counted from 1 in this process."""

    def __init__(self, width: int, outputs: int, dropout: float, acts: dict[str, Any]) -> None:
        super().__init__(width, outputs, dropout)
        self._acts, self._passes = acts, 0
        for index in range(2 if acts.get("act") == "full" else 0):  # for each of two ranks one to write
            self.register_buffer(f"ballast_{index}", torch.zeros(1 << 14, dtype=torch.float64))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self._passes += 1
            self._act(_rank())
            if Path(self._acts.get("slow", "")).is_file():
                time.sleep(0.1)
            if "record" in self._acts:
                with (Path(self._acts["record"]) / f"rank-{_rank()}.jsonl").open("a") as file:
                    seen = {"rows": numeric[:, 0].tolist(), "draw": torch.rand(1, dtype=torch.float64).item()}
                    file.write(json.dumps(seen) + "\n")
        return super().forward(numeric, categorical)

    def _act(self, rank: int) -> None:
        acts = self._acts
        if acts.get("act") == "sleep" and rank == acts["rank"]:
            time.sleep(acts["seconds"])
        if self._passes == acts.get("until") and rank == acts.get("rank", rank):
            _let_it_be_written()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if rank != acts.get("rank", rank) or self._passes != acts.get("at"):
            return
        if "once" in acts:
            marker = Path(acts["once"])
            if marker.exists():
                return
            marker.write_text(str(os.getpid()))
        _do(acts)


def _do(acts: dict[str, Any]) -> None:
    match acts["act"]:
        case "mark":
            pass
        case "kill":
            _let_it_be_written()
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise KeyError("a mistake of the user's")
        case "fault":
            raise OSError("a machine's fault")
        case "wait":
            _let_it_be_written()
            Path(acts["once"] + ".waits").touch()
            while not Path(acts["once"] + ".goes-on").exists():
                time.sleep(0.01)
        case "fill":
            held = []
            while len(held) * 50_000_000 < acts["most"]:
                held.append(bytearray(b"1" * 50_000_000))
                time.sleep(0.02)
            threading.Event().wait()
        case "hang":
            threading.Event().wait()
        case "hold":
            ctypes.PyDLL(None).sleep(1000)  # unlike CDLL it keeps Python's lock
        case "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))


def _let_it_be_written() -> None:
    """The checkpoint in flight."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def watched(
    num_numeric: int, category_counts: list[int], num_outputs: int, dropout: float = 0.0, **acts: Any
) -> nn.Module:
    """Args:
    act: `kill`, once the checkpoint in flight is written; `raise`, `fault`; `sleep` for `seconds` in each pass; `mark`,
        no more than the file of `once`; `wait` until there is a file as `once` with `.goes-on` behind it; `full`: from
        here on this process can write no file of more than 64 KiB, and a checkpoint is larger; `fill` the memory, but
        with `most` bytes at most; `hang`; or `hold` on to Python's lock.
    at: On which forward pass of the process.
    rank: Of which rank; all if left out.
    until: On which pass there is room again, after the checkpoint in flight has failed.
    once: A file that is made by the act, and prevents another.
    slow: As long as there is this file, each pass takes a tenth of a second.
    record: A folder for the rows that were seen, and a random number of each pass.
    """
    return Watched(num_numeric, num_outputs, dropout, acts)


class Hungry(Net):
    """Asks for more memory than there can be when it gets too many rows at once."""

    def __init__(self, width: int, outputs: int, rows: int, rank: int | None, refusal: str) -> None:
        super().__init__(width, outputs)
        self._rows, self._rank, self._refusal = rows, rank, refusal
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        if self.training and len(numeric) > self._rows and self._rank in (None, _rank()):
            if self._refusal == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            torch.empty(1 << 55, dtype=torch.uint8)
        return super().forward(numeric, categorical)


def hungry(
    num_numeric: int,
    category_counts: list[int],
    num_outputs: int,
    rows: int,
    rank: int | None = None,
    refusal: str = "cpu",
) -> nn.Module:
    """Args:
    rows: Most of them at once.
    rank: Of which rank; all if left out.
    refusal: By torch's own allocator, or `cuda`: as a GPU's memory says it.
    """
    return Hungry(num_numeric, num_outputs, rows, rank, refusal)


class Fragile(Watched):
    """As far off as can be for rows whose first number is large."""

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        output = super().forward(numeric, categorical)
        return output - 100 * (numeric[:, :1] > 4) * torch.tensor([1.0, 0.0], dtype=torch.float64)


def fragile(num_numeric: int, category_counts: list[int], num_outputs: int, **acts: Any) -> nn.Module:
    """Args: those of `watched`."""
    return Fragile(num_numeric, num_outputs, 0.0, acts)


def overflowing(
    num_numeric: int, category_counts: list[int], num_outputs: int, attempts: list[int], rank: int | None = None
) -> nn.Module:
    """The first parameter's gradient becomes infinite on these backward passes, counted from 1."""
    model = nn.Sequential(nn.Linear(num_numeric, 4), nn.ReLU(), nn.Linear(4, num_outputs))
    passes = 0

    def infinite(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return gradient * math.inf if passes in attempts and rank in (None, _rank()) else gradient

    next(model.parameters()).register_hook(infinite)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
            return self.layers(numeric)

    return Model()


def raising(num_numeric: int, category_counts: list[int], num_outputs: int) -> nn.Module:
    raise ZeroDivisionError("while it is built")


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class Branching(Net):
    """Looks at a value of a tensor in its forward pass, on one rank or on all: no graph can hold that."""

    def __init__(self, width: int, outputs: int, rank: int | None) -> None:
        super().__init__(width, outputs)
        self._rank = rank

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        if self._rank in (None, _rank()) and self.out.bias.sum().item() > 1e9:
            raise OverflowError
        return super().forward(numeric, categorical)


def branching(num_numeric: int, category_counts: list[int], num_outputs: int, rank: int | None) -> nn.Module:
    return Branching(num_numeric, num_outputs, rank)


class Late(Net):
    """As `Branching`, but not before some steps were made: until then it is one graph."""

    def __init__(self, width: int, outputs: int, steps: int, rank: int) -> None:
        super().__init__(width, outputs)
        self.looks, self._left = False, steps if rank == _rank() else math.inf
        self.out.bias.register_hook(self._count)

    def _count(self, _: torch.Tensor) -> None:
        self._left -= 1
        self.looks = self._left <= 0

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        if self.looks and self.out.bias.sum().item() > 1e9:
            raise OverflowError
        return super().forward(numeric, categorical)


def late(num_numeric: int, category_counts: list[int], num_outputs: int, steps: int, rank: int) -> nn.Module:
    return Late(num_numeric, num_outputs, steps, rank)


def without_compiler(num_numeric: int, category_counts: list[int], num_outputs: int) -> nn.Module:
    """`net`, in a process in which torch finds no C++ compiler, and no graphs of earlier ones."""
    import torch._inductor.config as settings

    settings.cpp.cxx = ("/nowhere/g++",)
    settings.force_disable_caches = True
    return net(num_numeric, category_counts, num_outputs)
