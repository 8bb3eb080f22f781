"""YAML documents with line numbers: all problems of a file at once, each with line and path.

    document = load_document(Path("experts.yaml"))
    config = validate(document, ServiceConfig)     # raises InvalidSpec: every problem, each with its place

All YAML of the project is read here. Values are data only: tags cannot build objects, and environment variables are not
expanded (a secret is given as the name of its variable).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import ErrorDetails

from registry.errors import InvalidSpec, Problem, SourceError
from registry.headers import check_regular
from registry.spelling import did_you_mean
from registry.yaml_loader import BoundedLoader, shortened

Loc = tuple[str | int, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)
_MOST_CHARACTERS = 2**22
_MOST_PROBLEMS = 50  # that are reported of a document
_MOST_KEY_CHARACTERS = 80  # of a key in a problem


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML (or JSON) file.

    Attributes:
        path: the file, as the caller named it.
        value: plain data: dicts, lists, strings, numbers, booleans, dates, None.
    """

    path: Path
    value: Any
    _root: yaml.Node | None = field(repr=False, default=None)

    @property
    def folder(self) -> Path:
        """The folder of the file, which relative paths inside it start from."""
        return self.path.absolute().parent

    def at(self, loc: Loc) -> Any:
        """The value at a location: `("experts", 3, "base")`."""
        value = self.value
        for key in loc:
            value = value[key]
        return value

    def line(self, loc: Loc) -> int:
        """Line (from 1) of a location, or of the nearest enclosing one in the file."""
        return self._resolve(loc)[1]

    def place(self, loc: Loc) -> str:
        """`experts.yaml:12: experts[3].base`."""
        named, line = self._resolve(loc)
        return f"{self.path}:{line}" + (f": {dotted(named)}" if named else "")

    def written(self, loc: Loc) -> str | None:
        """The text of the scalar at a location, as written; None if there is none."""
        node = self._root
        for key in loc:
            child = None if node is None else _child(node, key)
            node = None if child is None else child[0]
        return node.value if isinstance(node, yaml.ScalarNode) else None

    def problem(self, loc: Loc, message: str) -> Problem:
        """A problem at a location of this document."""
        named, line = self._resolve(loc)
        return Problem(str(self.path), message, line, dotted(named))

    def _resolve(self, loc: Loc) -> tuple[Loc, int]:
        """The location without parts added by pydantic (tags of unions), and its line."""
        node, line = self._root, self._root.start_mark.line + 1 if self._root else 1
        named: list[str | int] = []
        for position, key in enumerate(loc):
            child = _child(node, key) if node is not None else None
            if child is not None:
                node, line = child
                named.append(key)
            elif position == len(loc) - 1 and isinstance(node, yaml.MappingNode):
                named.append(key)  # a missing field: at the line of its mapping
        return tuple(named), line


def load_document(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        InvalidSpec: the file cannot be read, is not YAML or too large, or repeats a key; with the line.
    """
    try:
        check_regular(path)  # opening a pipe may wait for ever
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise InvalidSpec([Problem(str(path), "there is no such file")]) from None
    except SourceError as error:
        raise InvalidSpec([Problem(str(path), str(error).removeprefix(f"{path} "))]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec([Problem(str(path), f"cannot be read: {error}")]) from error
    if len(text) > _MOST_CHARACTERS:
        raise InvalidSpec([Problem(str(path), f"has more than {_MOST_CHARACTERS:,} characters")])
    return parse_document(text, path)


def parse_document(text: str, path: Path) -> Document:
    """Like `load_document`, from text; problems name `path`."""
    try:
        loader = BoundedLoader(text)
        root = loader.get_single_node()
        repeated = islice(_key_problems(root, (), set()), _MOST_PROBLEMS)
        problems = [Problem(str(path), message, line, dotted(loc)) for loc, line, message in repeated]
        if problems:
            raise InvalidSpec(problems)
        value = None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        raise InvalidSpec([_syntax_problem(error, path, text)]) from error
    return Document(path, value, root)


def as_list(document: Document, key: str) -> Document:
    """The document as the only entry of a list under `key`, so that it is checked like a file with one entry."""
    root = document._root
    if root is not None:
        start, end = root.start_mark, root.end_mark
        name = yaml.ScalarNode("tag:yaml.org,2002:str", key, start, end)
        entries = yaml.SequenceNode("tag:yaml.org,2002:seq", [root], start, end)
        root = yaml.MappingNode("tag:yaml.org,2002:map", [(name, entries)], start, end)
    return Document(document.path, {key: [document.value]}, root)


def validate(document: Document, model: type[ModelT], loc: Loc = ()) -> ModelT:
    """Build `model` from the document (or from the part at `loc`).

    Validators find the folder of the document, for relative paths, in `info.context["folder"]`.

    Raises:
        InvalidSpec: lists all problems that pydantic finds, each with its place.
    """
    value = document.at(loc)
    if value is None and not any(field.is_required() for field in model.model_fields.values()):
        value = {}  # an empty file: every field has a default
    if value is None:
        raise InvalidSpec([document.problem(loc, f"is empty; expected {', '.join(model.model_fields)}")])
    try:
        return model.model_validate(value, context={"folder": document.folder})
    except ValidationError as error:
        known, details = _field_names(model), error.errors(include_url=False)
        found = [
            document.problem(
                place := (*loc, *detail["loc"]), message_of(detail, known, written=document.written(place))
            )
            for detail in details[:_MOST_PROBLEMS]
        ]
        found.sort(key=lambda problem: problem.line)
        if more := len(details) - len(found):
            found.append(Problem(str(document.path), f"has {more:,} more problems"))
        raise InvalidSpec(found) from None


def message_of(
    detail: ErrorDetails, known_fields: Sequence[str] = (), *, written: str | None = None, syntax: str = "YAML"
) -> str:
    """One pydantic error as a short message.

    Args:
        written: the text of the value in the file.
        syntax: of the file.
    """
    if detail["type"] == "missing":
        return "is required"
    if detail["type"] == "extra_forbidden":
        return "is not a known field" + did_you_mean(str(detail["loc"][-1]), known_fields)
    if detail["type"] in ("model_type", "dict_type"):
        return f"should be a mapping of fields, got {shortened(detail['input'])}"
    if detail["type"] in ("tuple_type", "list_type"):
        return f"should be a list, got {shortened(detail['input'])}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if detail["type"] in ("value_error", "assertion_error"):
        return message
    value, quote = detail["input"], ""
    if detail["type"] == "string_type" and not isinstance(value, list | dict):
        differs = isinstance(value, bool | int | float) and written not in (None, repr(value))
        quote = f" (read from {shortened(written)}: quote it in {syntax})" if differs else f" (quote it in {syntax})"
    return f"{message[0].lower()}{message[1:]}, got {shortened(value)}{quote}"


def dotted(loc: Loc) -> str:
    """`("experts", 3, "base")` as `experts[3].base`."""
    parts = [f"[{key}]" if isinstance(key, int) else f".{_shortened_key(key)}" for key in loc]
    return re.sub(r"^\.", "", "".join(parts))


def _shortened_key(key: str) -> str:
    return key if len(key) <= _MOST_KEY_CHARACTERS else f"{key[: _MOST_KEY_CHARACTERS - 3]}..."


def _child(node: yaml.Node, key: str | int) -> tuple[yaml.Node, int] | None:
    """The node under `key` and the line on which it starts (for a mapping: the line of the key)."""
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and 0 <= key < len(node.value):
        return node.value[key], node.value[key].start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for name, child in reversed(node.value):  # merged keys (`<<`) come first, overriding keys later
            if name.value == str(key):
                return child, name.start_mark.line + 1
    return None


def _key_problems(node: yaml.Node | None, loc: Loc, seen: set[int]) -> Iterator[tuple[Loc, int, str]]:
    """Repeated keys, of which YAML would silently use the last."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _key_problems(child, (*loc, index), seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, child in node.value:
            key, line = str(name.value), name.start_mark.line + 1
            if key in lines and isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                yield (*loc, key), line, f"is given twice; the first is on line {lines[key]}"
            lines.setdefault(key, line)
            yield from _key_problems(child, (*loc, key), seen)


def _syntax_problem(error: yaml.YAMLError, path: Path, text: str) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        what = f"unacceptable character U+{ord(text[error.position]):04X} on line {line}: control characters"
        return Problem(str(path), f"is not YAML: {what} are not allowed, except as escapes in double quotes")
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return Problem(str(path), f"is not YAML: {' '.join(str(error).split())}")
    detail = ": ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
    return Problem(str(path), f"is not YAML: {detail} (column {mark.column + 1})", mark.line + 1)


def _field_names(model: type[BaseModel]) -> list[str]:
    """Names of the fields of a model and of every model inside it, for "did you mean"."""
    try:
        schema = model.model_json_schema()
    except PydanticInvalidForJsonSchema:
        return list(model.model_fields)
    parts: list[Mapping[str, Any]] = [schema, *schema.get("$defs", {}).values()]
    return [name for part in parts for name in part.get("properties", {})]
