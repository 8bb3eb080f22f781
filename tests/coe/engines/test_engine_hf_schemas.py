"""Which objects of a JSON schema get no other properties than the listed ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coe.engines.constrained.numbers import inexact, within_range
from coe.engines.constrained.schemas import closed, places

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


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"enum": [2**53, 2**53 + 1]}, "/enum"),
        ({"properties": {"id": {"const": {"a": [-(2**53) - 1]}}}}, "/properties/id/const"),
        ({"const": 2**70}, "/const"),  # its double has other digits
        ({"const": 10**400}, "/const"),
        ({"minimum": 2**53 + 1}, "/minimum"),
        ({"exclusiveMinimum": 2**70}, "/exclusiveMinimum"),
        ({"maximum": -(2**70)}, "/maximum"),
        ({"exclusiveMaximum": 2**53 + 3}, "/exclusiveMaximum"),
        ({"default": 2**53 + 1, "examples": [2**53 + 1], "properties": {"minimum": {"title": "2"}}}, None),
        ({"enum": [2**62, True, 0.1, -(2**63)], "maximum": 2**64 - 1, "minimum": -(2**63)}, None),
        ({"maximum": 2**53 + 1, "minimum": 2**53 + 3}, None),  # they are read as narrower bounds
    ],
)
def test_a_number_that_is_no_double_is_found_where_answers_would_not_keep_to_it(schema: Any, place: str | None) -> None:
    found = inexact(schema)
    assert (found and found[0]) == place


def test_the_least_number_of_64_bits_is_a_bound_that_can_be_compiled() -> None:
    schema = {"items": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}}
    [bound] = [value for _, name, value in places(within_range(schema)) if name == "minimum"]
    assert -(2**63) < bound <= -(2**63) + 1024
    assert schema["items"]["minimum"] == -(2**63)
    assert within_range({"minimum": -5}) == {"minimum": -5}
