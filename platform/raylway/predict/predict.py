"""`raylway predict`: every row of a source answered by a bundle, or set aside with the reason.

Items of the source are answered one by one into part files, in this process if the source is small, else by actors of
Ray Data that have each loaded the bundle once. Rows never pass through the driver, and no process holds more than
some ten thousand of them.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from raylway import storage
from raylway.bundle.predictor import Predictor
from raylway.data import engine, inputs
from raylway.data.csv_read import Reject
from raylway.data.items import Item
from raylway.errors import UserError
from raylway.features.prepared import LINE_BITS
from raylway.job.load import LoadedJob
from raylway.predict.alone import alone
from raylway.predict.output import Output, Parts, PartWriter, commit, refuse_taken, schema, unwritable
from raylway.runs.progress import Reporter
from raylway.storage import Place

SMALL_BYTES = 32 << 20
"""Up to here this process does it alone: Ray takes some seconds to start, and each actor two more for torch."""
_MOST_SHOWN = 20


class Rejected(msgspec.Struct, frozen=True):
    """A line of the rejects: a row without an answer."""

    row_id: int
    file: str
    line: int
    """Of Parquet and functions the row's number from 1."""
    column: str | None
    reason: str
    cell: str


class Done(msgspec.Struct, frozen=True):
    """What became of an item."""

    index: int
    answered: int
    rejected: int


@dataclass(frozen=True)
class Prediction:
    """What became of a source."""

    answered: int
    rejected: int
    first: list[Rejected]
    """The first rows without an answer."""


class Asked(msgspec.Struct, frozen=True):
    """What an answerer is told, as plain values."""

    bundle: str
    files: list[str]
    how: inputs.How
    output: Output
    scratch: str


def predict(loaded: LoadedJob, bundle: Place, source: str, output: Output, reporter: Reporter) -> Prediction:
    """Answer a source's rows in their order.

    Args:
        loaded: The run's job, for how files are read.
        bundle: The bundle's folder; on a cluster every node must see it, as well as the source and the output.
        source: File, glob, folder, or address.
        output: Where the answers go.
        reporter: Shows how far it is.

    Raises:
        UserError: The source can't be read or lacks an input; the output can't be written.
        RunFailed: Workers died of one part of the source again and again.
    """
    predictor = Predictor(bundle)
    signature = predictor.signature
    refuse_taken(output)
    opened = inputs.opened(source, signature, loaded.job)
    is_small = opened.size <= SMALL_BYTES
    with _scratch(output, bundle, is_small) as scratch, alone(output) as check:
        asked = Asked(str(bundle), opened.files, opened.how, output, str(scratch))
        with nullcontext() if is_small else _connected(loaded, reporter):
            todo = opened.items(is_cut=not is_small)
            here = map(Answerer(asked, predictor).answer, todo)
            results = here if is_small else engine.run_on_actors(partial(_answering, asked), todo, Done)
            done = _followed(results, len(todo), None if is_small else reporter)
        parts = [(_part(scratch, each.index), each.answered) for each in done]
        rejects = [_rejects(scratch, each.index) for each in done]
        first = list(_first(rejects))
        check()
        commit(output, schema(signature), Parts(scratch, parts, rejects), sys.stdout.buffer)
    return Prediction(sum(each.answered for each in done), sum(each.rejected for each in done), first)


class Answerer:
    """Answers items into part files, with one loaded bundle.

    Args:
        asked: From where to where.
        predictor: The bundle, if it is loaded already.
    """

    def __init__(self, asked: Asked, predictor: Predictor | None = None) -> None:
        self._asked, self._scratch = asked, Path(asked.scratch)
        self._predictor = predictor or Predictor(storage.place(asked.bundle))

    def answer(self, item: Item) -> Done:
        """Write the item's answers and rejects; done twice, it writes the same.

        Raises:
            UserError: A file is damaged, or the answers can't be written.
        """
        try:
            return self._answer(item)
        except OSError as error:
            raise unwritable(self._asked.output.place or str(self._scratch), error) from None

    def _answer(self, item: Item) -> Done:
        record = self._predictor.bundle.record
        columns = schema(record.signature)
        writer = PartWriter(_part(self._scratch, item.index), self._asked.output, columns)
        listed = _rejects(self._scratch, item.index)
        staged = listed.with_name(f".{listed.name}-{secrets.token_hex(6)}")
        answered = refused = 0
        with staged.open("wb") as file:
            for block in inputs.read(item, record.signature, self._asked.how):
                table, rejects = self._answers(block)
                writer.write(table.cast(columns))
                file.write(msgspec.json.Encoder().encode_lines(rejects))
                answered, refused = answered + table.num_rows, refused + len(rejects)
        writer.close()
        staged.replace(listed)
        return Done(item.index, answered, refused)

    def _answers(self, block: inputs.Block) -> tuple[pa.Table, list[Rejected]]:
        """The answers to a block's rows, and those that have none, each in the order of the file."""
        reasons = self._predictor.unanswerable(block.table)
        good = np.array([reason is None for reason in reasons], bool)
        row_ids = block.row_ids[good]
        outputs = self._predictor.outputs_of(block.table.filter(pa.array(good)))
        finite = np.isfinite(outputs if outputs.ndim == 1 else outputs.sum(axis=1))
        rejects = [*block.rejects]
        rejects += [Reject(int(block.row_ids[row]), None, why, "") for row, why in enumerate(reasons) if why]
        rejects += [Reject(int(row), None, "the model's answer is not finite", "") for row in row_ids[~finite]]
        listed = [self._rejected(reject) for reject in sorted(rejects, key=lambda reject: reject.row_id)]
        return self._table(row_ids[finite], outputs[finite]), listed

    def _table(self, row_ids: np.ndarray, outputs: np.ndarray) -> pa.Table:
        answers, classes = self._predictor.answers(outputs), self._predictor.signature.classes
        names = pa.array(self._asked.files, pa.string())
        table: dict[str, pa.Array] = {
            "row_id": pa.array(row_ids, pa.uint64()),
            "file": names.take(pa.array(row_ids >> np.uint64(LINE_BITS))),
            "line": pa.array(_lines(row_ids)),
            "prediction": pa.array(answers.values) if answers.labels is None else pa.array(answers.labels, pa.string()),
        }
        if answers.probabilities is not None:
            table |= {f"p_{name}": pa.array(answers.probabilities[:, code]) for code, name in enumerate(classes)}
        return pa.table(table)

    def _rejected(self, reject: Reject) -> Rejected:
        file, line = self._asked.files[reject.row_id >> LINE_BITS], reject.row_id & (1 << LINE_BITS) - 1
        return Rejected(reject.row_id, file, line, reject.column, reject.reason, reject.cell)


def _answering(asked: Asked) -> Callable[[Item], Done]:
    """In an actor: what answers items, with the bundle loaded."""
    return Answerer(asked).answer


def _followed(results: Iterator[Done], total: int, reporter: Reporter | None) -> list[Done]:
    """The results in the order of the items; they come in any order."""
    done: list[Done] = []
    with reporter.stage("predict") if reporter else nullcontext() as stage:
        for each in results:
            done.append(each)
            if stage is not None:
                stage.update(len(done), total, "parts", rows=sum(part.answered + part.rejected for part in done))
        if stage is not None:
            stage.finish(f"{sum(part.answered for part in done):,} rows answered")
    return sorted(done, key=lambda each: each.index)


def _connected(loaded: LoadedJob, reporter: Reporter) -> AbstractContextManager[Any]:
    from raylway.launch import start

    return start.connect(reporter, loaded.import_paths)


@contextmanager
def _scratch(output: Output, bundle: Place, is_small: bool) -> Iterator[Path]:
    """Where parts are written: beside a local output, so that a rename brings them there; on a cluster every node must
    see it, unless this process does it alone."""
    is_local = output.place and not output.is_remote
    elsewhere = Path(tempfile.gettempdir())
    if os.environ.get("RAY_ADDRESS") and not is_small and not is_local:
        if not isinstance(bundle, Path):
            raise UserError(
                "the parts of the answers have no place that all machines see",
                where=f"--output {output.place}",
                expected="with a run in a bucket, on a cluster: a folder that every machine mounts",
                found="a bucket" if output.place else "standard output",
                fix="write the answers to such a folder, or unset RAY_ADDRESS to predict on this machine alone",
            )
        elsewhere = bundle.parent
    with ExitStack() as stack:
        try:
            parent, name = (output.path.parent, output.path.name) if is_local else (elsewhere, "predict")
            folder = stack.enter_context(storage.scratch_folder(parent, name))
        except OSError as error:
            raise unwritable(output.place or str(parent), error) from None
        yield folder


def _part(scratch: Path, index: int) -> Path:
    return scratch / f"{index:06d}.part"


def _rejects(scratch: Path, index: int) -> Path:
    return scratch / f"{index:06d}.rejects"


def _lines(row_ids: np.ndarray) -> np.ndarray:
    return (row_ids & np.uint64((1 << LINE_BITS) - 1)).astype(np.int64)


def _first(rejects: list[Path]) -> Iterator[Rejected]:
    left = _MOST_SHOWN
    for path in rejects:
        with path.open("rb") as lines:
            for line, _ in zip(lines, range(left), strict=False):
                left -= 1
                yield msgspec.json.decode(line, type=Rejected)
