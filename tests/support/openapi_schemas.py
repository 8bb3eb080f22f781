"""Bodies checked by the schemas of the OpenAPI document."""

from __future__ import annotations

import json

from jsonschema import Draft202012Validator

from coe.protocol.openapi import openapi_document


def schema_problems(name: str, body: object) -> list[str]:
    """What of a body does not satisfy the schema with that name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": openapi_document()["components"]}
    errors = Draft202012Validator(schema).iter_errors(json.loads(json.dumps(body)))
    return [f"{error.json_path}: {error.message}" for error in errors]
