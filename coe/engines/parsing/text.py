"""Tokens to text as they are generated: whole characters only, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

_UNFINISHED: Final = "\ufffd"
"""What a decoder returns for bytes that are not (yet) a whole UTF-8 character."""
_MOST_UNFINISHED: Final = 64
"""Characters at the end that may be unfinished; with more of them, their bytes count as invalid."""
_MOST_BYTES_LEFT: Final = 3
"""Bytes of a UTF-8 character without its last one, and so the tokens after the last whole character."""
_MARKS: Final = range(0xDC00, 0xE000)
"""Code points that no decoded text contains (lone surrogates): each stands for a special token of a stop string."""


class Detokenizer:
    """Incremental detokenisation of one answer.

    Each step decodes only a window of recent tokens. It includes the tokens of the previous step as context, since
    SentencePiece tokenizers decode the first token of a text differently from later ones. All pieces joined equal the
    complete answer decoded at once.

    Args:
        decode: token ids -> text, special tokens left out.
        after: the last tokens of the prompt that the answer continues; their text is not part of it.
        inserted: texts for tokens that `decode` leaves out.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        after: Sequence[int] = (),
        inserted: Mapping[int, str] | None = None,
    ) -> None:
        self._decode = decode
        self._inserted = inserted or {}
        self._window = list(after)  # context tokens, then those whose text is not complete
        self._n_context = len(self._window)
        # characters of the window's text that are already in `_ready` or out
        self._taken = len(self._decode(self._window).rstrip(_UNFINISHED)) if after else 0
        self._ready = ""

    def push(self, token: int) -> None:
        """Add a token."""
        if (text := self._inserted.get(token)) is not None:
            self._ready += self._decode_new(last=False) + text
        else:
            self._window.append(token)

    def take(self, *, last: bool = False) -> str:
        """The new text; `last`: no tokens follow, so unfinished characters are included."""
        new, self._ready = self._ready + self._decode_new(last), ""
        return new

    def _decode_new(self, last: bool) -> str:
        if len(self._window) == self._n_context:
            return ""
        text = self._decode(self._window)
        complete = text.rstrip(_UNFINISHED)
        if last or len(text) - len(complete) > _MOST_UNFINISHED:
            complete = text
        n_left = 0 if len(complete) == len(text) else self._tokens_left()
        if n_left:
            complete = self._decode(self._window[:-n_left])
        new = complete[self._taken :]
        self._taken = max(self._taken, len(complete))
        if n_left or len(complete) == len(text):
            self._window = self._window[self._n_context :]
            self._n_context = len(self._window) - n_left
            self._taken = len(self._decode(self._window[: self._n_context]))
        return new

    def _tokens_left(self) -> int:
        """New tokens after the last whole character; 0 if that is not found among the last few.

        Without it, a window that never happens to end with a character would grow for the length of the answer.
        """
        for n in range(1, min(_MOST_BYTES_LEFT + 1, len(self._window) - self._n_context)):
            if not self._decode(self._window[:-n]).endswith(_UNFINISHED):
                return n
        return 0


class StopStrings:
    """Ends a text before the first stop string. Text that may be the start of one is held back.

    A stop string may contain the text of special tokens, which is never shown. Each token is matched as a whole:
    neither `|` nor `start` stops at `<|im_start|>`. A stop string without special tokens is matched in the shown text.

    Args:
        stop: strings that end the answer, and are not part of it.
        special: texts of special tokens by id.

    Attributes:
        marks: what stands in the text for each special token of a stop string.
    """

    def __init__(self, stop: Sequence[str] = (), special: Mapping[int, str] | None = None) -> None:
        self._stop = tuple(stop)
        self.marks, self._marked_stop = _mark(self._stop, special or {})
        self._held = ""  # text and marks that may be the start of a stop string
        self.stopped = False

    def __bool__(self) -> bool:
        return bool(self._stop)

    def take(self, new: str, *, last: bool = False, search: bool = True) -> str:
        """Add text, and take what may be shown now; see `TextStream.take`."""
        if self.stopped:
            return ""
        if not self._stop:
            return new
        self._held += new
        if not search:
            shown, self._held = self._held, ""
            return self._visible(shown)
        if (cut := self._find_stop()) is not None:
            self.stopped = True
            shown, self._held = self._held[:cut], ""
            return self._visible(shown)
        split = len(self._held) if last else self._maybe_stop_from()
        shown, self._held = self._held[:split], self._held[split:]
        return self._visible(shown)

    def _find_stop(self) -> int | None:
        """Where the first stop string begins in the held text."""
        if not self.marks:
            return min((at for at in map(self._held.find, self._stop) if at >= 0), default=None)
        shown = self._visible(self._held)
        found = [self._place(at) for at in map(shown.find, self._stop) if at >= 0]
        found += [at for at in map(self._held.find, self._marked_stop) if at >= 0]
        return min(found, default=None)

    def _maybe_stop_from(self) -> int:
        """Where the longest suffix of the held text begins that is a prefix of a stop string."""
        if not self.marks:
            return len(self._held) - _overlap(self._held, self._stop)
        shown = self._visible(self._held)
        in_shown = self._place(len(shown) - _overlap(shown, self._stop))
        return min(in_shown, len(self._held) - _overlap(self._held, self._marked_stop))

    def _visible(self, text: str) -> str:
        return without_marks(text) if self.marks else text

    def _place(self, n_shown: int) -> int:
        """Index in the held text of its character number `n_shown` that is shown."""
        places = [i for i, c in enumerate(self._held) if ord(c) not in _MARKS]
        return places[n_shown] if n_shown < len(places) else len(self._held)


class TextStream:
    """The text of one answer as its tokens come, up to the first stop string: `Detokenizer`, then `StopStrings`.

    Args:
        decode, after: of the `Detokenizer`. stop, special: of the `StopStrings`.
        kept: texts of special tokens that are part of the text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        special: Mapping[int, str] | None = None,
        after: Sequence[int] = (),
        kept: Mapping[int, str] | None = None,
    ) -> None:
        self.stops = StopStrings(stop, special)
        self.tokens = Detokenizer(decode, after, {**(kept or {}), **self.stops.marks})

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.stops.stopped

    @property
    def watches(self) -> bool:
        """Whether there are stop strings, so that every token must be decoded."""
        return bool(self.stops)

    def push(self, token: int) -> None:
        """Add a token."""
        self.tokens.push(token)

    def push_end(self, token: int) -> None:
        """Add a token that ends the answer: its text is matched with the stop strings, but not shown."""
        if token in self.stops.marks:
            self.tokens.push(token)

    def take(self, *, last: bool = False, search: bool = True) -> str:
        """The text that may be shown now; sets `stopped` if a stop string is complete.

        Args:
            last: no tokens follow: return what was held back, unfinished characters included.
            search: False if the text up to here cannot stop the answer.
        """
        return "" if self.stopped else self.stops.take(self.tokens.take(last=last), last=last, search=search)


def without_marks(text: str) -> str:
    """The text without what stands for special tokens of stop strings."""
    return "".join(c for c in text if ord(c) not in _MARKS)


class SpecialTokens:
    """Finds the special tokens of a vocabulary, which may be thousands, in stop strings.

    Args:
        texts: text of each token by its id.
    """

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._ids: dict[str, list[int]] = {}
        for token, text in texts.items():
            if text:
                self._ids.setdefault(text, []).append(token)
        self._lengths = sorted({len(text) for text in self._ids})

    def within(self, strings: Sequence[str]) -> dict[int, str]:
        """Id and text of the tokens whose text is in one of the strings."""
        parts = {s[i : i + n] for s in strings for i in range(len(s)) for n in self._lengths}
        return {token: text for text in parts & self._ids.keys() for token in self._ids[text]}


def _mark(stop: Sequence[str], special: Mapping[int, str]) -> tuple[dict[int, str], tuple[str, ...]]:
    """A mark for each special token that a stop string contains, and the stop strings that have some, with marks."""
    if not stop:
        return {}, ()
    texts = sorted({text for text in special.values() if text and any(text in s for s in stop)}, key=len, reverse=True)
    marks = dict(zip(texts, map(chr, _MARKS), strict=False))
    marked = list(stop)
    for text, mark in marks.items():
        marked = [each.replace(text, mark) for each in marked]
    by_token = {token: marks[text] for token, text in special.items() if text in marks}
    return by_token, tuple(new for new, old in zip(marked, stop, strict=True) if new != old)


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of a text that is a prefix of a stop string, and not a whole one."""
    longest = max((len(s) for s in stop), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(s.startswith(text[-n:]) for s in stop)), 0)
