"""Log-probabilities in OpenAI's shapes, which differ between chat and completions."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any, Final

from coe.types import TokenLogprob

LEAST: Final = -9999.0
"""Sent for an impossible token: JSON has no infinities, and OpenAI sends the same."""


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """The `logprobs` of a choice of a chat; null without tokens."""
    if not tokens:
        return None
    content = [
        _chat_token(token.token, token.logprob, token.data) | {"top_logprobs": [_chat_token(*one) for one in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """The `logprobs` of a choice of a completion, piece by piece: an offset counts characters from the first token."""

    def __init__(self) -> None:
        self._offset = 0
        self._decode = codecs.getincrementaldecoder("utf-8")("ignore").decode

    def body(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The tokens that come next; null without tokens."""
        if not tokens:
            return None
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [self._next(token) for token in tokens],
        }

    def _next(self, token: TokenLogprob) -> int:
        """The offset of a token; its own characters count for the tokens after it."""
        offset = self._offset
        self._offset += len(token.token if token.data is None else self._decode(token.data))
        return offset


def _top(token: TokenLogprob) -> dict[str, float | None] | None:
    """The most likely tokens and the token itself; null for the first token of a prompt."""
    if token.logprob is None:
        return None
    likely: dict[str, float | None] = {}
    for text, logprob in (*((text, logprob) for text, logprob, _ in token.top), (token.token, token.logprob)):
        likely.setdefault(text, _number(logprob))  # of two tokens with one text, the more likely one
    return likely


def _chat_token(text: str, logprob: float | None, data: bytes | None) -> dict[str, Any]:
    return {"token": text, "logprob": _number(logprob), "bytes": None if data is None else list(data)}


def _number(logprob: float | None) -> float | None:
    if logprob is None or math.isnan(logprob):
        return None
    return max(logprob, LEAST)
