"""The OpenAPI document as one HTML page, without scripts or other files: it also works without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from typing import Any, Final

from coe.protocol.openapi import openapi_document

CONTENT_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
"""The page's Content-Security-Policy: nothing is loaded, nothing runs."""
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}
h2{margin-top:2.5rem;border-bottom:1px solid #ddd}code{background:#f4f4f4;padding:.1em .3em;border-radius:3px}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;
border-bottom:1px solid #eee}.method{color:#06c;font-weight:600}
"""


@cache
def docs_page() -> bytes:
    """The page, as UTF-8."""
    document = openapi_document()
    info = document["info"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{info['title']} API</title><style>{_STYLE}</style>",
        f"<h1>{info['title']} {info['version']}</h1><p>{_text(info['description'])}</p>",
        "<p>Machine-readable: <a href=openapi.json>openapi.json</a></p>",
        *_endpoints(document["paths"]),
        *_schemas(document["components"]["schemas"]),
    ]
    return "\n".join(parts).encode()


def _endpoints(paths: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in paths.items():
        for method, about in methods.items():
            yield f"<h2><span class=method>{method.upper()}</span> <code>{escape(path)}</code></h2>"
            yield f"<p>{_text(about['summary'])}</p>"
            rows = [("body", _shape(_schema_of(about["requestBody"])))] if "requestBody" in about else []
            rows += [
                (one["name"], f"{one['in']}: {_text(one.get('description', ''))}")
                for one in about.get("parameters", ())
            ]
            rows += [
                (code, f"{_text(answer['description'])} {_shape(_schema_of(answer))}")
                for code, answer in about["responses"].items()
            ]
            yield _table(rows)


def _schema_of(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    contents: list[Mapping[str, Any]] = list(holder.get("content", {}).values())
    return contents[0].get("schema", {}) if contents else {}


def _schemas(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in sorted(schemas.items()):
        yield f"<h2 id={name}>{name}</h2><p>{_text(schema.get('description', ''))}</p>"
        required = schema.get("required", ())
        yield _table(
            [
                (
                    f"{field}{' *' if field in required else ''}",
                    f"{_shape(about)} {_text(about.get('description', ''))}",
                )
                for field, about in schema.get("properties", {}).items()
            ]
        )


def _table(rows: list[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><td><code>{escape(name)}</code><td>{text}' for name, text in rows)}</table>"


def _shape(schema: Mapping[str, Any]) -> str:
    """A schema in a few words; models as links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if variants := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(filter(None, map(_shape, variants))))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    kind = schema.get("type", "")
    if kind == "array":
        return f"array of {_shape(schema.get('items', {})) or 'anything'}"
    words = " or ".join(kind) if isinstance(kind, list) else kind
    return f"{words}{_limits(schema)}"


def _limits(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "&ge;", "exclusiveMinimum": "&gt;", "maximum": "&le;", "exclusiveMaximum": "&lt;"}
    found = [f"{sign} {_number(schema[name])}" for name, sign in signs.items() if name in schema]
    found += [f"at most {schema['maxLength']} characters"] if "maxLength" in schema else []
    return f" ({', '.join(found)})" if found else ""


def _number(value: float) -> str:
    """A limit; 2**31 and 2**63, and one less, as powers of two."""
    for power in (31, 63):
        if value in (2**power - 1, 2**power, -(2**power)):
            less = " - 1" if value == 2**power - 1 else ""
            return f"{'-' if value < 0 else ''}2<sup>{power}</sup>{less}"
    return f"{value:.0f}" if value == int(value) else f"{value:g}"


def _text(text: str) -> str:
    """Text with its `code` marked."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
