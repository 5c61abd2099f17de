"""`python://module:function`: a table that the user's own code returns."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sysconfig
import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa

from raylway.data.location import Location
from raylway.errors import UserError

_TABLE = "a pandas DataFrame, a pyarrow Table or a dict of columns"


def call(location: Location, where: str) -> pa.Table:
    """The table that the user's function returns.

    Raises:
        UserError: The module or function is not there, fails (the user's own line is named) or returns no table.
    """
    assert location.function is not None
    module_name, _, function_name = location.function.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            names = [name for name, value in vars(module).items() if callable(value)]
            near = difflib.get_close_matches(function_name, names, n=1)
            raise UserError(
                f"{location.path} has no function {function_name!r}",
                where=where,
                expected=f"a function without arguments; it has {', '.join(names[:10]) or 'none'}",
                found=location.name,
                fix=f"did you mean {near[0]!r}?" if near else "name one of its functions, or write this one",
            )
        result = function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - what the user's code raises is shown with its own line
        place, line = _user_line(error, location)
        raise UserError(
            f"{location.name} failed: {type(error).__name__}: {error}",
            where=place,
            expected=f"a function without arguments that returns {_TABLE}",
            found=line or "an error outside your files",
            fix=f"correct the function; the job names it at {where}",
        ) from None
    return _as_table(result, location, where)


def _as_table(result: Any, location: Location, where: str) -> pa.Table:
    if isinstance(result, pa.Table):
        return result
    try:
        if isinstance(result, dict):
            return pa.table(result)
        if type(result).__module__.partition(".")[0] == "pandas" and hasattr(result, "columns"):
            return pa.Table.from_pandas(result, preserve_index=False)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(
            f"the table that {location.name} returned can't be used: {error}",
            where=where,
            expected="columns with a name of their own, of one type each and all of one length",
            found=f"a value of type {type(result).__name__}",
            fix="correct the column that the error names; to give it one type: frame['x'] = frame['x'].astype(str)",
        ) from None
    raise UserError(
        f"{location.name} returned no table",
        where=where,
        expected=_TABLE,
        found=f"a value of type {type(result).__name__}",
        fix="let the function return one of these",
    )


def _user_line(error: BaseException, location: Location) -> tuple[str, str]:
    """`file:line, in function` of the innermost frame that is neither ours nor an installed package's, and its text."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}", (error.text or "").strip()
    foreign = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], "<frozen", __file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(foreign)]
    if not frames:
        return location.name, ""
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}", frames[-1].line or ""


def find(rest: str, text: str, where: str) -> Location:
    """The module of `module:function`, found without importing it.

    Raises:
        UserError: There is none.
    """
    module, _, function = rest.partition(":")
    spec, found = None, text
    try:
        spec = importlib.util.find_spec(module) if module and function.isidentifier() else None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - looking inside a package runs its __init__
        found = f"{text} ({type(error).__name__}: {error})"
    if spec is None or not spec.has_location or spec.origin is None:
        raise UserError(
            "there is no such Python module",
            where=where,
            expected="python://module:function, the module beside the job file, in the current folder or installed",
            found=found,
            fix="write it with its function's name, such as python://my_data:rows for rows() of my_data.py",
        )
    return Location(text, str(Path(spec.origin).absolute()), function=rest)
