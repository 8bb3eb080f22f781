"""The reference of every file that people write: docs/configuration.md, from the models that read the files.

python -m coe.cli.config.reference > docs/configuration.md
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_HEAD = """\
# Configuration

Every key of the files that `coe` reads. This page is generated from the code (`python -m coe.cli.config.reference`), so
it is complete; `coe init` writes files to start from, `coe config check` finds what is wrong in them.

Relative paths are read against the folder of the file that names them; `home://...` is under `$COE_HOME` (by default
`~/.cache/coe`). Sizes are whole bytes or text such as `8GiB`. A key that is left out has its default; `null` stands for
"none".
"""
_BEST = "### `best`\n\nThe expert of highest utility: `top-k` with `k: 1`.\n"
"""`best` is a name and no class (`routers.selectors.build_selector`)."""
_NAMES: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Decimal: "number",
    Path: "path",
    ByteSize: "size",
    Any: "any value",
    type(None): "null",
}
_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
Entry = tuple[str, str, str, str]
"""Key, type, default, meaning."""


def reference() -> str:
    """The whole page."""
    from coe.compose import COMPOSITIONS
    from coe.config import Config
    from coe.evaluation.graders import GRADERS
    from coe.evaluation.tasks import RowLine, TaskFile
    from registry.spec import ExpertSpec
    from routers.selectors import SELECTORS

    parts = [_HEAD, "## Service (`--config`)\n", *_sections(Config, "", {})]
    parts += ["## Compositions (`composition` of a policy)\n", *_kinds(COMPOSITIONS)]
    parts += ["## Selectors (`select` of a policy)\n", _BEST, *_kinds(SELECTORS)]
    parts += ["## Experts file (each entry of the list `experts`)\n", *_sections(ExpertSpec, "", {})]
    parts += ["## Task file\n", *_sections(TaskFile, "", {})]
    parts += ["## Rows of a task (JSONL, one object a line)\n", *_sections(RowLine, "", {})]
    parts += ["## Graders (`grader` and `grader_options` of a task)\n", *_kinds(GRADERS)]
    return "\n".join(parts)


def _sections(model: type[BaseModel], prefix: str, shown: dict[type[BaseModel], str]) -> Iterator[str]:
    """The table of a model, then a section for each model inside it; one that was shown already is referred to."""
    shown[model] = prefix
    yield f"{_summary(model)}\n"
    yield _table((name, *_field(field)) for name, field in model.model_fields.items())
    for name, field in model.model_fields.items():
        inner, suffix = _model_of(field.annotation)
        if inner is None:
            continue
        place = f"{prefix}{name}{suffix}"
        yield f"### `{place}`\n"
        if inner in shown:
            yield f"As `{shown[inner].removesuffix('.')}`.\n"
        else:
            yield from _sections(inner, f"{place}.", shown)


def _kinds(kinds: Mapping[str, Callable[..., Any]]) -> Iterator[str]:
    """A section for each named kind, with the settings of its class."""
    for name, kind in kinds.items():
        entries = list(_settings(kind))
        yield f"### `{name}`\n\n{_summary(kind)}\n"
        if entries:
            yield _table(entries)


def _settings(kind: Callable[..., Any]) -> Iterator[Entry]:
    """The arguments of a class, as its docstring describes them."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        described = describe_names(kind, kind.model_fields)
        for name, field in kind.model_fields.items():
            type_text, default, meaning = _field(field)
            yield name, type_text, default, meaning or described.get(name, "")
        return
    parameters = inspect.signature(kind).parameters
    # A dataclass may inherit fields whose types only the module of its base class imports.
    hints = typing.get_type_hints(kind if is_dataclass(kind) else kind.__init__)
    described = describe_names(kind, parameters)
    for name, parameter in parameters.items():
        default = "required" if parameter.default is parameter.empty else _default_text(parameter.default)
        yield name, _type_text(hints.get(name, Any)), default, described.get(name, "")


def describe_names(kind: Any, names: Iterable[str]) -> dict[str, str]:
    """What a docstring says of each name, in the form `name: text. name, name: text.`"""
    if not (known := "|".join(map(re.escape, names))):
        return {}
    text = "\n\n".join(inspect.getdoc(one) or "" for one in reversed(kind.__mro__) if one.__module__ != "builtins")
    pattern = re.compile(rf"(?:^|\n\s*|(?<=[.)] ))((?:{known})(?:, (?:{known}))*): ")
    found: dict[str, str] = {}
    matches = [*pattern.finditer(text)]
    starts = [match.start() for match in matches[1:]] + [len(text)]
    for match, following in zip(matches, starts, strict=False):
        stop = min(following, len(text[: match.end()]) + len(text[match.end() :].split("\n\n")[0]))
        meaning = " ".join(text[match.end() : stop].split())
        found |= dict.fromkeys(match[1].split(", "), f"{meaning[0].upper()}{meaning[1:]}")
    return found


def _summary(thing: Any) -> str:
    """The first sentence or sentences of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _table(entries: Iterable[Entry]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(_cell(cell) for cell in (f"`{name}`", *rest)) + " |" for name, *rest in entries]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _field(field: FieldInfo) -> tuple[str, str, str]:
    default = "required" if field.is_required() else _default_text(field.get_default(call_default_factory=True))
    return ", ".join([_type_text(field.annotation), *_bounds(field.metadata)]), default, field.description or ""


def _default_text(value: Any) -> str:
    from registry.storage import coe_home

    if isinstance(value, BaseModel) or (isinstance(value, tuple) and any(isinstance(one, BaseModel) for one in value)):
        return "see below"
    if isinstance(value, Path):
        return f"`home://{value.relative_to(coe_home())}`" if value.is_relative_to(coe_home()) else f"`{value}`"
    if isinstance(value, ByteSize):
        return f"`{value.human_readable(separator='')}`"
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, frozenset | set | tuple | list):
        return f"`[{', '.join(map(str, sorted(value)))}]`"
    if value == math.inf:
        return "none"
    if value is None or isinstance(value, bool):
        return f"`{ {None: 'null', True: 'true', False: 'false'}[value] }`"
    if isinstance(value, str) and len(value) > 60:
        return "built-in text"
    return f"`{value!r}`" if isinstance(value, str) else f"`{value}`"


def _type_text(annotation: Any) -> str:
    """A type in words: `list of text`, `"auto", "float32"`, `number, ≥ 0`."""
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return ", ".join([_type_text(arguments[0]), *_bounds(_constraints(arguments[1:]))])
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(one) for one in arguments if one is not type(None) and _is_written(one))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{one.value}`" for one in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return f"mapping of names to {_type_text(arguments[1])}"
    if origin is not None and arguments:
        return f"list of {_type_text(arguments[0])}"
    return getattr(annotation, "__name__", str(annotation))


def _is_written(annotation: Any) -> bool:
    """Whether a value of the type can stand in a file; objects that only Python code passes cannot."""
    return not inspect.isclass(annotation) or annotation in _NAMES or issubclass(annotation, BaseModel | Enum)


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for one in metadata:
        yield from (text.format(getattr(one, key)) for key, text in _BOUNDS.items() if hasattr(one, key))


def _constraints(metadata: Iterable[Any]) -> Iterator[Any]:
    for one in metadata:
        yield from one.metadata if isinstance(one, FieldInfo) else (one,)


def _model_of(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The model inside a field's type, and how its place goes on: `pools[]`, `policies.NAME`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    for argument in arguments:
        model, suffix = _model_of(argument)
        if model is not None:
            if origin is dict:
                return model, f".NAME{suffix}"
            return model, f"[]{suffix}" if origin in (tuple, list) else suffix
    return None, ""


if __name__ == "__main__":
    sys.stdout.write(reference())
