"""From a job file to a checked `Job`: every mistake in one message, each with its file, line and key."""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from raylway import storage
from raylway.errors import UserError
from raylway.job.schema import Job
from raylway.storage import Place

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedJob:
    """A job with the place that each of its keys came from."""

    job: Job
    path: Place
    """The job file, as the user named it; that of a run may be in a bucket."""
    lines: dict[str, str]
    """`file:line` (or `--set`) by dotted key."""

    @property
    def folder(self) -> Path:
        """The job file's folder, absolute; the current one for a file in a bucket."""
        return self.path.absolute().parent if isinstance(self.path, Path) else Path.cwd()

    @property
    def import_paths(self) -> list[str]:
        """Where the user's own modules are looked for: beside the job file, then the current folder."""
        return list(dict.fromkeys((str(self.folder), str(Path.cwd()))))

    def location(self, key: str) -> str:
        """`file:line (key)` of a dotted key, or of its nearest parent in the file, for messages."""
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            if (place := self.lines.get(".".join(parts[:length]))) is not None:
                return f"{place} ({key})"
        return f"{self.path} ({key})"

    def to_yaml(self) -> bytes:
        """The job with every default written out; reading it gives the same job."""
        stream = io.BytesIO()
        writer = YAML(typ="rt")
        writer.dump(self.job.model_dump(mode="json", by_alias=True, exclude=_unset_arguments(self.job)), stream)
        return stream.getvalue()


def load_job(path: Place, overrides: Sequence[str] = ()) -> LoadedJob:
    """Read and check a job file, and make the modules beside it importable.

    Args:
        path: The job file, YAML 1.2.
        overrides: `dotted.key=value` texts of `--set`, applied in order; a value is read as YAML.

    Raises:
        UserError: The file is missing, is no YAML, or breaks the schema; all breaks are in one message.
    """
    tree = _read_yaml(path)
    places = _places(tree, path)
    values = _plain(tree)
    for text in overrides:
        _override(values, places, text)
    try:
        job = Job.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "\n".join(_messages(error, values, places, path)), fix="raylway schema prints what each key takes"
        ) from None
    loaded = LoadedJob(job, path, places)
    for folder in reversed(loaded.import_paths):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return loaded


@contextmanager
def located(loaded: LoadedJob) -> Iterator[None]:
    """Give an error that names a key of the job file its file and line too."""
    try:
        yield
    except UserError as error:
        section, _, key = error.where.partition(".")
        if section not in Job.model_fields or key.partition(".")[0] not in _known_keys((section,)):
            raise  # data.csv is a file
        place = loaded.location(error.where)
        raise UserError(error.what, place, error.expected, error.found, error.fix) from None


def _read_yaml(path: Place) -> CommentedMap:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [file.name for file in storage.children(path.parent) if file.name.endswith((".yaml", ".yml"))]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "name a job file, such as jobs/flights.yaml"
        raise UserError(
            "no such job file", where=str(path), expected="a YAML file", found="no file of this name", fix=hint
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "the job file can't be read",
            where=str(path),
            expected="a YAML file in UTF-8",
            found=getattr(error, "strerror", None) or str(error),
            fix="name a job file that this user may read, written in UTF-8",
        ) from None
    tree = _parsed(text, str(path))
    if not isinstance(tree, CommentedMap):
        raise UserError(
            "a job file is a mapping of keys",
            where=f"{path}:1",
            expected="name: ..., data: ...",
            found=_shown(tree),
            fix="begin with the four lines of docs/job-file.md, and name that file",
        )
    return tree


def _parsed(text: str, where: str) -> Any:
    """The YAML tree.

    Raises:
        UserError: It is none, or holds itself.
    """
    try:
        tree = YAML(typ="rt").load(text)
        _plain(tree)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = text.splitlines()[mark.line : mark.line + 1] if mark else []
        place = f"{where}:{mark.line + 1}" if mark and not where.startswith("--") else where
        raise _not_yaml(error.problem or str(error), place, "".join(line) or "nothing") from None
    except YAMLError as error:
        raise _not_yaml(str(error), where, text) from None
    except RecursionError:
        raise UserError(
            "the text is nested too deeply",
            where=where,
            expected="sections within sections, and none within itself",
            found="more than can be followed, or an anchor (&) that holds its own alias (*)",
            fix="write it without anchors",
        ) from None
    return tree


def _not_yaml(problem: str, where: str, found: str) -> UserError:
    return UserError(
        f"this is not YAML: {problem.splitlines()[0]}",
        where=where,
        expected="one YAML 1.2 document",
        found=found[:200],
        fix="correct it; text with special characters goes in quotes",
    )


def _places(tree: CommentedMap, path: Place) -> dict[str, str]:
    places: dict[str, str] = {}

    def visit(node: Any, prefix: Key) -> None:
        if isinstance(node, CommentedMap):
            for key, value in node.items():
                line = node.lc.data[key][0] if node.lc.data and key in node.lc.data else node.lc.line
                places[_dotted((*prefix, key))] = f"{path}:{line + 1}"
                visit(value, (*prefix, key))
        elif isinstance(node, CommentedSeq):
            for index, value in enumerate(node):
                places[_dotted((*prefix, index))] = f"{path}:{node.lc.item(index)[0] + 1}"
                visit(value, (*prefix, index))

    visit(tree, ())
    return places


def _plain(node: Any) -> Any:
    """Plain Python values: strict checking refuses ruamel's subclasses of them."""
    if isinstance(node, CommentedMap):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        return [_plain(value) for value in node]
    kind = next((kind for kind in (bool, int, float, str) if isinstance(node, kind)), None)
    return node if kind is None else kind(node)


def _override(values: dict[str, Any], places: dict[str, str], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(
            "--set takes key=value",
            where="--set",
            expected="such as --set train.optimizer.lr=0.01",
            found=text,
            fix="write the key with its sections, an equals sign and the value",
        )
    node = values
    for depth, part in enumerate(parts[:-1], start=1):
        places.setdefault(".".join(parts[:depth]), f"--set {key.strip()}")
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            child = node[part] = {}
        node = child
    # a shell takes the quotes of `decimal=","` away, and a comma alone is no YAML
    node[parts[-1]] = "," if value == "," else _plain(_parsed(value, f"--set {text}"))
    places[".".join(parts)] = f"--set {key.strip()}"


def _messages(error: ValidationError, values: dict[str, Any], places: dict[str, str], path: Place) -> list[str]:
    """One line for each key that is wrong; the branches of a union are one line."""
    by_key: dict[Key, list[dict[str, Any]]] = {}
    for problem in error.errors(include_url=False):
        by_key.setdefault(_real_key(problem, values), []).append(dict(problem))
    lines = []
    for key, problems in by_key.items():
        if isinstance(problems[0]["input"], dict) and any(other[: len(key)] == key != other for other in by_key):
            continue  # of the union's branches the section was meant: what is wrong inside it is said
        dotted = _dotted(key)
        place = next((places[_dotted(key[:n])] for n in range(len(key), 0, -1) if _dotted(key[:n]) in places), path)
        lines.append(f"{place}: {_sentence(dotted, key, problems)}")
    return lines


def _real_key(problem: dict[str, Any] | Any, values: Any) -> Key:
    """The part of pydantic's location that names keys; it appends the names of union branches and validators."""
    key: Key = ()
    node = values
    for part in problem["loc"]:
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if inside:
            key, node = (*key, part), node[part]
    return (*key, problem["loc"][-1]) if problem["type"] == "missing" else key


def _sentence(dotted: str, key: Key, problems: list[dict[str, Any]]) -> str:
    first = problems[0]
    if first["type"] == "extra_forbidden":
        known = _known_keys(key[:-1])
        near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {dotted!r}; {hint}"
    if first["type"] == "missing":
        return f"the key {dotted!r} is missing; it has no default"
    rules = [problem for problem in problems if problem["type"] == "value_error" and isinstance(problem["input"], dict)]
    if rules:  # the section was meant: what it takes is said, and not what else could stand there
        return f"{dotted or 'job'}: {_expectation(rules[0])}"
    branches = list(dict.fromkeys(_expectation(problem) for problem in problems))
    expected = " or ".join([branches[0], *(branch.removeprefix("expected ") for branch in branches[1:])])
    return f"{dotted or 'job'}: {expected}; found {_shown(first['input'])}"


def _expectation(problem: dict[str, Any]) -> str:
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    text = text.replace("Input should be", "expected").replace("a valid dictionary or instance of", "a section like")
    text = text.replace("String should match pattern", "expected text that matches")
    text = text.replace("String should have", "expected text of")
    text = text.replace("a valid dictionary", "a section")
    text = text.replace("Input should have", "expected").replace("a valid string", "text")
    text = text.replace("a valid integer", "a whole number").replace("a valid number", "a number")
    return text.replace("a valid list", "a list").replace("a valid boolean", "true or false")


def _known_keys(prefix: Key) -> list[str]:
    section: Any = Job
    for part in prefix:
        fields = {field.alias or name: field.annotation for name, field in section.model_fields.items()}
        found = fields.get(str(part))
        sections = [
            each for each in (found, *get_args(found)) if isinstance(each, type) and issubclass(each, BaseModel)
        ]
        if not sections:
            return []
        section = sections[0]
    return [field.alias or name for name, field in section.model_fields.items()]


def _unset_arguments(job: Job) -> dict[str, set[str]]:
    """Keys that the other kind of model refuses must not be written out with their defaults."""
    return {"model": {"args"}} if job.model.kind == "mlp" else {"model": {"hidden", "dropout"}}


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _shown(value: Any) -> str:
    kinds = {bool: "boolean", int: "whole number", float: "number", str: "text", dict: "section", list: "list"}
    if value is None:
        return "nothing"
    text = repr(value)
    return f"the {kinds.get(type(value), type(value).__name__)} {text if len(text) <= 80 else text[:77] + '...'}"
