"""Requests of `/v1/files` and `/v1/batches`: forms, bodies and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from coe.errors import InvalidRequest
from coe.protocol.errors import FieldProblem, InvalidFields

PURPOSE: Final = "batch"
"""The one purpose that an uploaded file may have here."""
_KEPT: Final = (3600, 2_592_000)
"""Seconds for which a file may be kept: OpenAI's bounds."""
_MOST_METADATA: Final = 16


class _Expiry(BaseModel):
    """When results expire."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=_KEPT[0], le=_KEPT[1])]


class BatchFields(BaseModel):
    """The body that creates a batch."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: Annotated[str, StringConstraints(max_length=80)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
            Field(max_length=_MOST_METADATA),
        ]
        | None
    ) = None
    output_expires_after: _Expiry | None = None


@dataclass(frozen=True, slots=True)
class ParsedBatch:
    """A batch to make. keep_s: seconds for which its results are kept; None: as all files."""

    input_file_id: str
    endpoint: str
    metadata: Mapping[str, str] | None
    keep_s: float | None


def parse_batch(body: object) -> ParsedBatch:
    """The batch that a body describes.

    Raises:
        InvalidFields: with every wrong field.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        fields = BatchFields.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        problems = [
            FieldProblem(".".join(map(str, each["loc"]))[:80], "invalid_value", each["msg"]) for each in found[:10]
        ]
        raise InvalidFields(*problems, more=len(found) - len(problems)) from None
    keep_s = None if fields.output_expires_after is None else float(fields.output_expires_after.seconds)
    return ParsedBatch(fields.input_file_id, fields.endpoint, fields.metadata, keep_s)


def file_form(fields: Mapping[str, str]) -> tuple[str, float | None]:
    """Purpose of a file, and the seconds for which it is kept; None: as all files.

    Raises:
        InvalidRequest: a field is missing, unknown or wrong.
    """
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    unknown = sorted(fields.keys() - {"purpose", "expires_after[anchor]", "expires_after[seconds]"})
    if unknown:
        raise _wrong(unknown[0][:80], "is not a field of this endpoint")
    if fields.get("purpose") != PURPOSE:
        raise _wrong("purpose", f"must be {PURPOSE!r}: files are for batches here")
    if anchor is None and seconds is None:
        return PURPOSE, None
    if anchor != "created_at":
        raise _wrong("expires_after[anchor]", "must be 'created_at'")
    least, most = _KEPT
    if seconds is None or not seconds.isascii() or not seconds.isdecimal() or not least <= int(seconds[:12]) <= most:
        raise _wrong("expires_after[seconds]", f"must be a whole number from {least:,} to {most:,}")
    return PURPOSE, float(seconds)


def page_of(
    found: Sequence[Mapping[str, Any]], query: Mapping[str, str], *, most: int, usual: int, ordered: bool = True
) -> dict[str, Any]:
    """A page of a list, as OpenAI's: `limit` objects after the one with the id `after`.

    Args:
        found: if `ordered`, the oldest first, and `order` decides (by default the newest is first); else as they are
            sent.
        most: largest `limit`; usual: that of a request without one.

    Raises:
        InvalidRequest: a parameter is wrong.
    """
    order, limit = query.get("order", "desc"), query.get("limit", str(usual))
    if order not in ("asc", "desc"):
        raise _wrong("order", "must be 'asc' or 'desc'")
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:9]) <= most:
        raise _wrong("limit", f"must be a whole number from 1 to {most:,}")
    objects = list(reversed(found)) if ordered and order == "desc" else list(found)
    if (after := query.get("after")) is not None:
        place = next((i for i, each in enumerate(objects) if each["id"] == after), None)
        if place is None:
            raise _wrong("after", f"there is no object {after[:80]!r}")
        objects = objects[place + 1 :]
    page = objects[: int(limit[:9])]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **ends, "has_more": len(page) < len(objects)}


def _wrong(param: str, message: str) -> InvalidFields:
    return InvalidFields(FieldProblem(param, "invalid_value", message))
