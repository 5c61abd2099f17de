"""A derived column computed by a function of the user's own: `module:function(column, column)` in `data.derive`.

The function takes one Arrow table that holds exactly these columns, numbers as float64 and all else as in the data,
whether rows are prepared, predicted or served; missing cells are null. It returns one Arrow array (or a NumPy array) of
as many values: numbers, text or booleans. What is not finite counts as missing. It must compute each row by itself.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.errors import UserError

_CALL = re.compile(r"\s*([^\W\d][\w.]*):([^\W\d]\w*)\s*(?:\((.*)\))?\s*", re.DOTALL)
_FORM = 'module:function(column, column), a name that is no identifier as col("a name")'
_FORM_OF_RESULT = "one Arrow or NumPy array with a number, text or boolean for each row of its table"
_ALONE = 3
"""Rows of a table that are also computed by themselves."""
_CLOSE = 1e-9
"""Relative; the vectorised kernels of a library may round the last bit otherwise for one row."""


class Step:
    """One parsed call of a user's function; the module is imported when it is first needed.

    Args:
        text: The call.
        where: The key of the job file that holds it, for messages.

    Raises:
        UserError: The text is no such call.
    """

    def __init__(self, text: str, where: str = "data.derive") -> None:
        self.text, self.where = text, where
        found = _CALL.fullmatch(text)
        if found is None or not (found[3] or "").strip():
            raise UserError(
                f"{text!r} names no columns",
                where=where,
                expected=_FORM,
                found=text,
                fix="list the columns that the function takes",
            )
        self.module, self._name = found[1], found[2]
        self._order = self._arguments(found[3])
        self.columns: frozenset[str] = frozenset(self._order)
        """The columns that it reads."""
        self._function: Callable[[pa.Table], Any] | None = None

    @classmethod
    def is_one(cls, text: str) -> bool:
        """Whether a text of `data.derive` is a call and no expression, which knows no colon outside quotes."""
        return _CALL.fullmatch(text) is not None

    def load(self) -> Callable[[pa.Table], Any]:
        """The function; what it is stays as it is from then on.

        Raises:
            UserError: There is no such module or function, or the module fails.
        """
        if self._function is None:
            self._function = self._loaded()
        return self._function

    def evaluate(self, table: pa.Table) -> pa.Array:
        """The value for each row: float64, bool or text; of the null type if every value is missing.

        Raises:
            UserError: The function fails (with its own line), or returns something else than a value for each row.
        """
        if not table.num_rows:
            return pa.nulls(0)
        given = pa.table({name: _given(table[name]) for name in self._order})
        function = self.load()
        try:
            returned = function(given)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's own code may raise anything
            raise self._raised(error) from None
        return self._column(returned, table.num_rows)

    def check(self, table: pa.Table, values: pa.Array) -> None:
        """Compare a few rows computed by themselves with what `evaluate` gave for the table.

        Raises:
            UserError: A row's value depends on the other rows.
        """
        rows = table.num_rows
        for row in sorted({0, rows // 2, rows - 1})[:_ALONE] if rows > 1 else []:
            alone, among = self.evaluate(table.slice(row, 1))[0].as_py(), values[row].as_py()
            if not _same(alone, among):
                raise UserError(
                    f"the function of {self.text!r} does not compute each row by itself",
                    where=self.where,
                    expected="the same value for a row alone and among others",
                    found=f"{among!r} among {rows:,} rows, {alone!r} alone",
                    fix="use nothing but the row's own cells; what the training rows teach belongs to data.transform",
                )

    def _arguments(self, text: str) -> list[str]:
        try:
            call = ast.parse(f"f({text}\n)", mode="eval").body
        except SyntaxError:
            call = None
        names: list[str] = []
        for node in call.args if isinstance(call, ast.Call) and call.args and not call.keywords else [None]:
            match node:
                case (
                    ast.Name(id=name)
                    | ast.Call(func=ast.Name(id="col"), args=[ast.Constant(value=str(name))], keywords=[])
                ):
                    names.append(name)
                case _:
                    raise UserError(
                        f"{self.text!r} can't be read",
                        where=self.where,
                        expected=_FORM,
                        found=f"({text})",
                        fix="list names of columns only; put constants into the function",
                    )
        return list(dict.fromkeys(names))

    def _loaded(self) -> Callable[[pa.Table], Any]:
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                raise self._raised(error) from None
            raise UserError(
                f"there is no module {self.module!r}",
                where=self.where,
                expected="a Python module beside the job file, in the current folder, or installed",
                found=self.text,
                fix=f"write {self.module.replace('.', '/')}.py, or correct the name",
            ) from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
            raise self._raised(error) from None
        function = getattr(module, self._name, None)
        if not callable(function):
            raise UserError(
                f"the module {self.module!r} has no function {self._name!r}",
                where=self.where,
                expected=f"a function of that name in {getattr(module, '__file__', self.module)}",
                found=self.text,
                fix="write it, or correct the name",
            )
        return function

    def _raised(self, error: BaseException) -> UserError:
        """An exception of the user's code, with the user's own line."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
        place, line = self.where, ""
        if isinstance(error, SyntaxError):
            place, line = f"{error.filename}:{error.lineno}", (error.text or "").strip()
        elif frames:
            place, line = f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})", frames[-1].line or ""
        return UserError(
            f"your function raised {type(error).__name__}: {error}",
            where=place,
            expected=_FORM_OF_RESULT,
            found=line,
            fix=f"correct it; it is called for {self.text!r}, {self.where}",
        )

    def _column(self, returned: Any, rows: int) -> pa.Array:
        found = f"{type(returned).__module__}.{type(returned).__name__}"
        if isinstance(returned, np.ndarray) and returned.ndim == 1:
            try:
                returned = pa.array(returned, from_pandas=True)
            except (ValueError, pa.ArrowException) as error:
                raise self._misfit(f"an array of {returned.dtype}: {error}") from None
        if isinstance(returned, pa.ChunkedArray):
            returned = returned.combine_chunks()
        if not isinstance(returned, pa.Array):
            raise self._misfit(found)
        if len(returned) != rows:
            raise self._misfit(f"{len(returned):,} values for {rows:,} rows")
        kind = returned.type
        if pa.types.is_dictionary(kind):
            returned, kind = returned.cast(kind.value_type), kind.value_type
        if pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind):
            return returned
        if pa.types.is_large_string(kind) or str(kind) == "string_view":
            return returned.cast(pa.string())
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            raise self._misfit(f"values of the type {kind}")
        numbers = pc.cast(returned, pa.float64(), safe=False)
        return pc.if_else(pc.is_finite(numbers), numbers, pa.scalar(None, pa.float64()))

    def _misfit(self, found: str) -> UserError:
        return UserError(
            f"the function of {self.text!r} returns what is no column",
            where=self.where,
            expected=_FORM_OF_RESULT,
            found=found,
            fix="return one, such as pyarrow.array(values) or a pyarrow.compute result",
        )


def _given(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as the function sees it: a served row knows no whole numbers, so no row does."""
    kind = column.type
    return column.cast(pa.float64(), safe=False) if pa.types.is_integer(kind) or pa.types.is_floating(kind) else column


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=_CLOSE, atol=0.0))
    return one is other if one is None or other is None else one == other


def _is_users(filename: str) -> bool:
    """A file neither installed, nor of Python, nor ours."""
    paths = sysconfig.get_paths()
    ours = Path(__file__).parent.parent
    others = [paths["purelib"], paths["platlib"], paths["stdlib"], paths["platstdlib"], str(ours)]
    return Path(filename).is_file() and not any(Path(filename).is_relative_to(folder) for folder in others)
