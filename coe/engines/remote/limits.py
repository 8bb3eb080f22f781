"""How much of an endpoint's answer is read: what `max_tokens` can need, and never more than a hard limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one answer.

    Attributes:
        stream_bytes: of the whole body. line_bytes: of one line of it, which is held in memory.
        characters: of the text; a longer one is cut, as if by `max_tokens`.
        silence_s: seconds without an event, though other bytes (comments) may come.
    """

    stream_bytes: int
    line_bytes: int
    characters: int
    silence_s: float

    @classmethod
    def of(cls, max_tokens: int, *, silence_s: float) -> Limits:
        """The limits of an answer of at most `max_tokens` tokens."""
        return cls(
            stream_bytes=min(_SLACK_BYTES + max_tokens * _STREAM_BYTES_PER_TOKEN, MOST_STREAM_BYTES),
            line_bytes=min(_LINE_SLACK_BYTES + max_tokens * _LINE_BYTES_PER_TOKEN, MOST_LINE_BYTES),
            characters=_SLACK_CHARACTERS + max_tokens * _CHARACTERS_PER_TOKEN,
            silence_s=silence_s,
        )
