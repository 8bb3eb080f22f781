"""W3C trace context of an incoming request (https://www.w3.org/TR/trace-context/): hostile input, so checked whole."""

from __future__ import annotations

import re
from typing import Final

MOST_STATE: Final = 512
"""Most characters of `tracestate` that are passed on, as the standard asks."""
_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_MEMBER: Final = re.compile(
    r"[a-z0-9][a-z0-9_*/@-]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
MOST_MEMBERS: Final = 32
"""Most members of `tracestate`, as the standard says."""


def trace_context(parents: list[str], states: list[str]) -> tuple[str, str]:
    """The `traceparent` and `tracestate` of a request, from all headers of these names; "" for what is invalid.

    A request with an invalid traceparent begins a trace of its own, as the standard asks.
    """
    if len(parents) != 1 or len(parents[0]) > MOST_STATE:
        return "", ""
    match = _PARENT.fullmatch(parents[0].strip())
    if match is None:
        return "", ""
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return "", ""
    return f"00-{trace_id}-{span_id}-{flags}", _state(",".join(states))


def _state(state: str) -> str:
    """The members of a tracestate; "" if one of them is invalid."""
    if len(state) > MOST_STATE:
        return ""
    members = [member.strip(" \t") for member in state.split(",") if member.strip(" \t")]
    usable = len(members) <= MOST_MEMBERS and all(_MEMBER.fullmatch(member) for member in members)
    return ",".join(members) if usable else ""
