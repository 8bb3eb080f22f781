"""Log-probabilities of tokens: natural logarithms of the softmax, before temperature, penalties and constraints.

vLLM's default (`logprobs_mode="raw_logprobs"`) has the same meaning. Every generated token has an entry, also the end
token and the tokens of a stop string, whose text is not shown.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from coe.errors import Rejected
from coe.types import GenerateRequest, TokenLogprob

MOST_TOP: Final = 20
"""Most likely tokens that a request may have returned with each token, as in vLLM and OpenAI's API."""
_UNFINISHED: Final = "\ufffd"


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its log-probability, and the most likely tokens at its place, most likely first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def packed(prompt: Sequence[Scored]) -> bytes:
    """The log-probabilities of a prompt's tokens as little-endian float32 numbers; NaN for the first token."""
    return struct.pack(f"<{len(prompt)}f", *(math.nan if s.logprob is None else s.logprob for s in prompt))


class TokenTexts:
    """Text and bytes of single tokens, as they are inside a text.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def of(self, token: int) -> tuple[str, bytes | None]:
        """Text and bytes of a token. A part of a character is `bytes:\\xe4\\xb8`; bytes are `None` if not known."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def logprobs(self, prompt: Sequence[Scored]) -> tuple[TokenLogprob, ...]:
        """The scores of a prompt with texts: joined, the texts are that of the prompt."""
        first = next((i for i, scored in enumerate(prompt) if scored.token not in self._added), -1)
        return tuple(self.logprob(scored, first=i == first) for i, scored in enumerate(prompt))

    def logprob(self, scored: Scored, *, first: bool = False) -> TokenLogprob:
        """The scores with texts. first: a text begins with the token."""
        text, data = self.of(scored.token)
        if first and text[:1] == " " and self.text([scored.token]) == text[1:]:  # SentencePiece
            text, data = text[1:], text[1:].encode()
        top = tuple((each, logprob, raw) for (each, raw), logprob in ((self.of(i), p) for i, p in scored.top))
        return TokenLogprob(text, scored.logprob, data, top)

    def _read(self, token: int) -> tuple[str, bytes | None]:
        if token in self._added:
            return self._added[token], self._added[token].encode()
        text = self.text([*self._before, token])[len(self._text_before) :]
        if _UNFINISHED not in text:
            return text, text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if _UNFINISHED in piece:  # this very character, in a vocabulary of characters
            return text, text.encode()
        data = _raw_bytes(piece)
        try:
            return (text if data is None else data.decode()), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(map(_shown, data or b"")), data

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _before(self) -> list[int]:
        """A token before the one that is read: some tokenizers drop the space at the beginning of a text."""
        ids: list[int] = self._tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        return ids[-1:]

    @cached_property
    def _text_before(self) -> str:
        return self.text(self._before)


def _shown(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}"


def _raw_bytes(piece: str) -> bytes | None:
    """The bytes of a vocabulary's entry: `<0xE4>` (SentencePiece), or one character a byte (byte-level BPE)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    characters: Callable[[], Mapping[int, str]] = bytes_to_unicode
    byte_of = {character: byte for byte, character in characters().items()}
    return bytes(byte_of[c] for c in piece) if all(c in byte_of for c in piece) else None


def check_tokens(request: GenerateRequest, n_ids: int, *, expert: str) -> None:
    """Raises Rejected for a token id that a vocabulary of `n_ids` does not have, or too many log-probabilities."""
    if (most := max(request.logprobs or 0, request.prompt_logprobs or 0)) > MOST_TOP:
        message = f"{expert!r} returns at most {MOST_TOP} most likely tokens for each token, not {most:,}"
        raise Rejected(message, param="logprobs")
    for field, ids in (("prompt", request.prompt_ids), ("logit_bias", request.sampling.logit_bias)):
        wrong = next((i for i in ids if not 0 <= i < n_ids), None)
        if wrong is not None:
            raise Rejected(
                f"{field} has the token id {wrong}, but the vocabulary of {expert!r} has {n_ids:,} tokens: "
                f"send ids from 0 to {n_ids - 1}, made with the tokenizer of this expert",
                param=field,
            )
