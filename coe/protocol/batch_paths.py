"""`/v1/files` and `/v1/batches` in the OpenAPI document: paths, and schemas of requests and bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_COUNT_OR_NULL: Final = {"type": ["integer", "null"], "minimum": 0}
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}
_TIMES: Final = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_REFUSED: Final = (400, 401, 404, 429, 500, 501, 503)
_PAGE: Final = {
    "limit": ("Most objects of the page.", {"type": "integer", "minimum": 1}),
    "after": ("The id of the object that the page begins after.", _TEXT),
}
_ORDER: Final = {"order": ("`desc`: the newest first.", {"enum": ["asc", "desc"]}), "purpose": ("Of the files.", _TEXT)}


def _object(properties: Mapping[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def _page_schema(of: str) -> dict[str, Any]:
    items = {"type": "array", "items": {"$ref": f"#/components/schemas/{of}"}}
    ends = {"first_id": _TEXT_OR_NULL, "last_id": _TEXT_OR_NULL, "has_more": {"type": "boolean"}}
    return _object({"object": {"const": "list"}, "data": items, **ends})


_PROBLEM: Final = _object({"code": _TEXT, "line": _COUNT_OR_NULL, "message": _TEXT, "param": _TEXT_OR_NULL})
_DETAILS: Final = {"type": "object", "additionalProperties": _COUNT}
BATCH_SCHEMAS: Final[Mapping[str, Any]] = {
    "File": _object(
        {
            "object": {"const": "file"},
            "id": _TEXT,
            "filename": _TEXT,
            "purpose": {"enum": ["batch", "batch_output"]},
            "bytes": _COUNT,
            "created_at": _COUNT,
            "expires_at": _COUNT,
            "status": {"const": "processed"},
            "status_details": {"type": "null"},
        }
    ),
    "FileList": _page_schema("File"),
    "FileDeleted": _object({"id": _TEXT, "object": {"const": "file"}, "deleted": {"const": True}}),
    "Batch": _object(
        {
            "id": _TEXT,
            "object": {"const": "batch"},
            "endpoint": _TEXT,
            "errors": {
                "anyOf": [
                    _object({"object": {"const": "list"}, "data": {"type": "array", "items": _PROBLEM}}),
                    {"type": "null"},
                ]
            },
            "input_file_id": _TEXT,
            "completion_window": {"const": "24h"},
            "status": {
                "enum": [
                    "validating",
                    "failed",
                    "in_progress",
                    "finalizing",
                    "completed",
                    "expired",
                    "cancelling",
                    "cancelled",
                ]
            },
            "output_file_id": _TEXT_OR_NULL,
            "error_file_id": _TEXT_OR_NULL,
            "created_at": _COUNT,
            "expires_at": _COUNT,
            **{f"{name}_at": _COUNT_OR_NULL for name in _TIMES},
            "request_counts": _object(dict.fromkeys(("total", "completed", "failed"), _COUNT)),
            "metadata": {"type": ["object", "null"], "additionalProperties": _TEXT},
            "usage": _object(
                {
                    "input_tokens": _COUNT,
                    "input_tokens_details": _DETAILS,
                    "output_tokens": _COUNT,
                    "output_tokens_details": _DETAILS,
                    "total_tokens": _COUNT,
                }
            ),
        },
        "usage",
    ),
    "BatchList": _page_schema("Batch"),
}
_FORM: Final = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"const": "batch"},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
    "required": ["file", "purpose"],
}


def batch_paths(errors: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The paths. `errors`: the responses of some error statuses."""

    def call(name: str, summary: str, schema: str, *codes: int, **more: Any) -> dict[str, Any]:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
        responses = {"200": {"description": summary, "content": content}, **errors(*sorted({*_REFUSED, *codes}))}
        return {"operationId": name, "summary": summary, **more, "responses": responses}

    def of(what: str) -> dict[str, Any]:
        place = {"name": "id", "in": "path", "required": True, "description": f"The id of the {what}.", "schema": _TEXT}
        return {"parameters": [place]}

    form = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    asked = {"application/json": {"schema": {"$ref": "#/components/schemas/BatchRequest"}}}
    content = call("downloadFile", "The bytes of a file", "File", **of("file"))
    content["responses"]["200"]["content"] = {"application/octet-stream": {}}
    cancel = call("cancelBatch", "Cancel a batch; what was answered so far stays", "Batch", 403, **of("batch"))
    return {
        "/v1/files": {
            "post": call("createFile", "Upload a file of requests", "File", 403, 408, 413, 415, 507, requestBody=form),
            "get": call("listFiles", "The files of the API key", "FileList", **_query(_PAGE | _ORDER)),
        },
        "/v1/files/{id}": {
            "get": call("retrieveFile", "One file", "File", **of("file")),
            "delete": call("deleteFile", "Delete a file", "FileDeleted", 403, 409, **of("file")),
        },
        "/v1/files/{id}/content": {"get": content},
        "/v1/batches": {
            "post": call(
                "createBatch",
                "Answer the requests of a file",
                "Batch",
                *(403, 408, 413, 415),
                requestBody={"required": True, "content": asked},
            ),
            "get": call("listBatches", "The batches of the API key, the newest first", "BatchList", **_query(_PAGE)),
        },
        "/v1/batches/{id}": {"get": call("retrieveBatch", "One batch", "Batch", **of("batch"))},
        "/v1/batches/{id}/cancel": {"post": cancel},
    }


def _query(parameters: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    found = [
        {"name": name, "in": "query", "description": text, "schema": schema}
        for name, (text, schema) in parameters.items()
    ]
    return {"parameters": found}
