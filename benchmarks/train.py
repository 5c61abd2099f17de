"""Training: `raylway train` beside a plain torch loop and a plain DDP loop with every tensor in memory.

Two models on the same 40,000 rows of 1,000 numbers in batches of 1,024 rows: the article's 1000-512-256-10 network,
and one with 10 million weights; in bf16, with two microbatches a step, with the same number of threads. The peers
shuffle by index, read no file in the loop, check nothing, log nothing and can't be resumed. The clock runs from after
the first steps on: rows of the steps by their seconds, Raylway's as it writes them into its metrics (waiting for rows,
forward, backward, agreement of the ranks, update).

Beside it: what a checkpoint every 30 s costs, as rows a second of the wall time with and without; and the seconds from
asking Ray Train for workers to the first step, and from SIGKILL of a worker to the first step after it, beside an empty
function under Ray Train's own `TorchTrainer`, whose first line counts as its first step.

    python benchmarks/train.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import median, python, raylway, scratch, table, write_section

from raylway.runs import pace, starts

ROWS, FEATURES, CLASSES = 40_000, 1_000, 10
BATCH, MICROBATCHES = 1_024, 2
SKIPPED_STEPS = 10
"""Not on the loop's clock: the first steps pay for allocations and caches."""
CHECKPOINTED_S, CHECKPOINT_EVERY_S = 95, 30
KILLED_AT = 60
"""The forward pass of a worker that dies."""


class Size(NamedTuple):
    name: str
    hidden: list[int]
    epochs: int


SIZES = Size("the article's", [512, 256], 5), Size("10 M weights", [2_600, 2_600, 256], 2)
LOOP = """
import json, os, sys, time
from contextlib import nullcontext
import numpy as np, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WORLD, THREADS, BATCH, EPOCHS, SKIPPED, PARTS = (int(value) for value in sys.argv[1:7])
WIDTHS = [int(width) for width in sys.argv[7].split(",")]


def network():
    layers = []
    for width, following in zip(WIDTHS, WIDTHS[1:-1]):
        layers += [nn.Linear(width, following), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(*WIDTHS[-2:]))


def train(rank):
    torch.set_num_threads(THREADS)
    torch.manual_seed(42)
    x, y = torch.from_numpy(np.load("x.npy")), torch.from_numpy(np.load("y.npy"))
    model = network()
    if WORLD > 1:
        dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method="file://" + os.path.abspath("meet"))
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=True)
    criterion = nn.CrossEntropyLoss()
    step = seen = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            if step == SKIPPED:
                started, seen = time.perf_counter(), 0
            optimizer.zero_grad()
            parts = batch.tensor_split(WORLD)[rank].tensor_split(PARTS)
            for index, part in enumerate(parts):
                with model.no_sync() if WORLD > 1 and index < len(parts) - 1 else nullcontext():
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = criterion(model(x[part]), y[part]) / PARTS
                    loss.backward()
            optimizer.step()
            step, seen = step + 1, seen + len(batch)
    elapsed = time.perf_counter() - started
    if rank == 0:
        print(json.dumps({"rows_per_s": seen / elapsed}), flush=True)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    if WORLD == 1:
        train(0)
    else:
        torch.multiprocessing.spawn(train, nprocs=WORLD)
        os.unlink("meet") if os.path.exists("meet") else None
"""
EMPTY = """
import json, os, signal, sys, time
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

MARKS = os.path.abspath("marks")


def work():
    with open(MARKS, "a") as file:
        file.write(f"{time.time()}\\n")
    if len(open(MARKS).readlines()) == 1:
        time.sleep(2)
        with open(MARKS, "a") as file:
            file.write(f"{time.time()}\\n")
        os.kill(os.getpid(), signal.SIGKILL)


open(MARKS, "w").close()
ray.init(include_dashboard=False)
asked = time.time()
TorchTrainer(
    work,
    scaling_config=ScalingConfig(num_workers=1),
    run_config=RunConfig(storage_path=os.path.abspath("empty"), failure_config=FailureConfig(max_failures=1)),
).fit()
first, killed, second = sorted(map(float, open(MARKS).read().split()))[:3]
print(json.dumps({"start": first - asked, "restart": second - killed}))
"""
MORTAL = """
import os, signal, time
from pathlib import Path
from raylway.models.mlp import Mlp


class Mortal(Mlp):
    passes = 0

    def forward(self, numeric, categorical):
        if self.training:
            self.passes += 1
            if self.passes == {at} and not Path("{marker}").exists():
                Path("{marker}").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(numeric, categorical)


def build(num_numeric, category_counts, num_outputs):
    return Mortal(num_numeric, category_counts, num_outputs, [512, 256], 0.5)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    cores = len(os.sched_getaffinity(0))
    with scratch() as folder:
        write_data(folder)
        layouts = [(workers, max(1, cores // workers)) for workers in (1, 2)]
        loops = [compare(folder, size, *layout, repeats) for size in SIZES for layout in layouts]
        saved = [checkpoint_cost(folder, size, cores) for size in SIZES]
        began = compare_starts(folder, repeats)
    heads = ["", "plain: rows/s", "raylway: rows/s", "ratio", "waiting for rows"]
    text = (
        f"{table(heads, loops)}\n\n{ROWS * 98 // 100:,} training rows, bf16, {MICROBATCHES} microbatches a step, "
        f"median of {repeats}. Ratio above 1: Raylway's loop is faster.\n\n"
        f"{table(['', 'rows/s without', f'with one every {CHECKPOINT_EVERY_S} s', 'cost'], saved)}\n\n"
        f"Rows by the wall time of {CHECKPOINTED_S} s of steps.\n\n"
        f"{table(['seconds', 'Ray Train, empty', 'raylway', 'ratio'], began)}\n\n"
        f"1 worker; from asking Ray Train for it, and from its SIGKILL, to the first step."
    )
    write_section("train", text)


def write_data(folder: Path) -> None:
    """The same rows for both: a Parquet file, and tensors of the 98% that are left for training."""
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, FEATURES), np.float32)
    y = (x[:, :CLASSES] + random.standard_normal((ROWS, CLASSES), np.float32)).argmax(axis=1)
    columns = {f"x{index}": x[:, index] for index in range(FEATURES)}
    pq.write_table(pa.table({**columns, "target": y}), folder / "rows.parquet")
    left = ROWS * 98 // 100
    np.save(folder / "x.npy", x[:left])
    np.save(folder / "y.npy", y[:left])


def trained(folder: Path, name: str, model: dict[str, Any], **train: Any) -> Path:
    """Train with one worker of two microbatches a step, unless `train` says otherwise; the run's folder."""
    job = {
        "name": name,
        "storage": str(folder / "runs"),
        "data": {"source": "rows.parquet", "target": "target", "split": {"validation": "1%", "test": "1%"}},
        "model": model,
        "train": {
            "global_batch": BATCH,
            "microbatch": BATCH // MICROBATCHES,
            "precision": "bf16",
            "optimizer": {"kind": "adam", "lr": 0.001},
            "clip": None,
            "checkpoint": {"every": "60 min"},
        }
        | train,
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    raylway("prepare", "job.yaml", folder=folder)
    raylway("train", "job.yaml", folder=folder)
    (run,) = (folder / "runs" / name).iterdir()
    return run


def compare(folder: Path, size: Size, workers: int, threads: int, repeats: int) -> list[str]:
    """One line of the table: medians over the repeats, which take turns."""
    plain, ours, waits = [], [], []
    widths = ",".join(map(str, [FEATURES, *size.hidden, CLASSES]))
    for repeat in range(repeats):
        numbers = map(str, (workers, threads, BATCH, size.epochs, SKIPPED_STEPS, MICROBATCHES))
        plain.append(python(LOOP, *numbers, widths, folder=folder)[1]["rows_per_s"])
        run = trained(
            folder,
            f"loop-{len(size.hidden)}-{workers}-{repeat}",
            {"hidden": size.hidden, "dropout": 0.5},
            **{"for": f"{size.epochs} epochs", "workers": workers, "resources": {"cpus": threads}},
            microbatch=BATCH // workers // MICROBATCHES,
        )
        found = pace.pace(list(steps(run))[SKIPPED_STEPS:])
        assert found is not None
        ours.append(found.rows_per_s)
        waits.append(found.data_wait)
    name = f"{size.name}, {workers} worker{'s (DDP)' if workers > 1 else ''} of {threads} thread{'s' * (threads > 1)}"
    ratio = median(ours) / median(plain)
    return [name, f"{median(plain):,.0f}", f"{median(ours):,.0f}", f"{ratio:.2f}", f"{median(waits):.2%}"]


def checkpoint_cost(folder: Path, size: Size, threads: int) -> list[str]:
    """Rows by wall time without checkpoints in between, and with them; as many steps as take long enough."""
    model, worker = {"hidden": size.hidden, "dropout": 0.5}, {"workers": 1, "resources": {"cpus": threads}}
    name = f"saved-{len(size.hidden)}"
    found = pace.pace(list(steps(trained(folder, f"{name}-short", model, **worker, **{"for": "40 steps"}))))
    assert found is not None
    long = {"for": f"{round(CHECKPOINTED_S / found.step_p50_s)} steps", "validate": {"every": "9999 epochs"}}
    speed = []
    for every in ("60 min", f"{CHECKPOINT_EVERY_S} s"):
        run = trained(folder, f"{name}-{every.replace(' ', '')}", model, **worker, **long, checkpoint={"every": every})
        lines = list(steps(run))[SKIPPED_STEPS:]
        seconds = pace.seconds_of(lines[-1]["time"]) - pace.seconds_of(lines[0]["time"])
        speed.append(sum(line["rows"] for line in lines[1:]) / seconds)
    return [size.name, f"{speed[0]:,.0f}", f"{speed[1]:,.0f}", f"{1 - speed[1] / speed[0]:.1%}"]


def compare_starts(folder: Path, repeats: int) -> list[list[str]]:
    """A line for starting, and one for starting again after a worker was killed; by turns."""
    theirs: dict[str, list[float]] = {"start": [], "restart": []}
    ours: dict[str, list[float]] = {"start": [], "restart": []}
    for repeat in range(repeats):
        _, found = python(EMPTY, folder=folder)
        marker = folder / f"killed-{repeat}"
        (folder / "mortal.py").write_text(MORTAL.format(at=KILLED_AT, marker=marker))
        run = trained(
            folder, f"killed-{repeat}", {"kind": "mortal:build"}, **{"for": "1 epoch"}, checkpoint={"every": "10 steps"}
        )
        events = list(pace.lines(run / "events.jsonl"))
        first, _ = starts.starts(events)
        again = [pace.seconds_of(line["time"]) for line in events if line["event"] == starts.FIRST_STEP][-1]
        for name, their, our in (
            ("start", found["start"], first.total_s),
            ("restart", found["restart"], again - float(marker.read_text())),
        ):
            theirs[name].append(their)
            ours[name].append(our)
    names = {"start": "asking for workers to first step", "restart": "SIGKILL to first new step"}
    seconds = {key: [median(theirs[key]), median(ours[key])] for key in names}
    return [
        [name, *(f"{each:.1f} s" for each in seconds[key]), f"{seconds[key][1] / seconds[key][0]:.2f}"]
        for key, name in names.items()
    ]


def steps(run: Path) -> Iterator[pace.Line]:
    return (line for line in pace.lines(run / "metrics.jsonl") if line["kind"] == "step")


if __name__ == "__main__":
    main()
