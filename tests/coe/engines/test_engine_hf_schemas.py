"""Which objects of a JSON schema get no other properties than the listed ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coe.engines.hf.constrained.schemas import closed, places

ANY = {"type": "string"}


def of(*names: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": dict.fromkeys(names, ANY), **more}


SHUT = {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (of("a"), of("a", **SHUT)),
        (of("a", required=["a"]), of("a", required=["a"], **SHUT)),
        (of(), of(**SHUT)),
        ({"properties": {"a": of("b")}}, {"properties": {"a": of("b", **SHUT)}, **SHUT}),
        ({"items": of("a")}, {"items": of("a", **SHUT)}),
        ({"anyOf": [of("a"), of("b")]}, {"anyOf": [of("a", **SHUT), of("b", **SHUT)]}),
        ({"$ref": "#/$defs/p", "$defs": {"p": of("a")}}, {"$ref": "#/$defs/p", "$defs": {"p": of("a", **SHUT)}}),
        (of("allOf", "oneOf", "required"), of("allOf", "oneOf", "required", **SHUT)),  # names, no keywords
    ],
)
def test_an_object_is_closed_where_its_schema_is_silent(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert closed(schema) == expected
    assert json.dumps(schema) == before  # the request keeps its own


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        of("a", additionalProperties=True),
        of("a", additionalProperties=ANY),
        of("a", patternProperties={"^x": ANY}),
        of("a", required=["a", "b"]),
        of("a", enum=[{"a": "x", "b": "y"}]),
        of("a", const={"a": "x", "b": "y"}),
        of("a", minProperties=2),
        of("a", anyOf=[of("b"), of("c")]),
        {"allOf": [of("a"), of("b")]},
        {"oneOf": [of("a"), of("b", required=["b"])]},
        {"$defs": {"base": of("a")}, "allOf": [{"$ref": "#/$defs/base"}, of("b")]},
        {"$defs": {"base": of("a")}, "$ref": "#/$defs/base", "properties": {"b": ANY}},
        {"enum": [of("a")], "default": of("a")},
        of("a", required="a"),
        of("a", required=[1]),
        True,
        None,
        [[], "a"],
    ],
)
def test_an_object_that_may_need_others_stays_open(schema: Any) -> None:
    assert closed(schema) == schema


def test_a_schema_has_the_places_of_its_keywords() -> None:
    schema = {"properties": {"not": {"enum": [{"type": "a"}]}}, "items": [{"const": {"x": 1}}]}
    assert [(place, name) for place, name, _ in places(schema)] == [
        ("/properties", "properties"),
        ("/items", "items"),
        ("/properties/not/enum", "enum"),
        ("/items/0/const", "const"),
    ]
