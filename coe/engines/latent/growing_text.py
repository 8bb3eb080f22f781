"""The text of an answer while it is written, token by token, and which characters each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from coe.engines.latent.text_ends import AS_WRITTEN, MOST_TOKENS_OF_A_CHARACTER

_UNDECODED: Final = "\ufffd"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the text stands after a token: tokens [start, known) are the context of the next ones, whose text begins at
    character `n`.

    given: characters that the text has for certain.
    """

    start: int = 0
    known: int = 0
    n: int = 0
    given: int = 0


class GrowingText:
    """Tokens of one tokenizer and their text; both grow, and may lose their last tokens again.

    A character of several tokens is in the text with the last of them. Adding a token takes two short calls of the
    tokenizer, however long the text is.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""
        self._places = [_Place()]
        self._spans: list[tuple[int, int]] = []

    def push(self, token: int) -> None:
        """Add a token."""
        before, i = self._places[-1], len(self.tokens)
        self.tokens.append(token)
        context = self._decode(self.tokens[before.start : before.known])
        new = self._decode(self.tokens[before.start :])[len(context) :]
        whole = new.rstrip(_UNDECODED)
        is_settled = bool(new) and whole == new
        if not is_settled and i + 1 - before.known >= MOST_TOKENS_OF_A_CHARACTER:
            whole, is_settled = new, True  # they will never be characters
        self.text = self.text[: before.n] + whole
        given = before.n + len(whole)
        self._spans.append((before.given, given + (whole != new)))
        after = (
            _Place(before.known, i + 1, given, given)
            if is_settled
            else _Place(before.start, before.known, before.n, given)
        )
        self._places.append(after)

    def crop(self, n_tokens: int) -> None:
        """Keep the first tokens only."""
        del self.tokens[n_tokens:], self._spans[n_tokens:], self._places[n_tokens + 1 :]
        self.text = self.text[: self._places[-1].given]

    def spans(self, first: int = 0) -> list[tuple[int, int]]:
        """Characters [start, end) that each token from `first` on has or shares."""
        return self._spans[first:]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), **AS_WRITTEN)
        return text


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of first tokens that both have."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
