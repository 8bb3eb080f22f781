"""JSON schemas as documents: a walk over their parts, and objects with no other properties than the listed ones."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Final

_OF_NAMES: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value has a schema for each name."""
_OF_VALUES: Final = frozenset({"enum", "const", "default", "examples"})
"""Keywords whose value is no schema."""
_SAME_VALUE: Final = frozenset({"properties", "anyOf", "$ref"})
"""Two of these in one schema describe the same object together."""
_OTHERS_COUNT: Final = frozenset(
    {"allOf", "oneOf", "not", "if", "dependentSchemas", "dependentRequired", "dependencies", "$dynamicRef"}
    | {"minProperties", "propertyNames", "unevaluatedProperties"}
)
"""Keywords by which a property that one schema does not list may be required or excluded elsewhere."""
_STATES_OTHERS: Final = frozenset({"additionalProperties", "patternProperties", "enum", "const"})
"""Keywords of a schema that state which other properties its object has."""


def subschemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema in a schema, itself included, with its JSON pointer. Names of properties are no keywords."""
    waiting = [("", schema)]
    while waiting:
        place, inner = waiting.pop(0)
        if isinstance(inner, list):
            waiting += [(f"{place}/{i}", each) for i, each in enumerate(inner)]
        if not isinstance(inner, dict):
            continue
        yield place, inner
        for name, value in inner.items():
            here = f"{place}/{name}"
            if name in _OF_NAMES and isinstance(value, dict):
                waiting += [(f"{here}/{each}", found) for each, found in value.items()]
            elif name not in _OF_VALUES:
                waiting.append((here, value))


def places(schema: Any) -> Iterator[tuple[str, str, Any]]:
    """Each keyword of a schema: its JSON pointer, its name and its value."""
    for place, inner in subschemas(schema):
        for name, value in inner.items():
            yield f"{place}/{name}", name, value


def closed(schema: Any) -> Any:
    """A copy in which objects that list `properties` have no others, unless the schema states that they may.

    Every answer still satisfies the given schema. Without this a small model invents properties until `max_tokens` ends
    its answer, since few schemas state `additionalProperties`. A schema is returned as it is if several of its parts
    describe one object, because a property that one part does not list may be one that another part requires.
    """
    for _, inner in subschemas(schema):
        if _OTHERS_COUNT & inner.keys() or len(_SAME_VALUE & inner.keys()) > 1:
            return schema
    copy = deepcopy(schema)
    for _, inner in subschemas(copy):
        if _lists_all(inner):
            inner["additionalProperties"] = False
    return copy


def _lists_all(schema: dict[str, Any]) -> bool:
    """Whether an object may have the listed properties only: it needs no other, and none is stated."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or _STATES_OTHERS & schema.keys():
        return False
    return isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required)
