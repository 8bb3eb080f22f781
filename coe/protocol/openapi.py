"""The OpenAPI document of the API: paths, request bodies as they are validated, response bodies, headers, errors.

    GET /openapi.json      this document
    GET /docs              the same as a page

Request schemas come from the models that parse requests, so they cannot differ from what is accepted. Response bodies
are plain dicts (`coe.protocol.responses`); their schemas are written here, and tests validate real bodies with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from coe.protocol import fields as f
from coe.protocol.batch_paths import BATCH_SCHEMAS, batch_paths
from coe.protocol.batches import BatchFields
from coe.protocol.embeddings import IGNORED, REFUSED, EmbeddingFields
from coe.protocol.field_descriptions import DESCRIPTIONS
from coe.protocol.openapi_admin import admin_paths
from coe.protocol.response_fields import IGNORED as IGNORED_IN_RESPONSES
from coe.protocol.response_fields import REFUSED as REFUSED_IN_RESPONSES
from coe.protocol.response_fields import ResponseFields
from coe.protocol.response_object_schemas import RESPONSE_SCHEMAS
from coe.protocol.response_schemas import SCHEMAS
from coe.version import __version__

_REF: Final = "#/components/schemas/{model}"
_BODIES: Final[Mapping[str, type[BaseModel]]] = {
    "ChatRequest": f.ChatFields,
    "CompletionRequest": f.CompletionFields,
    "EmbeddingRequest": EmbeddingFields,
    "ResponseRequest": ResponseFields,
    "BatchRequest": BatchFields,
}
_ANSWERED: Final = ("ChatRequest", "CompletionRequest", "EmbeddingRequest", "ResponseRequest")
_IGNORED: Final = "Accepted, without effect here; the response header `x-coe-warning` names it."

_HEADERS: Final = {
    "x-coe-expert": "the expert that answers",
    "x-coe-router": "the policy that chose it; absent if the request names an expert",
    "x-coe-confidence": "the probability that the decision is right",
    "x-coe-decision-id": "the id of the decision in the log",
    "x-coe-notes": "what the caller should know of how the answer came about",
    "x-coe-degraded": "`true`: the service is overloaded, and called fewer or cheaper experts",
    "x-coe-warning": "fields of the request without effect",
}
_STREAMED: Final = (
    ". With `stream: true`: server-sent events `data: <chunk>`, the last one `data: [DONE]`. An error after the first "
    "event is an event with `error`."
)
_STREAMED_RESPONSE: Final = (
    ". With `stream: true`: named server-sent events, from `response.created` to `response.completed` or "
    "`response.incomplete`. After an error the last ones are `error` and `response.failed`."
)
_ERRORS: Final = {
    400: "The request is wrong: `message` lists every problem with its field.",
    401: "The service has API keys, and the request has none that is valid.",
    403: "The host, the origin or this use of the API key is not allowed.",
    404: "No such endpoint, model or response.",
    408: "The body arrived too slowly.",
    409: "Requests use the weights, they are pinned, or a change of the experts is refused.",
    413: "The body is too large.",
    415: "The content type is not application/json.",
    422: "The router trusts no expert with the request, and the policy has no `fallback`.",
    429: "Too many requests are in flight; `retry-after` states seconds.",
    500: "The server failed; the message has the id under which the cause is logged.",
    501: "The expert's engine cannot do what the request needs.",
    502: "The expert failed, and no other could answer.",
    503: "The expert cannot answer now; `retry-after` states seconds.",
    504: "The deadline passed.",
    507: "The files have no room.",
}


@cache
def openapi_document() -> dict[str, Any]:
    """The document, in OpenAPI 3.1; treat it as constant."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "coe",
            "version": __version__,
            "description": "Many expert LLMs and LoRA adapters behind one OpenAI-compatible endpoint. `model` is "
            "`auto` (the default policy routes), `coe/<policy>`, or the name of an expert.",
        },
        "paths": _paths(),
        "components": {
            "schemas": {**_request_schemas(), **SCHEMAS, **RESPONSE_SCHEMAS, **BATCH_SCHEMAS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],  # a service without keys needs none
    }


def _paths() -> dict[str, Any]:
    return {
        "/v1/chat/completions": {
            "post": _answering("createChatCompletion", "Answer a conversation", "Chat", "ChatCompletion")
        },
        "/v1/completions": {
            "post": _answering("createCompletion", "Continue one or several prompts", "Completion", "Completion")
        },
        "/v1/responses": {
            "post": _answering(
                "createResponse", "Answer items of a conversation; nothing is stored", "Response", "Response"
            )
        },
        "/v1/responses/{id}": {
            method: {
                "operationId": f"{method}Response",
                "summary": "Always an error: responses are not stored",
                "parameters": [
                    {
                        "name": "id",
                        "in": "path",
                        "required": True,
                        "description": "Any id, or path below one, such as `resp_1/input_items`.",
                        "schema": {"type": "string"},
                    }
                ],
                "responses": _errors(401, 403, 404, 500, 503),
            }
            for method in ("get", "post", "delete")
        },
        "/v1/embeddings": {
            "post": {
                "operationId": "createEmbedding",
                "summary": "Vectors of texts, all by the expert that `model` names or that a policy chooses",
                "requestBody": _body(_ref("EmbeddingRequest")),
                "responses": {"200": _json("The vectors", _ref("Embeddings")), **_errors()},
            }
        },
        "/v1/route": {
            "post": {
                "operationId": "route",
                "summary": "The routing decision for a chat, completion, embedding or response; no expert is called",
                "requestBody": _body({"anyOf": [_ref(name) for name in _BODIES]}),
                "responses": {"200": _json("The decision and its inputs", _ref("Route")), **_errors()},
            }
        },
        "/v1/models": {"get": _reading("listModels", "Every valid value of `model`", _ref("ModelList"))},
        "/v1/models/{id}": {
            "get": _reading("getModel", "One model", _ref("Model"), 404)
            | {
                "parameters": [
                    {
                        "name": "id",
                        "in": "path",
                        "required": True,
                        "description": "`auto`, `coe/<policy>` or an expert's name; it may contain `/`.",
                        "schema": {"type": "string"},
                    }
                ]
            }
        },
        **batch_paths(_errors),
        "/health": {
            "get": {
                "operationId": "health",
                "summary": "Whether requests can be answered now",
                "responses": {
                    "200": _json("Requests can be answered", _ref("Health")),
                    "503": _json("They cannot; `problem` says why", _ref("Health")),
                },
            }
        },
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Metrics in the Prometheus text format",
                "responses": {
                    "200": {"description": "The metrics", "content": {"text/plain": {"schema": {"type": "string"}}}},
                    **_errors(401, 403, 503),
                    "404": _json("Metrics are switched off", _ref("Error")),
                },
            }
        },
        "/admin/load": {"post": _managing("loadExperts", "Load experts on every host that serves them")},
        "/admin/unload": {
            "post": _managing(
                "unloadExperts",
                "Free the memory of experts on every host that serves them",
                {
                    "name": "wait_s",
                    "in": "query",
                    "description": "Seconds to wait for requests that use them; 0 by default.",
                    "schema": {"type": "number", "minimum": 0},
                },
            )
        },
        "/admin/residency": {
            "get": _reading("getResidency", "What each host has in memory", _ref("HostList"), 501, 504)
        },
        **admin_paths(_json("Done", _ref("Change")), _errors),
        "/admin/decisions": {
            "get": _reading(
                "getDecisions", "The last decisions of all gateways, without texts", _ref("DecisionList"), 400
            )
            | {
                "parameters": [
                    {
                        "name": "last",
                        "in": "query",
                        "description": "How many of them; 200 by default.",
                        "schema": {"type": "integer", "minimum": 1, "maximum": 1000},
                    }
                ]
            }
        },
        "/admin/routers": {
            "get": _reading("getRouters", "The router of each policy, with its cost-quality curve", _ref("RouterList"))
        },
        "/ui": {"get": _page("ui", "A page to ask, watch and compare")},
        "/ui/{name}": {
            "get": _page("uiFile", "A file of that page", 404)
            | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
        },
        "/openapi.json": {"get": _reading("openapi", "This document", {"type": "object"})},
        "/docs": {
            "get": {
                "operationId": "docs",
                "summary": "This document as a page",
                "responses": {"200": {"description": "The page", "content": {"text/html": {}}}},
            }
        },
    }


def _answering(name: str, summary: str, request: str, answer: str) -> dict[str, Any]:
    """A POST that answers with one body, or with server-sent events."""
    chunk = {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(f"{answer}Chunk")}
    data = chunk if answer == "Response" else {"anyOf": [chunk, {"const": "[DONE]"}]}
    ok = _json("The answer", _ref(answer))
    ok["content"]["text/event-stream"] = {
        "schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}
    }
    ok["description"] += _STREAMED_RESPONSE if answer == "Response" else _STREAMED
    ok["headers"] = {header: {"description": text, "schema": {"type": "string"}} for header, text in _HEADERS.items()}
    debug = {
        "name": "x-coe-debug",
        "in": "header",
        "description": "`true` adds the decision, the experts called, cost and timing as `coe`.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    }
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [debug],
        "requestBody": _body(_ref(f"{request}Request")),
        "responses": {"200": ok, **_errors()},
    }


def _reading(name: str, summary: str, schema: Mapping[str, Any], *errors: int) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _json(summary, schema), **_errors(401, 403, 500, 503, *errors)},
    }


def _page(name: str, summary: str, *errors: int) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "The page", "content": {"text/html": {}}},
            "304": {"description": "It has not changed since the `ETag` that was sent"},
            **(_errors(*errors) if errors else {}),
        },
    }


def _managing(name: str, summary: str, *parameters: Mapping[str, Any]) -> dict[str, Any]:
    """An admin call without a body, on the experts of its query."""
    experts = {
        "name": "expert",
        "in": "query",
        "required": True,
        "description": "An expert; repeat it for several.",
        "schema": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    }
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [experts, *parameters],
        "responses": {
            "200": _json("Done; what each host says", _ref("HostList")),
            **_errors(400, 401, 403, 404, 409, 429, 500, 501, 502, 503, 504),
        },
    }


def _errors(*codes: int) -> dict[str, Any]:
    """Of these statuses; by default of those that an answer may have."""
    return {str(code): _json(_ERRORS[code], _ref("Error")) for code in codes or _ERRORS.keys() - {409, 507}}


def _json(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _body(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


def _request_schemas() -> dict[str, Any]:
    """The models of requests by name, each with the fields that are accepted and have no effect, or only one value."""
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in _BODIES.values()]
    _, found = models_json_schema(models, ref_template=_REF, schema_generator=_Titleless)
    schemas: dict[str, Any] = found["$defs"]
    for name, model in _BODIES.items():
        schemas[name] = schemas.pop(model.__name__)
    chat, completion, response = (
        {**f.OF_ENGINES, **refused} for refused in (f.REFUSED_IN_CHAT, f.REFUSED_IN_COMPLETIONS, REFUSED_IN_RESPONSES)
    )
    neutral = (chat, completion, REFUSED, response)
    of_engines = f.IGNORED_OF_ENGINES
    ignored = (
        f.IGNORED_IN_CHAT | of_engines,
        f.IGNORED_IN_COMPLETIONS | of_engines,
        IGNORED,
        IGNORED_IN_RESPONSES | of_engines,
    )
    for name, only, free in zip(_ANSWERED, neutral, ignored, strict=True):
        schemas[name]["properties"] |= _neutral(only) | _free(free)
        for field, text in DESCRIPTIONS.items():
            if field in schemas[name]["properties"] and field not in only:
                schemas[name]["properties"][field] |= {"description": text}
    schemas["EmbeddingRequest"]["properties"]["model"] |= {
        "description": "An expert of kind `embedding`, `coe/<policy>`, or `auto`: the one policy of such experts."
    }
    schemas["ResponseRequest"]["properties"]["input"] |= {
        "description": "A text of the user, or the items of the conversation, oldest first: all of them, since nothing "
        "is stored."
    }
    schemas["Turn"] |= _by_role(schemas["Turn"]["properties"])
    schemas["Turn"]["properties"] |= _neutral(f.REFUSED_IN_MESSAGES) | _free(f.IGNORED_IN_MESSAGES)
    return schemas


def _by_role(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message, and which of them depend on its role: assistant messages alone may lack a content."""
    roles = [role for role in properties["role"]["enum"] if role != "assistant"]
    other = {"role": {"enum": roles}, "content": {"type": ["string", "array"]}, "tool_calls": {"enum": [None, []]}}
    assistant = {"role": {"const": "assistant"}}
    about = {"description": "Required, except in assistant messages."}
    content = {"anyOf": [*properties["content"]["anyOf"], {"type": "null"}], **about}
    return {
        "required": ["role"],
        "properties": {**properties, "content": content},
        "anyOf": [{"properties": assistant}, {"properties": other, "required": ["content"]}],
    }


def _neutral(refused: Mapping[str, f.Neutral]) -> dict[str, Any]:
    return {
        name: {"enum": list(values), "description": "Not supported: only values that request nothing are accepted."}
        for name, values in refused.items()
    }


def _free(ignored: tuple[str, ...] | frozenset[str]) -> dict[str, Any]:
    return {name: {"description": _IGNORED} for name in sorted(ignored)}


class _Titleless(GenerateJsonSchema):
    """Without titles: they repeat the names of the fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False
