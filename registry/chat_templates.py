"""Whether the chat template of a model renders tools, read from its files. No template runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from registry.errors import SourceError
from registry.gguf_header import read_gguf
from registry.headers import check_regular, read_json

TOOLS = "tools"
_NAMED = ("default", "tool_use")
_GGUF_KEY = "tokenizer.chat_template"
_MOST_BYTES = 2**22
_OPENING = re.compile(r"\{[#%{]")
_CLOSING = {"{#": "#}", "{%": "%}", "{{": "}}"}
_VARIABLE = re.compile(r"(?<![\w.'\"])tools(?![\w'\"])")


def renders_tools(path: Path) -> bool | None:
    """Whether a chat template of a model or adapter reads `tools`; `None` if there is no template.

    Args:
        path: a folder, or a GGUF file. A folder may have a template named `tool_use` beside the default one.

    Raises:
        SourceError: a file cannot be read.
    """
    templates = list(_of_folder(path) if path.is_dir() else _of_gguf(path))
    return any(map(_reads_tools, templates)) if templates else None


def _reads_tools(template: str) -> bool:
    return any(_VARIABLE.search(block) for block in _blocks(template))


def _blocks(template: str) -> Iterator[str]:
    """The statements and expressions of a template; comments and text are left out."""
    place = 0
    while (opening := _OPENING.search(template, place)) is not None:
        closing = _CLOSING[opening[0]]
        end = template.find(closing, opening.end())
        if end < 0:
            return
        if opening[0] != "{#":
            yield template[opening.end() : end]
        place = end + len(closing)


def _of_gguf(file: Path) -> Iterator[str]:
    fields = read_gguf(file).fields
    yield from (text for key in (_GGUF_KEY, f"{_GGUF_KEY}.tool_use") if isinstance(text := fields.get(key), str))


def _of_folder(folder: Path) -> Iterator[str]:
    others = folder / "additional_chat_templates"
    for file in (folder / "chat_template.jinja", *(others / f"{name}.jinja" for name in _NAMED)):
        try:
            if (size := check_regular(file)) > _MOST_BYTES:
                raise SourceError(f"{file} has {size:,} bytes; the most is {_MOST_BYTES:,}")
            yield file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SourceError(f"{file} cannot be read: {error}") from error
    if (config := folder / "tokenizer_config.json").exists():
        yield from _stated(read_json(config).get("chat_template"))


def _stated(value: Any) -> Iterator[str]:
    """The templates that tokenizer_config.json states: one text, or named ones in a list or mapping."""
    if isinstance(value, str):
        yield value
    entries = value if isinstance(value, list) else []
    named = {str(e.get("name")): e.get("template") for e in entries if isinstance(e, dict)}
    named |= value if isinstance(value, dict) else {}
    yield from (text for name in _NAMED if isinstance(text := named.get(name), str))
