"""Ids of tool calls."""

from __future__ import annotations

import hashlib
import json

from coe.types import GenerateRequest

_HEX_DIGITS = 24


def call_ids(request: GenerateRequest) -> CallIds:
    """The ids of the calls in the answer to a request."""
    conversation = [message.document() for message in request.messages] or request.prompt or request.prompt_ids
    text = json.dumps([conversation, request.seed], default=str)
    return CallIds(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())


class CallIds:
    """`call_` and 24 hex digits for each call of one answer.

    They follow from the conversation and the seed, so the same request has the same answer. A conversation that goes on
    has other ids at each answer.
    """

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def __getitem__(self, index: int) -> str:
        return "call_" + hashlib.sha256(self._digest + str(index).encode()).hexdigest()[:_HEX_DIGITS]
