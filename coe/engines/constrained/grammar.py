"""What an answer must look like: a JSON object, JSON that satisfies a schema, or tool calls in a model's own form.

Grammars are compiled by llguidance (https://github.com/guidance-ai/llguidance). It refuses keywords of JSON Schema that
it cannot guarantee (`not`, `uniqueItems`, ...) instead of ignoring them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from coe.engines.constrained.numbers import inexact, within_range
from coe.engines.constrained.schemas import closed
from coe.errors import Rejected
from coe.types import GenerateRequest

MOST_SCHEMA_BYTES: Final = 2**18
"""Most bytes of all schemas of a grammar, as JSON."""
MOST_LEVELS: Final = 64
"""Most levels of arrays and objects in a schema."""
_ANY_OBJECT: Final = '{"type": "object"}'


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a model writes a call of one tool.

    Attributes:
        before, after: the text around the arguments; it may contain special tokens.
        schema: the JSON schema of the arguments, as text.
        tool: name for error messages.
    """

    before: str
    schema: str
    after: str = ""
    tool: str = ""

    @classmethod
    def of(cls, before: str, parameters: Mapping[str, Any], after: str = "", *, tool: str = "") -> Self:
        """The form of a call. Raises Rejected if the schema of the parameters is too large or too deep."""
        whose = f"the schema of the parameters of tool {tool!r}"
        return cls(before, schema_text({"type": "object", **parameters}, whose), after, tool)


@dataclass(frozen=True, slots=True)
class Grammar:
    """The texts that an answer may be.

    Attributes:
        schema: JSON schema of the answer, as text; empty if the answer is tool calls.
        calls: the forms of which an answer of tool calls has one, or several with `separator` in between.
        before: text before the first call.
        several: more than one call is allowed.
    """

    schema: str = ""
    calls: tuple[CallForm, ...] = ()
    before: str = ""
    separator: str = ""
    several: bool = False

    @classmethod
    def of_request(cls, request: GenerateRequest) -> Self | None:
        """The grammar that `format` and `json_schema` of a request demand; `None` if any text may be the answer.

        A call that `tool_choice` demands is no answer in that format.

        Raises:
            Rejected: the schema is too large or too deep.
        """
        calls = bool(request.offered) and request.tool_choice == "required"
        if request.wants != "text" or request.format != "json" or calls:
            return None
        if request.json_schema is None:
            return cls(_ANY_OBJECT)
        schema = request.json_schema.get("schema")
        return cls(_ANY_OBJECT if schema is None else schema_text(schema))

    @classmethod
    def of_calls(
        cls, calls: Sequence[CallForm], *, before: str = "", separator: str = "", several: bool = False
    ) -> Self:
        """An answer of one or several calls of tools, and nothing else but `before`.

        Raises:
            Rejected: the schemas together are too large.
        """
        _check_size(sum(len(call.schema) for call in calls), "the schemas of all tools", "have")
        return cls(calls=tuple(calls), before=before, separator=separator, several=several)

    @property
    def size(self) -> int:
        """Bytes of its schemas."""
        return len(self.schema) + sum(len(call.schema) for call in self.calls)

    def lark(self, special: Mapping[str, int]) -> str:
        """An answer of tool calls in llguidance's dialect of Lark.

        Args:
            special: ids of special tokens by their text: as text they match nothing.
        """
        names = [f"call_{i}" for i in range(len(self.calls))]
        more = f" ({_literal(self.separator, special)} call)*" if self.several else ""
        before = f"{_literal(self.before, special)} " if self.before else ""
        rules = [f"start: {before}call{more}", f"call: {' | '.join(names)}"]
        for name, call in zip(names, self.calls, strict=True):
            rules += [
                f"{name}: {_literal(call.before, special)} {name}_arguments {_literal(call.after, special)}",
                f"{name}_arguments: %json {call.schema}",
            ]
        return "\n".join(rules)

    def call_of_line(self, line: int) -> CallForm | None:
        """The call whose rules have this line of `lark`, counted from 1; `None` for the first two, of all calls."""
        return self.calls[(line - 3) // 2] if 3 <= line < 3 + 2 * len(self.calls) else None


def schema_text(schema: Any, what: str = "the JSON schema") -> str:
    """A JSON schema as text, its objects without properties that it does not list (`closed`).

    Args:
        what: for error messages.

    Raises:
        Rejected: it is larger than MOST_SCHEMA_BYTES or deeper than MOST_LEVELS, or a number of it is not exact.
    """
    if (path := _too_deep(schema)) is not None:
        raise Rejected(f"{what} has more than {MOST_LEVELS} levels of arrays and objects, at {path:.200}")
    _check_size(len(json.dumps(schema)), what)
    if (number := inexact(schema)) is not None:
        raise Rejected(
            f"{what} has the number {number[1]!s:.40} (at {number[0]:.200}), which is not exact as a double: use a "
            "string, or a number of at most 2**53"
        )
    return json.dumps(within_range(closed(schema)))


def _check_size(n_bytes: int, what: str, has: str = "has") -> None:
    if n_bytes > MOST_SCHEMA_BYTES:
        raise Rejected(f"{what} {has} {n_bytes:,} bytes, at most {MOST_SCHEMA_BYTES:,} are compiled")


def _too_deep(schema: Any) -> str | None:
    """Where a schema exceeds MOST_LEVELS; no recursion, whatever its depth."""
    waiting: list[tuple[str, Any, int]] = [("", schema, 0)]
    while waiting:
        place, inner, level = waiting.pop()
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        if level == MOST_LEVELS and isinstance(inner, dict | list):
            return place
        waiting += [(f"{place}/{name}"[:1000], each, level + 1) for name, each in items]
    return None


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text as it stands, with its special tokens by id."""
    parts: list[str] = []
    while text:
        found = [(at, -len(token), token) for token in special if token and (at := text.find(token)) >= 0]
        at, _, token = min(found, default=(len(text), 0, ""))
        parts += [json.dumps(text[:at])] if at else []
        parts += [f"<[{special[token]}]>"] if token else []
        text = text[at + len(token) :]
    return " ".join(parts) or '""'
