"""Training: `raylway train` beside a plain torch loop and a plain DDP loop with every tensor in memory.

All train the article's 1000-512-256-10 network with Adam on the same 40,000 rows of 1,000 numbers in batches of 1,024
rows, in fp32, with the same number of threads. The peers shuffle by index, read no file in the loop, check nothing and
can't be resumed. Two clocks: rows a second in the loop from after the first steps on (Raylway's is the one that it
writes into its metrics: gathering rows, forward, backward, agreement of the ranks, update), and seconds from the
command to its end, for which the data is prepared (peers: saved as tensors) beforehand.

    python benchmarks/train.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import median, python, raylway, scratch, table, write_section

ROWS, FEATURES, CLASSES = 40_000, 1_000, 10
BATCH, EPOCHS = 1_024, 5
SKIPPED_STEPS = 10
"""Not on the loop's clock: the first steps pay for allocations and caches."""
PEER = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from common import BigModel

WORLD, THREADS, BATCH, EPOCHS, SKIPPED = (int(value) for value in sys.argv[2:])


def train(rank):
    torch.set_num_threads(THREADS)
    torch.manual_seed(42)
    x = torch.from_numpy(np.load("x.npy"))
    y = torch.from_numpy(np.load("y.npy"))
    model = BigModel()
    if WORLD > 1:
        dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method="file://" + os.path.abspath("meet"))
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    step = seen = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            if step == SKIPPED:
                started, seen = time.perf_counter(), 0
            mine = batch.tensor_split(WORLD)[rank]
            optimizer.zero_grad()
            criterion(model(x[mine]), y[mine]).backward()
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
JOB = """
name: loop
storage: {storage}
data:
  source: rows.parquet
  target: target
  split: {{validation: 1%, test: 1%}}
model: {{kind: mlp, hidden: [512, 256], dropout: 0.5}}
train:
  for: {epochs} epochs
  global_batch: {batch}
  precision: fp32
  optimizer: {{kind: adam, lr: 0.001}}
  clip: null
  workers: {workers}
  resources: {{cpus: {cpus}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    cores = len(os.sched_getaffinity(0))
    with scratch() as folder:
        write_data(folder)
        lines = [compare(folder, workers, max(1, cores // workers), repeats) for workers in (1, 2)]
    heads = ["", "plain: rows/s", "raylway: rows/s", "loop ratio", "plain: whole", "raylway: whole", "whole ratio"]
    write_section(
        "train",
        f"{table(heads, lines)}\n\n{ROWS * 98 // 100:,} training rows, {EPOCHS} epochs, median of {repeats}. Loop "
        "ratio above 1: Raylway's loop is faster. Whole ratio below 1: Raylway is done sooner; its whole includes "
        "starting Ray and its workers, a validation an epoch, and checkpoints.",
    )


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


def compare(folder: Path, workers: int, threads: int, repeats: int) -> list[str]:
    """One line of the table: medians over the repeats, which take turns."""
    loops: dict[str, list[float]] = {"plain": [], "raylway": []}
    wholes: dict[str, list[float]] = {"plain": [], "raylway": []}
    for repeat in range(repeats):
        numbers = map(str, (workers, threads, BATCH, EPOCHS, SKIPPED_STEPS))
        elapsed, found = python(PEER, str(Path(__file__).parent), *numbers, folder=folder)
        wholes["plain"].append(elapsed)
        loops["plain"].append(found["rows_per_s"])
        job = folder / "job.yaml"
        storage = folder / f"runs-{workers}-{repeat}"
        job.write_text(JOB.format(storage=storage, epochs=EPOCHS, batch=BATCH, workers=workers, cpus=threads))
        raylway("prepare", str(job), folder=folder)
        elapsed, _ = raylway("train", str(job), folder=folder)
        wholes["raylway"].append(elapsed)
        loops["raylway"].append(rows_per_s(storage))
    plain, ours = median(loops["plain"]), median(loops["raylway"])
    plain_whole, our_whole = median(wholes["plain"]), median(wholes["raylway"])
    name = f"{workers} worker{'s (DDP)' if workers > 1 else ''}, {threads} thread{'s' if threads > 1 else ''}"
    return [
        name,
        f"{plain:,.0f}",
        f"{ours:,.0f}",
        f"{ours / plain:.2f}",
        f"{plain_whole:.1f} s",
        f"{our_whole:.1f} s",
        f"{our_whole / plain_whole:.1f}",
    ]


def rows_per_s(storage: Path) -> float:
    """Rows over the seconds that the full steps took, from the run's metrics; validations are not steps."""
    (run,) = storage.glob("loop/*")
    plan = json.loads((run / "run.json").read_text())["stages"]["train"]["facts"]["plan"]
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["kind"] == "step" and line["step"] % plan["steps_per_epoch"]]
    return len(steps[SKIPPED_STEPS:]) / sum(1 / step["rows_per_s"] for step in steps[SKIPPED_STEPS:])


if __name__ == "__main__":
    main()
