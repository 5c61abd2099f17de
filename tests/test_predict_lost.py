"""Batch prediction that is cut short, loses an actor, or is not alone: never a half output taken for whole."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from commands import environment, raylway
from made import made
from made_prepared import make, make_run
from stores import Bucket

from raylway.data import csv_read
from raylway.errors import RunFailed, UserError
from raylway.models.registry import ModelSpec
from raylway.predict import predict as predicting
from raylway.predict.alone import alone
from raylway.predict.output import output_of
from raylway.runs import hold
from raylway.runs.run import Run
from tests.test_predict import predict, rows, trained, typed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("predict"))


@pytest.mark.parametrize("place", ["answers.csv", "answers/"])
def test_of_two_predictions_into_one_place_the_later_one_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Each has answers, and one row without; the later one begins when the first has answered all."""
    for name, count in (("first", 20), ("second", 30)):
        rows(count, 9).to_csv(tmp_path / f"{name}.csv", index=False)
        with (tmp_path / f"{name}.csv").open("a") as file:
            file.write("1\n")
    predict(run, tmp_path / "first.csv", f"{tmp_path}/alone/{place}")
    real, refused = predicting.commit, list[str]()

    def slow(*given: Any) -> None:
        with pytest.raises(UserError, match="another prediction writes there") as caught:
            predict(run, tmp_path / "second.csv", f"{tmp_path}/both/{place}")
        refused.append(str(caught.value))
        real(*given)

    monkeypatch.setattr(predicting, "commit", slow)
    predict(run, tmp_path / "first.csv", f"{tmp_path}/both/{place}")
    monkeypatch.setattr(predicting, "commit", real)
    with pytest.raises(UserError, match="is there already"):
        predict(run, tmp_path / "second.csv", f"{tmp_path}/both/{place}")
    assert len(refused) == 1
    expected, found = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "alone", tmp_path / "both")
    )
    assert found == expected and len(found) > 1


@pytest.mark.parametrize(("place", "whole"), [("answers.csv", [""]), ("answers/", ["_SUCCESS", "part-00000.parquet"])])
def test_of_two_predictions_into_one_place_of_a_bucket_the_later_one_is_refused(
    run: Run, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, place: str, whole: list[str]
) -> None:
    monkeypatch.setattr(hold, "RENEW_EVERY_S", 0.3)
    for name, count in (("first", 20), ("second", 30)):
        rows(count, 9).to_csv(tmp_path / f"{name}.csv", index=False)
    address, real, refused = bucket.address(f"both-{place}"), predicting.commit, list[str]()

    def slow(*given: Any) -> None:
        with pytest.raises(UserError, match="another prediction writes there") as caught:
            predict(run, tmp_path / "second.csv", address)
        refused.append(str(caught.value))
        real(*given)

    monkeypatch.setattr(predicting, "commit", slow)
    assert predict(run, tmp_path / "first.csv", address).answered == 20
    assert len(refused) == 1 and f"process {os.getpid()} on " in refused[0]
    with pytest.raises(UserError, match="is there already"):
        predict(run, tmp_path / "second.csv", address)
    left = bucket.files.get_file_info(pafs.FileSelector("rows", recursive=True))
    names = sorted(each.path for each in left if each.is_file and each.path.startswith(f"rows/both-{place}"))
    assert names == [f"rows/both-{place}{name}" for name in whole]


def test_of_two_that_both_believe_that_a_bucket_is_theirs_one_gives_way(
    run: Run, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one writes its lease just after this one has looked."""
    rows(20, 9).to_csv(tmp_path / "new.csv", index=False)
    address = bucket.address("believed/")

    class Late(predicting.Answerer):
        def answer(self, item: Any) -> predicting.Done:
            bucket.write("believed.lease.json", json.dumps(msgspec.to_builtins(other)).encode())
            return super().answer(item)

    other = hold.Lease("another", "host", 1, 0)
    monkeypatch.setattr(predicting, "Answerer", Late)
    with pytest.raises(UserError, match="another prediction writes there"):
        predict(run, tmp_path / "new.csv", address)
    left = bucket.files.get_file_info(pafs.FileSelector("rows", recursive=True))
    assert not [each.path for each in left if each.path.startswith("rows/believed/")]
    bucket.files.delete_file("rows/believed.lease.json")


def test_many_predictions_into_one_place_end_with_the_answers_of_one(run: Run, tmp_path: Path) -> None:
    """At once, and one after the other has let go of the lock: never two that hold it."""
    output, holders, most = output_of(str(tmp_path / "answers.csv"), None), 0, []
    barrier = threading.Barrier(8)

    def act() -> None:
        nonlocal holders
        barrier.wait()
        for _ in range(400):
            with suppress(UserError), alone(output):
                holders += 1
                time.sleep(0)
                most.append(holders)
                holders -= 1

    threads = [threading.Thread(target=act) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) > 100 and not list(tmp_path.iterdir())


CUT_SHORT = """
import os, pyarrow, shutil, signal, sys
from raylway import cli
real = shutil.copyfileobj
def cut(source, target, length):
    if not isinstance(target, pyarrow.NativeFile):
        return real(source, target, length)
    target.write(source.read(200))
    print("cut short", file=sys.stderr, flush=True)
    {fault}
shutil.copyfileobj = cut
cli.main()
"""


@pytest.mark.parametrize(
    ("fault", "place"),
    [("raise KeyboardInterrupt", "cut.csv"), ("os.kill(os.getpid(), signal.SIGKILL)", "cut/")],
)
def test_an_upload_that_is_cut_short_leaves_nothing_that_looks_whole(
    run: Run,
    tmp_path: Path,
    bucket: Bucket,
    fault: str,
    place: str,
) -> None:
    rows(100, 10).to_csv(tmp_path / "new.csv", index=False)
    bucket.write("there.csv", b"")
    command = [sys.executable, "-c", CUT_SHORT.format(fault=fault), "predict", run.folder, "new.csv"]
    cut = subprocess.run(
        [*command, "-o", bucket.address(place), "--storage", "none"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert cut.returncode in (130, -signal.SIGKILL) and "cut short" in cut.stderr
    left = bucket.files.get_file_info(pafs.FileSelector("rows", recursive=True))
    assert "rows/there.csv" in [each.path for each in left]
    assert not [each.path for each in left if each.is_file and each.path.startswith(f"rows/{place}")]
    assert predict(run, tmp_path / "new.csv", bucket.address(place)).answered == 100
    assert bucket.files.get_file_info(f"rows/{place}{'_SUCCESS' * place.endswith('/')}").is_file


KILLED = """
from raylway import cli
from raylway.data import csv_read
from raylway.predict import predict
predict.SMALL_BYTES, csv_read.RANGE_BYTES = {small}, 1 << 20
cli.main()
"""


@pytest.mark.parametrize("small", [1 << 40, 0], ids=["here", "ray"])
def test_killed_it_leaves_nothing_under_the_final_name(run: Run, tmp_path: Path, small: int) -> None:
    rows(150_000, 6).to_csv(tmp_path / "new.csv", index=False, float_format="%.6f")
    command = [sys.executable, "-c", KILLED.format(small=small), "predict", run.folder, "new.csv", "-o", "answers.csv"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob(".staging-*/*.part*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("answers")]
    (tmp_path / "new.csv").write_text("length,colour\n1,red\n")
    assert raylway("predict", run.folder, "new.csv", "-o", "answers.csv", folder=tmp_path).returncode == 0
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 2


OWN = """
import os, signal
from pathlib import Path
import torch

class Own(torch.nn.Linear):
    def forward(self, numeric, categorical):
        armed, killed = Path(self.folder) / "armed", Path(self.folder) / "killed"
        if armed.exists() and os.getpid() != self.driver and not (armed.read_text() == "once" and killed.exists()):
            self.passes += 1
            if self.passes > 40 or armed.read_text() == "always":
                with killed.open("a") as pids:
                    pids.write(f"{os.getpid()}\\n")
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(numeric)

def build(num_numeric, category_counts, num_outputs, *, folder, driver):
    own = Own(num_numeric, num_outputs)
    own.folder, own.driver, own.passes = folder, driver, 0
    with Path(folder, "loads").open("a") as loads:
        loads.write(f"{os.getpid()}\\n")
    return own
"""


def mortal(folder: Path, patch: pytest.MonkeyPatch) -> Run:
    """A run whose model dies in the actors of Ray: once where `armed` says so, or always."""
    (folder / "job").mkdir()
    (folder / "job" / "own_model_that_dies.py").write_text(OWN)
    patch.syspath_prepend(str(folder / "job"))
    table = typed(rows(40)).select(["length"])
    table = table.append_column("ripe", pa.array(np.where(table["length"].to_numpy() > 10, "yes", "no")))
    own = make_run(folder, make(folder / "prepared", dict.fromkeys(("train", "validation", "test"), table), "ripe"))
    spec = ModelSpec("own_model_that_dies:build", {"folder": str(folder), "driver": os.getpid()})
    made(table, "ripe", {"length": "number"}, spec, steps=5).stage(own.bundle)
    patch.setattr(csv_read, "RANGE_BYTES", 10_000)
    return own


def test_actors_load_the_bundle_once_and_one_that_is_killed_is_replaced(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mortal(tmp_path, monkeypatch)
    rows(10_000, 11).to_csv(tmp_path / "new.csv", index=False)
    predict(own, tmp_path / "new.csv", tmp_path / "here.csv")
    (tmp_path / "loads").unlink()
    (tmp_path / "armed").write_text("once")
    monkeypatch.setattr(predicting, "SMALL_BYTES", 0)
    predict(own, tmp_path / "new.csv", tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
    loads = (tmp_path / "loads").read_text().split()
    assert (tmp_path / "killed").read_text().strip() in loads and str(os.getpid()) in loads
    assert 3 <= len(loads) == len(set(loads)) < (tmp_path / "new.csv").stat().st_size // 10_000


@pytest.mark.long
def test_a_part_of_which_every_actor_dies_ends_the_prediction(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mortal(tmp_path, monkeypatch)
    rows(100, 11).to_csv(tmp_path / "new.csv", index=False)
    (tmp_path / "armed").write_text("always")
    monkeypatch.setattr(predicting, "SMALL_BYTES", 0)
    with pytest.raises(RunFailed, match="new.csv: 4 workers died one after the other"):
        predict(own, tmp_path / "new.csv", tmp_path / "never.csv")
    killed = (tmp_path / "killed").read_text().split()
    assert len(killed) == len(set(killed)) == 4 and str(os.getpid()) not in killed
    assert not (tmp_path / "never.csv").exists()


MEMORY = """
import resource, sys
from raylway import cli
from raylway.data import csv_read
from raylway.predict import predict
predict.SMALL_BYTES, csv_read.RANGE_BYTES = 1 << 60, 1 << 20
try:
    cli.main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_a_packed_file_half_of_whose_rows_are_bad(run: Run, tmp_path: Path) -> None:
    """Both have many of the pieces that it is read in."""
    frame = rows(500_000, 12).assign(colour=["red", ""] * 250_000)
    heading, _, text = frame.to_csv(index=False).partition("\n")
    peaks = []
    for times in (1, 5):
        with gzip.open(tmp_path / f"{times}.csv.gz", "wt", compresslevel=1) as file:
            file.write(heading + "\n")
            for _ in range(times):
                file.write(text)
        command = [sys.executable, "-c", MEMORY, "predict", run.folder, f"{times}.csv.gz", "-o", f"{times}.csv"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert f"{250_000 * times:,} of {500_000 * times:,} rows got no answer" in done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] * 1.2, peaks
