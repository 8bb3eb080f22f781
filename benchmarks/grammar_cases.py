"""JSON schemas of the benchmarks of constrained decoding: three in use, one for each keyword, and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]
_ADDRESS: Schema = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 40},
        "postcode": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"},
        "country": {"enum": ["DE", "ES", "FR", "US"]},
    },
    "required": ["street", "postcode", "country"],
    "additionalProperties": False,
}
SCHEMAS: Mapping[str, Schema] = {
    "flat": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "level": {"enum": ["low", "medium", "high"]},
            "rank": {"enum": [1, 2, 3, None]},
            "active": {"type": "boolean"},
        },
        "required": ["name", "age", "score", "level", "rank", "active"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "order": {"type": "integer", "minimum": 1},
            "note": {"type": "string", "maxLength": 60},
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 4,
                "items": {
                    "type": "object",
                    "properties": {
                        "item": {"type": "string", "minLength": 1, "maxLength": 20},
                        "count": {"type": "integer", "minimum": 1, "maximum": 99},
                        "tags": {"type": "array", "items": {"enum": ["new", "gift", "fragile"]}, "maxItems": 3},
                    },
                    "required": ["item", "count"],
                    "additionalProperties": False,
                },
            },
            "shipping": {
                "type": "object",
                "properties": {"express": {"type": "boolean"}, "weight": {"type": "number", "minimum": 0}},
                "additionalProperties": False,
            },
        },
        "required": ["order", "lines"],
        "additionalProperties": False,
    },
    "alternatives": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            "due": {"type": "string", "format": "date"},
            "pay": {"anyOf": [{"$ref": "#/$defs/card"}, {"$ref": "#/$defs/transfer"}, {"type": "null"}]},
            "bill_to": {"$ref": "#/$defs/address"},
            "ship_to": {"anyOf": [{"$ref": "#/$defs/address"}, {"const": "same"}]},
        },
        "required": ["id", "due", "pay", "bill_to", "ship_to"],
        "additionalProperties": False,
        "$defs": {
            "address": _ADDRESS,
            "card": {
                "type": "object",
                "properties": {"kind": {"const": "card"}, "number": {"type": "string", "pattern": "^[0-9]{16}$"}},
                "required": ["kind", "number"],
                "additionalProperties": False,
            },
            "transfer": {
                "type": "object",
                "properties": {"kind": {"const": "transfer"}, "iban": {"type": "string", "pattern": "^DE[0-9]{20}$"}},
                "required": ["kind", "iban"],
                "additionalProperties": False,
            },
        },
    },
}
INSTANCES: dict[str, Any] = {
    "flat": {"name": "Ada Lovelace", "age": 36, "score": 0.75, "level": "high", "rank": 2, "active": True},
    "nested": {
        "order": 4711,
        "note": "please ring twice",
        "lines": [{"item": "bolt M8", "count": 12, "tags": ["new", "gift"]}, {"item": "washer", "count": 99}],
        "shipping": {"express": False, "weight": 1.5},
    },
    "alternatives": {
        "id": "ABC-1234",
        "due": "2026-11-29",
        "pay": {"kind": "transfer", "iban": "DE01234567890123456789"},
        "bill_to": {"street": "1 Long Street", "postcode": "12345-6789", "country": "US"},
        "ship_to": "same",
    },
}
_INT = {"type": "integer"}
_ONE = {"type": "object", "properties": {"a": _INT, "b": _INT}, "additionalProperties": False}
KEYWORDS: dict[str, tuple[Any, Any, Any]] = {  # of the property "e": its schema, a valid and an invalid value
    "type": ({"type": ["integer", "null"]}, None, "x"),
    "enum": ({"enum": ["a", 1]}, 1, 2),
    "const": ({"const": {"a": [1]}}, {"a": [1]}, {"a": [2]}),
    "minimum": ({"type": "integer", "minimum": 5}, 5, 4),
    "maximum": ({"type": "number", "maximum": 1.5}, 1.5, 1.6),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 5}, 6, 5),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 1.5}, 1.4, 1.5),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, 14, 8),
    "minLength": ({"type": "string", "minLength": 3}, "abc", "ab"),
    "maxLength": ({"type": "string", "maxLength": 3}, "abc", "abcd"),
    "pattern": ({"type": "string", "pattern": "^a+b$"}, "aab", "aac"),
    "pattern and maxLength": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "aaa", "aaaa"),
    "pattern, look-ahead": ({"type": "string", "pattern": "^(?=ab)a.$"}, "ab", "ac"),
    "format: date-time": ({"type": "string", "format": "date-time"}, "2026-11-29T01:02:03Z", "today"),
    "format: uuid": ({"type": "string", "format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000", "1"),
    "format: email": ({"type": "string", "format": "email"}, "a@b.org", "a"),
    "items": ({"type": "array", "items": _INT}, [1], ["x"]),
    "prefixItems": ({"type": "array", "prefixItems": [_INT], "items": False}, [1], ["x"]),
    "minItems": ({"type": "array", "items": _INT, "minItems": 2}, [1, 2], [1]),
    "maxItems": ({"type": "array", "items": _INT, "maxItems": 2}, [1, 2], [1, 2, 3]),
    "uniqueItems": ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, [1, 2], [1, 1]),
    "contains": ({"type": "array", "contains": {"const": 1}}, [1], [2]),
    "required": ({"type": "object", "properties": {"a": _INT, "b": _INT}, "required": ["a"]}, {"a": 1}, {"b": 1}),
    "additionalProperties": ({"type": "object", "additionalProperties": _INT}, {"z": 1}, {"z": "x"}),
    "additionalProperties: false": (_ONE, {"a": 1}, {"z": 1}),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x_": _INT}, "additionalProperties": False},
        {"x_a": 1},
        {"x_a": "b"},
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a"}}, {"ab": 1}, {"b": 1}),
    "minProperties": ({**_ONE, "minProperties": 2}, {"a": 1, "b": 1}, {"a": 1}),
    "maxProperties": ({**_ONE, "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 1}),
    "dependentRequired": ({**_ONE, "dependentRequired": {"a": ["b"]}}, {"a": 1, "b": 1}, {"a": 1}),
    "unevaluatedProperties": (
        {"type": "object", "properties": {"a": _INT}, "unevaluatedProperties": False},
        {"a": 1},
        {"z": 1},
    ),
    "allOf": ({"allOf": [{**_ONE, "required": ["a"]}, {**_ONE, "required": ["b"]}]}, {"a": 1, "b": 1}, {"a": 1}),
    "anyOf": ({"anyOf": [_INT, {"type": "null"}]}, None, "x"),
    "oneOf, disjoint": ({"oneOf": [_INT, {"type": "string"}]}, "x", None),
    "oneOf, overlapping": ({"oneOf": [{"type": "number"}, _INT]}, 1.5, 1),
    "not": ({"type": "string", "not": {"const": "a"}}, "b", "a"),
    "if, then": ({**_ONE, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"b": 1}, {"a": 1}),
    "$ref": ({"$ref": "#/$defs/n"}, 1, "x"),
    "$ref, recursive": ({"$ref": "#/$defs/tree"}, [[[]]], [[1]]),
    "annotations": ({"type": "integer", "title": "t", "description": "d", "default": 1, "examples": [1]}, 1, "x"),
}
_DEFS = {"n": _INT, "tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}


def having(schema: Any) -> str:
    return json.dumps(
        {
            "type": "object",
            "properties": {"e": schema},
            "required": ["e"],
            "additionalProperties": False,
            "$defs": _DEFS,
        }
    )


def text(pattern: str) -> str:
    return having({"type": "string", "pattern": pattern})


HOSTILE: dict[str, Callable[[], str]] = {
    "1 MB of properties": lambda: having({"properties": {f"p{i:06}": {"type": "string"} for i in range(30_000)}}),
    "enum of 100,000": lambda: having({"enum": [f"value {i}" for i in range(100_000)]}),
    "10,000 levels": lambda: '{"items":' * 10_000 + "{}" + "}" * 10_000,
    "200 levels": lambda: '{"items":' * 200 + "{}" + "}" * 200,
    "references in a loop": lambda: json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "minItems 10^9": lambda: having({"type": "array", "items": _INT, "minItems": 10**9}),
    "maxLength 10^9": lambda: having({"type": "string", "maxLength": 10**9}),
    "pattern ((a{1000}){1000}){1000}": lambda: text("^((a{1000}){1000}){1000}$"),
    "pattern .*a.{40}": lambda: text("^.*a.{40}$"),
    "pattern (a+)+": lambda: text("^(a+)+$"),
    "allOf of 20 anyOf": lambda: having(
        {"allOf": [{"anyOf": [{"properties": {f"{n}{i}": _INT}} for n in "ab"]} for i in range(20)]}
    ),
}
