"""From what all pieces saw to one type for each column, with a sentence for every decision that is not obvious."""

from __future__ import annotations

from dataclasses import dataclass

from raylway.data.columns import Cell, Seen
from raylway.errors import UserError
from raylway.features.prepared import LINE_BITS
from raylway.job.schema import Clean

_NUMERIC = {"int64", "float64"}
_JSON = {"JSON text", "JSON number", "JSON boolean"}


@dataclass(frozen=True)
class Places:
    """Row ids in words.

    Args:
        names: Files by file index.
        by_line: Whether the lower bits are a line (CSV) or a row's number.
    """

    names: list[str]
    by_line: bool

    def split(self, row_id: int) -> tuple[str, int]:
        """File name, and line or row number."""
        return self.names[row_id >> LINE_BITS], row_id & ((1 << LINE_BITS) - 1)

    def of(self, row_id: int) -> str:
        name, number = self.split(row_id)
        return f"{name}:{number}" if self.by_line else f"{name}, row {number}"

    def cell(self, cell: Cell) -> str:
        text = cell.text if len(cell.text) <= 60 else cell.text[:57] + "..."
        return f"{self.of(cell.row_id)}: {text!r}"


@dataclass(frozen=True)
class Types:
    """The type of each column, int64, float64, bool or string, and what was decided on the way."""

    of: dict[str, str]
    dates: list[str]
    """Columns of text whose cells must be dates."""
    sentences: list[str]


def decide(seen: dict[str, Seen], numeric: set[str], text: set[str], clean: Clean, places: Places) -> Types:
    """Decide the type of every column.

    Args:
        seen: Of the whole data, by column.
        numeric: Columns that the job declares as numbers.
        text: Columns in which a date is a text like another.
        clean: The job's rules.
        places: For sentences and messages.

    Raises:
        UserError: The files do not agree on text or number, or a column declared as numbers holds true and false.
    """
    types: dict[str, str] = {}
    sentences: list[str] = []
    dates: list[str] = []
    for name, column in seen.items():
        if column.stored == ["null"]:
            types[name] = "float64" if name in numeric else "string"
            sentences.append(f"column {name!r} is empty in every row")
            continue
        holds_truth = column.is_truth or "bool" in column.stored
        if holds_truth and name in numeric:
            raise _no_numbers(name)
        if column.sources == ["JSON boolean"]:
            types[name] = "bool"
        elif column.sources == ["JSON text"] and name not in numeric:
            types[name] = "string"
        elif _JSON.intersection(column.sources) or "text" in column.sources or name in numeric or column.beyond:
            types[name], sentence = _of_text(name, column, name in numeric, clean, places)
            sentences += sentence
        else:
            types[name] = _of_typed(name, column)
        if types[name] == "string" and column.dates and name not in text:
            strange = column.present - column.words - column.dates
            if strange <= clean.max_invalid * column.present:
                dates.append(name)
                sentences += [_invalid(name, "dates", strange, column.first_no_date, places)] * bool(strange)
                sentences += [_with_words(name, column, "dates")] * bool(column.words)
            else:
                share = f"{strange} of {column.present} cells are no dates"
                sentences.append(f"column {name!r} is text: {share}{_shown(column.first_no_date, places)}")
    return Types(types, dates, sentences)


def refuse_infinite(
    seen: dict[str, Seen], types: dict[str, str], clean: Clean, unused: set[str], places: Places
) -> None:
    """An infinite number in a column that is used stops the job, unless it counts as missing.

    Raises:
        UserError: There is one.
    """
    for name, column in seen.items():
        cell = column.first_infinite
        if cell and types[name] in _NUMERIC and clean.infinite == "error" and name not in unused:
            raise UserError(
                f"the column {name!r} holds an infinite number",
                where=places.of(cell.row_id),
                expected="finite numbers",
                found=f"{cell.text!r}; {column.infinite} infinite in all",
                fix="correct the data, or count them as missing cells with data.clean.infinite: missing",
            )


def lost(seen: dict[str, Seen], types: dict[str, str]) -> list[str]:
    """Columns that turned out to be text although some piece kept only their numbers: they must be read again."""
    return [name for name, column in seen.items() if types[name] == "string" and column.lossy]


def _of_text(name: str, column: Seen, declared: bool, clean: Clean, places: Places) -> tuple[str, list[str]]:
    kind = "float64" if column.real or (column.beyond and declared) else "int64"
    if declared:
        if column.bad:
            return kind, [_invalid(name, "numbers", column.bad, column.first_bad, places)]
        return kind, []
    if column.is_truth:
        return "bool", [_with_words(name, column, "true and false")] * bool(column.words)
    if not column.numbers:
        strange = column.present - column.words - column.truths
        text = f"column {name!r} is text: {strange:,} of {column.present:,} cells are neither true nor false"
        return "string", [text] * (column.truths > strange)
    if column.bad > clean.max_invalid * column.present:
        if column.numbers < column.bad:
            return "string", []
        share = f"{column.bad} of {column.present} cells are no numbers"
        return "string", [f"column {name!r} is text: {share}{_shown(column.first_bad, places)}"]
    if column.zeros:
        return "string", [
            f"column {name!r} is text: {column.zeros} cells begin with 0{_shown(column.first_zero, places)}; "
            "list it under features.numeric to read it as numbers"
        ]
    if column.beyond:
        if not column.real:
            return "string", [f"column {name!r} is text: {column.beyond} whole numbers do not fit 64 bits"]
        kind = "float64"
    sentences = [_invalid(name, "numbers", column.bad, column.first_bad, places)] * bool(column.bad)
    if column.words:
        sentences.append(_with_words(name, column, "numbers"))
    return kind, sentences


def _of_typed(name: str, column: Seen) -> str:
    forms = set(column.stored) - {"null"}
    if len(forms) == 1:
        return forms.pop()
    if forms == _NUMERIC:
        return "float64"
    raise UserError(
        f"the files do not agree on the column {name!r}",
        where="data.source",
        expected="one type, or whole and real numbers",
        found=" and ".join(column.sources),
        fix="write the column with one type in every file",
    )


def _no_numbers(name: str) -> UserError:
    return UserError(
        f"the column {name!r} holds true and false, no numbers",
        where="data.features.numeric",
        expected="columns of numbers",
        fix="take it out of features.numeric: true and false are a category",
    )


def _with_words(name: str, column: Seen, what: str) -> str:
    return f"column {name!r} holds {what}: {column.words:,} cells like NA or null count as missing"


def _invalid(name: str, what: str, cells: int, first: Cell | None, places: Places) -> str:
    make = "cell that is none makes its row" if cells == 1 else "cells that are none make their rows"
    return f"column {name!r} holds {what}: {cells:,} {make} invalid{_shown(first, places)}"


def _shown(cell: Cell | None, places: Places) -> str:
    return f" (first {places.cell(cell)})" if cell else ""
