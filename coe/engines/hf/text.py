"""Tokens to text as they are generated: whole characters only, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

_UNFINISHED: Final = "\ufffd"
"""What a decoder returns for bytes that are not (yet) a whole UTF-8 character."""
_WINDOW: Final = 64
"""Tokens without a character boundary after which their bytes count as invalid."""


class TextStream:
    """Incremental detokenisation of one answer.

    Each step decodes only a window of recent tokens. It includes the tokens of the previous step as context, since
    SentencePiece tokenizers decode the first token of a text differently from later ones. All pieces joined equal the
    complete answer decoded at once, up to the first stop string.

    Args:
        decode: token ids -> text, special tokens left out.
        stop: strings that end the answer, and are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._window: list[int] = []  # context tokens, then those whose text is not complete
        self._n_context = 0
        self._taken = 0  # characters of the window's text that are already in `_held` or out
        self._held = ""  # complete characters that may be the start of a stop string
        self.stopped = False

    @property
    def watches(self) -> bool:
        """Whether there are stop strings, so that every token must be decoded."""
        return bool(self._stop)

    def push(self, token: int) -> None:
        """Add a token."""
        self._window.append(token)

    def take(self, *, last: bool = False) -> str:
        """The text that may be shown now; sets `stopped` if a stop string is complete.

        Args:
            last: no tokens follow: return what was held back, unfinished characters included.
        """
        if self.stopped:
            return ""
        self._held += self._decode_new(last)
        if (cut := self._find_stop()) is not None:
            self.stopped = True
            shown, self._held = self._held[:cut], ""
            return shown
        keep = 0 if last else self._n_maybe_stop()
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def _decode_new(self, last: bool) -> str:
        if len(self._window) == self._n_context:
            return ""
        text = self._decode(self._window)
        complete = text.rstrip(_UNFINISHED)
        if last or len(self._window) - self._n_context > _WINDOW:
            complete = text
        new = complete[self._taken :]
        self._taken = max(self._taken, len(complete))
        if len(complete) == len(text):
            self._window = self._window[self._n_context :]
            self._n_context = len(self._window)
            self._taken = len(self._decode(self._window))
        return new

    def _find_stop(self) -> int | None:
        return min((at for at in map(self._held.find, self._stop) if at >= 0), default=None)

    def _n_maybe_stop(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
