"""Which characters of a text its tokens stand for: what a token has been given, and what a token has read.

With `reads: together`, peers read the answer while the primary writes it, each with its own tokenizer. Positions in the
text, not numbers of tokens, determine what may be seen: a token of the primary that ends at character e reads only
notes of tokens that end at e or before. A character may take several tokens (the bytes of an emoji): the primary has
been given it with the last of them, and a peer has read part of it with the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coe.errors import Unsupported

_UNDECODED: Final = "\ufffd"
MOST_TOKENS_OF_A_CHARACTER: Final = 8
"""More tokens that decode to replacement characters stand for characters that the text has."""


@dataclass(frozen=True, eq=False, slots=True)
class TextEnds:
    """Ends of n tokens in their text, in characters; both never fall.

    Attributes:
        given: (n,) characters that the text has for certain up to the end of a token.
        read: (n,) characters of which a token, or one before it, holds a part: `given`, or more.
    """

    given: NDArray[np.int64]
    read: NDArray[np.int64]

    def spans(self, n_before: int) -> NDArray[np.int32]:
        """(n, 2) characters [start, end) that each token has or shares, in the text behind another of `n_before`."""
        starts = np.concatenate([[0], self.given[:-1]]) if len(self.given) else self.given
        return (np.stack([starts, self.read], axis=1) + n_before).astype(np.int32)

    @classmethod
    def of(cls, tokenizer: Any, ids: Sequence[int], text: str) -> TextEnds:
        """The ends of the tokens of a text.

        Args:
            tokenizer: of transformers.
            ids: `tokenizer(text, add_special_tokens=False)`, or tokens that decode to the text.

        Raises:
            Unsupported: the tokens do not decode to the text, and the tokenizer does not state their characters.
        """
        ends = cls._decoded(tokenizer, ids, ambiguous=_UNDECODED in text)
        if tokenizer.decode(list(ids), **AS_WRITTEN) == text:
            return ends._up_to(len(text))
        return cls._stated(tokenizer, ids, text)._up_to(len(text))

    @classmethod
    def _decoded(cls, tokenizer: Any, ids: Sequence[int], *, ambiguous: bool) -> TextEnds:
        """By decoding: tokens [start, known) are the context of those from `known` on, whose text begins at `n`.

        Args:
            ambiguous: whether replacement characters may be those of the text, and not bytes of a part of one.
        """
        given, read = np.zeros((2, len(ids)), np.int64)
        start = known = n = 0
        for i in range(len(ids)):
            context = tokenizer.decode(list(ids[start:known]), **AS_WRITTEN)
            new = tokenizer.decode(list(ids[start : i + 1]), **AS_WRITTEN)[len(context) :]
            whole = new.rstrip(_UNDECODED)
            given[i] = n + len(whole)
            read[i] = n + len(new) if ambiguous else given[i] + (whole != new)
            if (new and not new.endswith(_UNDECODED)) or i + 1 - known >= MOST_TOKENS_OF_A_CHARACTER:
                start, known, n = known, i + 1, n + len(new)
        return cls(given, read)

    @classmethod
    def _stated(cls, tokenizer: Any, ids: Sequence[int], text: str) -> TextEnds:
        """By the characters that the tokenizer states, which may leave out spaces beside a token."""
        if not getattr(tokenizer, "is_fast", False):
            raise Unsupported("a tokenizer whose tokens do not decode to their text must state their characters")
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if list(found["input_ids"]) != list(ids):
            raise Unsupported("the tokens are not those of the text")
        starts, ends = np.array(found["offset_mapping"], np.int64).reshape(-1, 2).T
        following = np.append(starts[1:], len(text))
        return cls(np.minimum(ends, following), np.maximum(ends, following))

    def _up_to(self, n_characters: int) -> TextEnds:
        """Ends that never fall, in a text of so many characters, whose last token ends it."""
        given, read = self.given.clip(max=n_characters), self.read.clip(max=n_characters)
        if len(given):
            given[-1] = read[-1] = n_characters
        return TextEnds(np.minimum.accumulate(given[::-1])[::-1], np.maximum.accumulate(read))


AS_WRITTEN: Final = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
