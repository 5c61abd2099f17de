"""`raylway export`: make the file, compare its answers with the predictor's, and only then write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import torch

from raylway import __version__, storage
from raylway.bundle import examples
from raylway.bundle.predictor import Predictor
from raylway.bundle.rows import RowReader, Rows, joined
from raylway.errors import RunFailed, UserError
from raylway.export import onnx_file, torch_file
from raylway.export.columns import MISSING, OTHER
from raylway.export.graph import NO_INSTANT, REFUSED, Graph
from raylway.features import dates
from raylway.features.signature import Signature
from raylway.models.registry import ModelSpec
from raylway.storage import Place

Format = Literal["onnx", "torch-export"]
ENDINGS: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
_TOLERANCE = 1e-4
"""For probabilities, and for values in spreads of the target. Other runtimes add in another order, which the article's
network changes by less than 1e-6; a wrong transform differs in the first digits."""
_UNSEEN = "no category of this name was seen in training"


class About(msgspec.Struct, frozen=True):
    """What a file says about itself."""

    name: str
    version: str
    """The bundle's: equal versions answer alike."""
    run: str
    made_by: str
    format: Format
    signature: Signature
    words: dict[str, tuple[str, ...]]
    """Of `torch-export`: by category the texts of the codes from 1; 0 is any other text, -1 a missing one."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees with the predictor."""

    place: str
    rows: int
    """That were compared."""
    largest_difference: float
    """Of a probability, or of a value in spreads of the target."""


def export(bundle: Place, format_: str, output: str | None) -> Exported:
    """Write a bundle as one file for another runtime.

    Args:
        bundle: Its folder.
        format_: `onnx` or `torch-export`.
        output: A file that is not there yet, or an address in a bucket; `NAME-VERSION` in the current folder if left
            out.

    Raises:
        UserError: The bundle can't be exported, the packages for it are not installed, or the file can't be written.
        RunFailed: The exported file answers otherwise than the bundle; nothing is written.
    """
    kind = _format(format_)
    if kind == "onnx":
        onnx_file.require_packages()
    predictor = Predictor(bundle)
    record = predictor.bundle.record
    place = _free(output or f"{record.name}-{record.version}{ENDINGS[kind]}")
    graph = Graph(record, predictor.model).eval().requires_grad_(False)
    about = About(
        name=record.name,
        version=record.version,
        run=record.provenance.run,
        made_by=f"raylway {__version__}",
        format=kind,
        signature=record.signature,
        words=graph.words if kind == "torch-export" else {},
    )
    text = msgspec.json.encode(about).decode()
    rows = _rows(predictor)
    program = _traced(graph, coded(rows, record.signature, graph), record.model)
    if kind == "onnx":
        file = onnx_file.content(program, graph, record.signature, text)
        found = onnx_file.answers(file, columns(rows, record.signature))
    else:
        file = torch_file.content(program, text)
        found = torch_file.answers(file, coded(rows, record.signature, graph))
    difference = _compare(predictor, rows, found)
    _write(place, file)
    return Exported(str(place), len(rows), difference)


def columns(rows: Rows, signature: Signature) -> dict[str, np.ndarray]:
    """Checked rows as what an ONNX file takes: float64, texts, and int64 microseconds of dates, [N] each."""
    numbers, texts = iter(rows.numbers.T), iter(rows.texts())
    found: dict[str, np.ndarray] = {}
    for each in signature.inputs:
        if each.type == "number":
            found[each.name] = np.ascontiguousarray(next(numbers))
        elif each.type == "category":
            found[each.name] = np.array([text or "" for text in next(texts).to_pylist()], object)
        else:
            instants, valid = dates.parse(next(texts))
            found[each.name] = np.where(valid, instants, NO_INSTANT)
    return found


def coded(rows: Rows, signature: Signature, graph: Graph) -> dict[str, np.ndarray]:
    """Checked rows as what `Graph.forward` takes."""
    found = columns(rows, signature)
    for name, words in graph.words.items():
        codes = {"": MISSING, **{word: code for code, word in enumerate(words, 1)}}
        found[name] = np.array([codes.get(text, OTHER) for text in found[name]], np.int64)
    return found


def _format(wanted: str) -> Format:
    for each in ENDINGS:
        if each == wanted:
            return each
    raise UserError(
        "there is no such format",
        where="--format",
        expected=" or ".join(ENDINGS),
        found=wanted,
        fix="name one of these",
    )


def _free(output: str) -> Place:
    """The place of a file that is not there yet."""
    place = storage.place(output, "--output")
    if place.exists():
        raise UserError(
            "nothing is overwritten",
            where=str(place),
            expected="no such file",
            found="a file or folder",
            fix="remove it, or name another place with --output",
        )
    return place


def _rows(predictor: Predictor) -> Rows:
    """The bundle's examples; the same without what may be left out; the same with categories that nobody has seen."""
    made = examples.read(predictor.bundle.folder).rows
    if not made:
        raise UserError(
            "there is no row to check the file with",
            where=str(predictor.bundle.folder),
            expected="made-up rows that the model answers",
            found="none: a derived feature has no value for any of them",
            fix="serve the model with raylway serve",
        )
    inputs = predictor.signature.inputs
    gaps = [{each.name: row[each.name] for each in inputs if each.required} for row in made]
    texts = {each.name: _UNSEEN for each in inputs if each.type == "category"}
    reader = RowReader(predictor.signature)
    rows = reader.read(msgspec.json.encode({"rows": [*made, *gaps, *(row | texts for row in made)]})).rows
    reasons = predictor.unanswerable(rows.table(predictor.signature))
    return joined([rows.part(row, row + 1) for row, reason in enumerate(reasons) if reason is None])


def _traced(graph: Graph, features: dict[str, np.ndarray], model: ModelSpec) -> torch.export.ExportedProgram:
    """The graph for any number of rows."""
    given = {name: torch.from_numpy(column) for name, column in features.items()}
    with torch.no_grad():
        graph(given)
        some = {name: column[:3] for name, column in given.items()}
        rows = torch.export.Dim(onnx_file.ROWS)
        try:
            return torch.export.export(graph, (some,), dynamic_shapes=({name: {0: rows} for name in some},))
        except Exception as error:  # noqa: BLE001 - a module of the user's may do what can't be traced
            raise UserError(
                "the model can't be exported",
                where=f"model.kind {model.kind}",
                expected="a network that torch.export traces, for any number of rows",
                found=f"{type(error).__name__}: {error}",
                fix="take numeric.shape[0] for len(numeric), and no branches on values; or serve it with raylway serve",
            ) from None


def _compare(predictor: Predictor, rows: Rows, found: list[np.ndarray]) -> float:
    """The largest difference.

    Raises:
        RunFailed: It is more than rounding can make.
    """
    right, target = predictor.outputs(rows), predictor.bundle.record.transform.target
    predictor.answers(right)
    scale = target.spread if target.task == "regression" else 1.0
    difference = float(np.abs(found[-1] - right).max() / scale)
    if target.task == "classification":
        places = {"": REFUSED, **{name: place for place, name in enumerate(target.classes)}}
        indices = np.array([each if isinstance(each, int) else places[each] for each in found[0].tolist()])
        chosen = np.where(indices == REFUSED, np.nan, np.take_along_axis(right, indices[:, None], axis=1)[:, 0])
        difference = float(np.max([difference, (right.max(axis=1) - chosen).max()]))
    if not difference <= _TOLERANCE:  # NaN is no agreement
        raise RunFailed(
            f"{predictor.bundle.folder}: the exported model's answers differ from the bundle's by {difference:.3g}; "
            "nothing is written"
        )
    return difference


def _write(place: Place, file: bytes) -> None:
    try:
        with storage.written(place) as path:
            path.write_bytes(file)
    except OSError as error:
        raise UserError(
            "the file can't be written",
            where=str(place),
            expected="a place that this user may write, on a disk with room",
            found=error.strerror or str(error),
            fix="make room there, or name another place with --output",
        ) from None
