"""The admin calls that change experts, in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

_EXPERTS: Final = {
    "name": "expert",
    "in": "query",
    "required": True,
    "description": "An expert; repeat it for several.",
    "schema": {"type": "array", "items": {"type": "string"}, "minItems": 1},
}
_WAIT: Final = {
    "name": "wait_s",
    "in": "query",
    "description": "Seconds to wait for requests in progress.",
    "schema": {"type": "number", "minimum": 0},
}
_NAME: Final = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_SPEC: Final = {
    "description": "One expert, or `experts` with a list, as in an experts file.",
    "type": "object",
}


def admin_paths(done: Mapping[str, Any], errors: Callable[..., Mapping[str, Any]]) -> dict[str, Any]:
    """The paths.

    Args:
        done: the description of a response with status 200.
        errors: the descriptions of responses with these statuses.
    """

    def call(name: str, summary: str, *parameters: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        failures = errors(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 501, 503, 504)
        described = {"operationId": name, "summary": summary, "responses": {"200": done, **failures}}
        return described | ({"parameters": list(parameters)} if parameters else {}) | more

    content = {kind: {"schema": _SPEC} for kind in ("application/json", "application/yaml")}
    alias, to = _text("alias", "An alias."), _text("to", "A version of its expert, EXPERT or EXPERT@VERSION.")
    reason = _text("reason", "Why, in a line; clients that name the expert read it.", required=False)
    dry = {"name": "dry_run", "in": "query", "description": "Only check.", "schema": {"type": "boolean"}}
    return {
        "/admin/experts": {
            "get": call("getExperts", "Every expert with what admin calls state of it, and the aliases"),
            "post": call(
                "addExperts", "Add or change experts", dry, requestBody={"required": True, "content": content}
            ),
        },
        "/admin/experts/{name}": {"delete": call("removeExpert", "Drain an expert, then remove it", _NAME, _WAIT)},
        "/admin/drain": {"post": call("drainExperts", "Let experts take no new requests", _EXPERTS, reason, _WAIT)},
        "/admin/undrain": {"post": call("undrainExperts", "Let drained experts take requests again", _EXPERTS)},
        "/admin/pin": {"post": call("pinExperts", "Load experts and keep them in memory", _EXPERTS)},
        "/admin/unpin": {"post": call("unpinExperts", "Undo a pin", _EXPERTS)},
        "/admin/aliases": {"post": call("setAlias", "Create an alias, or move it", alias, to)},
        "/admin/aliases/{name}": {"delete": call("deleteAlias", "Delete an alias", _NAME)},
        "/admin/promote": {"post": call("promoteAlias", "Move an alias that exists", alias, to)},
        "/admin/rollback": {"post": call("rollBackAlias", "Undo the last move of an alias", alias)},
    }


def _text(name: str, description: str, *, required: bool = True) -> dict[str, Any]:
    schema = {"type": "string"}
    return {"name": name, "in": "query", "required": required, "description": description, "schema": schema}
