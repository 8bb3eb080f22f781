"""How much of an endpoint's answer is read: what `max_tokens` can need, and never more than a hard limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coe.engines.remote.body import echoes, token_limit
from coe.types import GenerateRequest

MOST_STREAM_BYTES: Final = 256 * 2**20
MOST_LINE_BYTES: Final = 16 * 2**20
MOST_ERROR_BYTES: Final = 64 * 2**10
"""Bytes read of the body of an error; the rest is left out."""
MOST_LIST_BYTES: Final = 8 * 2**20
"""Bytes of a list of models, or of another whole JSON document that is no answer."""
_SLACK_BYTES: Final = 2**20
_LINE_SLACK_BYTES: Final = 256 * 2**10
_STREAM_BYTES_PER_TOKEN: Final = 4096
"""An event of one token takes 200 to 1,000 bytes; reasoning that an endpoint does not count takes events of its own."""
_LINE_BYTES_PER_TOKEN: Final = 1024
"""An answer in one line: the text of a token, escaped."""
_CHARACTERS_PER_TOKEN: Final = 128
"""The longest tokens in use are runs of 128 spaces."""
_SLACK_CHARACTERS: Final = 1000
_BYTES_PER_LOGPROB: Final = 384
"""A token with its log-probability and bytes, escaped."""
_SLACK_ENTRIES: Final = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one answer.

    Attributes:
        stream_bytes: of the whole body. line_bytes: of one line of it, which is held in memory.
        characters: of the text, and of the arguments of tool calls; longer ones are cut, as if by `max_tokens`.
        entries: tokens whose log-probabilities are read.
        silence_s: seconds without an event, though other bytes (comments) may come.
    """

    stream_bytes: int
    line_bytes: int
    characters: int
    entries: int
    silence_s: float

    @classmethod
    def of(cls, max_tokens: int, *, silence_s: float, prompt_tokens: int = 0, top: int | None = None) -> Limits:
        """The limits of an answer of at most `max_tokens` tokens.

        Args:
            prompt_tokens: most tokens of the prompt, if the answer repeats it.
            top: number of most likely tokens that come with each token; `None` is no log-probabilities.
        """
        tokens = max_tokens + prompt_tokens
        scores = 0 if top is None else tokens * (1 + top) * _BYTES_PER_LOGPROB
        return cls(
            stream_bytes=min(_SLACK_BYTES + tokens * _STREAM_BYTES_PER_TOKEN + scores, MOST_STREAM_BYTES),
            line_bytes=min(_LINE_SLACK_BYTES + tokens * _LINE_BYTES_PER_TOKEN + scores, MOST_LINE_BYTES),
            characters=_SLACK_CHARACTERS + tokens * _CHARACTERS_PER_TOKEN,
            entries=_SLACK_ENTRIES + tokens,
            silence_s=silence_s,
        )

    @classmethod
    def of_request(cls, request: GenerateRequest, *, silence_s: float) -> Limits:
        """The limits of the answer to a request."""
        repeats = echoes(request) or request.prompt_logprobs is not None
        texts = [request.prompt or "", *(message.content for message in request.messages)]
        prompt = len(request.prompt_ids) or sum(len(text.encode("utf-8", "replace")) for text in texts)
        tops = [n for n in (request.logprobs, request.prompt_logprobs) if n is not None]
        return cls.of(
            token_limit(request),
            silence_s=silence_s,
            prompt_tokens=_SLACK_ENTRIES + prompt if repeats else 0,
            top=max(tops, default=None),
        )
