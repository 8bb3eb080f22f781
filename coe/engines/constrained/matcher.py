"""The state of one constrained answer: which tokens may come next, and whether it is complete."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from coe.errors import Rejected
from coe.seam import one_line

if TYPE_CHECKING:
    from torch import Tensor

_MOST_WHITESPACE: Final = 24
"""Most tokens of white space in a row: some models repeat a newline until `max_tokens`, since JSON allows it."""
_MOST_MESSAGE: Final = 300
_DEAD_END: Final = "NoExtensionBias"
"""llguidance's name for a state after which neither a token nor the end is allowed."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a matcher knows of the tokens.

    Attributes:
        n_tokens: number of token ids. end: the token that llguidance allows at the end of an answer.
        whitespace: (n_tokens,) bool: tokens of white space only.
    """

    n_tokens: int
    end: int
    whitespace: NDArray[np.bool_]


@dataclass(eq=False, slots=True)
class Compiled:
    """A compiled grammar: a matcher of llguidance that is copied for each answer, and not advanced.

    failed: an answer exceeded its limits. The copies share its states, so no more are made.
    """

    state: Any
    failed: bool = False


@dataclass(eq=False, slots=True)
class Matcher:
    """A grammar's state after the tokens of one answer. The worker thread advances it.

    Attributes:
        compiled: the grammar.
        expert: name for error messages.
        ended: the answer is complete, and no token can follow.
        failed: the grammar exceeded its limits while it was matched; no answer that satisfies it can follow.
        state: a matcher of llguidance, of this answer alone.
    """

    compiled: Compiled
    vocabulary: Vocabulary
    expert: str
    ended: bool = False
    failed: bool = False
    _error: str = ""
    _n_whitespace: int = 0
    state: Any = field(init=False)
    _bits: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.compiled.state.deep_copy()
        self._bits = np.zeros((self.vocabulary.n_tokens + 31) // 32, dtype=np.int32)

    def allowed(self, eos: Collection[int]) -> NDArray[np.bool_]:
        """(n_tokens,) whether each token may come next; none if the grammar failed.

        Args:
            eos: tokens that end the answer, allowed where it may end.
        """
        self.state.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        n, end = self.vocabulary.n_tokens, self.vocabulary.end
        allowed = np.unpackbits(self._bits.view(np.uint8), count=n, bitorder="little").view(np.bool_)
        if self.state.is_error():
            self._fail(self.state.get_error())
            allowed[:] = False
            return allowed
        may_end, allowed[end] = allowed[end], False
        if may_end:
            allowed[list(eos)] = True
        if self._n_whitespace >= _MOST_WHITESPACE and (others := allowed & ~self.vocabulary.whitespace).any():
            return others
        return allowed

    def mask(self, scores: Tensor, eos: Collection[int]) -> None:
        """Set the scores (n_vocabulary,) of all tokens that must not come next to -inf, in place.

        If the grammar failed, the scores stay: `advance` reports it.
        """
        import torch

        allowed = self.allowed(eos)
        n = min(len(allowed), len(scores))
        if not allowed[:n].any():
            self._fail("no token can follow")
            return
        scores[:n].masked_fill_(torch.from_numpy(~allowed[:n]).to(scores.device), float("-inf"))
        scores[n:] = float("-inf")

    def advance(self, token: int, eos: Collection[int]) -> Rejected | None:
        """Add the next token of the answer; returns the error if the grammar failed: clients choose the schemas."""
        if not self.failed and token not in eos:
            if not self.state.consume_token(token):
                self._fail(self.state.get_error() or f"token {token} is not allowed")
            is_space = token < self.vocabulary.n_tokens and bool(self.vocabulary.whitespace[token])
            self._n_whitespace = self._n_whitespace + 1 if is_space else 0
            self.ended = self.state.is_stopped()
        if not self.failed:
            return None
        why = f"its JSON schema is too complex ({self._error}): use fewer optional properties and simpler patterns"
        if _DEAD_END in self._error:
            why = "its JSON schema has a part that no value satisfies, such as references in a loop"
        return Rejected(f"{self.expert!r} cannot continue an answer in the required format: {why}")

    def _fail(self, message: str) -> None:
        self.failed = self.compiled.failed = True
        self._error = self._error or one_line(message.partition("\n")[0], _MOST_MESSAGE)
