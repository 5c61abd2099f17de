"""What the benchmarks share: the machine in words, commands with a clock, and RESULTS.md.

Each benchmark measures Raylway and its peer by turns in one run, because seconds of different days can't be compared:
the ratio is the result.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = """# Benchmarks

Raylway beside the plain way to do the same, measured in the same run on the same machine: trust the ratios. Written by
`make bench`; each section names its machine, versions and date. What is compared is said in the header of each script.
"""
SECTIONS = ("prepare", "train", "serve")


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that goes at the end; its name is short, because Ray puts sockets below such folders."""
    with TemporaryDirectory(prefix="rb") as folder:
        yield Path(folder)


def environment() -> dict[str, str]:
    """This environment without a Ray that happens to run, so that each command starts its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def timed(command: list[str], folder: Path) -> tuple[float, str, str]:
    """Run a command to its end; its wall time in seconds, and both of its outputs.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return elapsed, done.stdout, done.stderr


def raylway(*arguments: str, folder: Path) -> tuple[float, dict[str, float]]:
    """`raylway ARGUMENTS --json`; its wall time in seconds, and the seconds of each stage that it showed."""
    elapsed, _, progress = timed([sys.executable, "-m", "raylway", *arguments, "--json"], folder)
    events = [json.loads(line) for line in progress.splitlines() if line.startswith("{")]
    return elapsed, {event["stage"]: event["elapsed_s"] for event in events if event["event"] == "done"}


def python(script: str, *arguments: str, folder: Path) -> tuple[float, dict[str, Any]]:
    """A peer's script in a process of its own; its wall time in seconds, and the JSON that it printed last."""
    path = folder / "peer.py"
    path.write_text(script)
    elapsed, output, _ = timed([sys.executable, str(path), *arguments], folder)
    return elapsed, json.loads(output.strip().rsplit("\n", 1)[-1])


def median(values: list[float]) -> float:
    return statistics.median(values)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """The machine and the versions in a line, without its name."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("ray", "torch", "pandas", "pyarrow", "scikit-learn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    hardware = f"{len(os.sched_getaffinity(0))} cores of {cpu[1] if cpu else platform.machine()}, {memory:.0f} GiB"
    return f"{hardware}; Python {platform.python_version()}, {versions}"


def write_section(name: str, text: str) -> None:
    """Put a section in place of its older self in RESULTS.md, and print it."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    section = f"## {name}\n{today}. {machine()}.\n\n{text.strip()}\n"
    old = RESULTS.read_text() if RESULTS.exists() else HEADER
    parts = {
        found[0]: f"## {found[0]}\n{found[1].strip()}\n"
        for found in re.findall(r"## (\w+)\n(.*?)(?=\n## |\Z)", old, re.S)
    }
    parts[name] = section
    RESULTS.write_text("\n".join([HEADER, *(parts[each] for each in SECTIONS if each in parts)]))
    print(section)
