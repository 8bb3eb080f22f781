"""Surrogate pairs that a server splits over two pieces of JSON text."""

from __future__ import annotations


class Surrogates:
    """Joins pairs over the pieces of one text; lone ones are replaced, since no response can carry them."""

    def __init__(self) -> None:
        self._half = ""

    def joined(self, text: str) -> str:
        """The text with what the piece before held back; the first half of a pair at its end is held back."""
        if not text or (text.isascii() and not self._half):
            return text
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return _whole(text)

    def end(self) -> str:
        """What is held back, replaced: no text follows."""
        half, self._half = self._half, ""
        return "\ufffd" if half else ""


def _whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
