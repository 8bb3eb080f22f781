"""YAML documents with line numbers: all problems of a file at once, each with line and path.

    document = load_document(Path("experts.yaml"))
    config = validate(document, ServiceConfig)     # raises InvalidSpec: every problem, each with its place

All YAML of the project is read here. Values are data only: tags cannot build objects, and environment variables are not
expanded (a secret is given as the name of its variable).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import ErrorDetails

from registry.errors import InvalidSpec, Problem, SourceError, without_userinfo
from registry.headers import check_regular
from registry.spelling import did_you_mean

Loc = tuple[str | int, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)
_MOST_CHARACTERS = 2**22
_MOST_NODES = 200_000  # of a document with its aliases expanded
_MOST_LEVELS = 100
_MOST_BITS = 256  # of an integer
_MOST_BASE_60_CHARACTERS = 100  # of a number such as 190:20:30, whose conversion takes quadratic time
_MOST_PROBLEMS = 50  # that are reported of a document
_MOST_KEY_CHARACTERS = 80  # of a key in a problem


_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


class BoundedLoader(yaml.SafeLoader):
    """A `yaml.SafeLoader` for hostile documents: size, depth and integers are bounded, every error is a YAMLError."""

    _level = 0
    _nodes = 0

    def get_single_node(self) -> yaml.Node | None:
        """The root node. Raises yaml.YAMLError if the document is malformed, too deep or too large."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            _expansion(root, {})
        return root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, at most `_MOST_LEVELS` levels below the root."""
        self._level, self._nodes = self._level + 1, self._nodes + 1
        if self._level > _MOST_LEVELS:
            raise _too_deep(self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        if self._nodes > _MOST_NODES:
            text = f"more than {_MOST_NODES:,} values: split the file"
            raise yaml.composer.ComposerError(None, None, text, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; scalars that PyYAML cannot convert (`2020-99-99`) are errors with a line."""
        if node.tag in _NUMBERS and ":" in node.value and len(node.value) > _MOST_BASE_60_CHARACTERS:
            text = (
                f"a number to the base 60 of more than {_MOST_BASE_60_CHARACTERS} characters (quote it if it is text)"
            )
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            text = f"{_shortened(node.value)} is not a valid {kind} (quote it if it is text)"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            text = f"an integer of {value.bit_length()} bits; the most is {_MOST_BITS}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return value


def _expansion(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of nodes and of levels with aliases expanded; a node inside itself counts once."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = 1, 1
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
    sizes = [_expansion(child, known) for child in children]
    size, levels = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
    if levels > _MOST_LEVELS:
        raise _too_deep(node.start_mark)
    if size > _MOST_NODES:
        text = f"more than {_MOST_NODES:,} values once aliases are expanded: split the file, or use fewer aliases"
        raise yaml.composer.ComposerError(None, None, text, node.start_mark)
    known[id(node)] = size, levels
    return size, levels


def _too_deep(mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, f"nested more than {_MOST_LEVELS} levels deep", mark)


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
        raise InvalidSpec([_syntax_problem(error, path)]) from error
    return Document(path, value, root)


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
            document.problem((*loc, *detail["loc"]), message_of(detail, known)) for detail in details[:_MOST_PROBLEMS]
        ]
        found.sort(key=lambda problem: problem.line)
        if more := len(details) - len(found):
            found.append(Problem(str(document.path), f"has {more:,} more problems"))
        raise InvalidSpec(found) from None


def message_of(detail: ErrorDetails, known_fields: Sequence[str] = ()) -> str:
    """One pydantic error as a short message."""
    if detail["type"] == "missing":
        return "is required"
    if detail["type"] == "extra_forbidden":
        return "is not a known field" + did_you_mean(str(detail["loc"][-1]), known_fields)
    if detail["type"] in ("model_type", "dict_type"):
        return f"should be a mapping of fields, got {_shortened(detail['input'])}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if detail["type"] in ("value_error", "assertion_error"):
        return message
    quote = "" if detail["type"] != "string_type" or isinstance(detail["input"], list | dict) else " (quote it in YAML)"
    return f"{message[0].lower()}{message[1:]}, got {_shortened(detail['input'])}{quote}"


_REPR = reprlib.Repr()  # unlike `repr`, bounded in time and size
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 4, 30, 30
_REPR.maxstring = _REPR.maxother = 200


def _shortened(value: object) -> str:
    text = without_userinfo(_REPR.repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


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


def _syntax_problem(error: yaml.YAMLError, path: Path) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return Problem(str(path), f"is not YAML: {error}")
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
