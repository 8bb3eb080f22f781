"""JSON bodies: of a request, parsed within bounds on depth and number of values; of an answer, always encodable.

A parser blocks the event loop until the whole body is parsed, so the body is measured first. Without its strings, a
JSON text is brackets, commas, colons and literals: counting those takes a fraction of the time of parsing them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any, Final, NoReturn

from pydantic_core import from_json
from starlette.responses import JSONResponse

from coe.errors import InvalidRequest
from registry.json_text import LongNumber, loads

MOST_VALUES: Final = 50_000
"""Most values of a body, field names included."""
MOST_LEVELS: Final = 100
"""Most levels of arrays and objects inside each other."""
MOST_LITERAL_BYTES: Final = 2**20
"""Most bytes outside of strings and white space: long numbers take much time each."""
STEP_BYTES: Final = 64 * 1024
"""Bytes that are checked at once: half a millisecond, whatever they hold."""
_CUT: Final = "EOF while parsing"
"""Begins the error of `from_json` for a text that ends too early, which `json.loads` does not read either."""
_BLANKS: Final = (b" ", b"\t", b"\r", b"\n")
_BRACKET: Final = re.compile(rb"[\[\]{}]")
_OPENING: Final = bytes.maketrans(b"[]{}", b"()()")
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


class JsonBody(JSONResponse):
    """A JSON answer. Lone surrogates, which an expert's answer may hold and UTF-8 cannot, are sent as `?`."""

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def parse_json(body: bytes) -> object:
    """A JSON value; see `parsing`."""
    steps = parsing(body)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def parsing(body: bytes) -> Generator[None, None, object]:
    """Parse a body in steps: the generator returns its JSON value. Checking the bounds of a large body takes longer
    than parsing it, so a step checks `STEP_BYTES` of it.

    Raises:
        InvalidRequest: the body is not JSON in UTF-8 (with the position of the error), or exceeds a bound.
    """
    structure = _Structure()
    if len(body) > STEP_BYTES:
        for start in range(0, len(body), STEP_BYTES):
            structure.add(body[start : start + STEP_BYTES])
            yield
        structure.end()
    elif _elements(body) >= MOST_VALUES or _opening(body) > MOST_LEVELS:
        structure.add(body)
        structure.end()
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")  # 2 to 10 times as fast as json.loads
    except ValueError as error:
        refused = str(error)
    yield
    if len(body) > STEP_BYTES and refused.startswith(_CUT):
        raise InvalidRequest(f"the body is not valid JSON: {refused}")
    return _parse_exactly(body)


def _parse_exactly(body: bytes) -> object:
    """The value of what `from_json` refuses: lone surrogates, which the field's own error names, or the error."""
    try:
        return loads(body.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError:
        raise _too_deep() from None
    except LongNumber as error:
        raise InvalidRequest(str(error)) from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error


def _elements(text: bytes) -> int:
    """At least the number of values and field names, less one."""
    return text.count(b",") + text.count(b":") + _opening(text)


def _opening(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


class _Structure:
    """What of a JSON text is outside of its strings, read in pieces. Text that is not JSON gives bytes without meaning.

    Each method raises InvalidRequest beyond a bound.
    """

    def __init__(self) -> None:
        self._in_string = False
        self._escape = b""  # a backslash at the end of the last piece, whose other half is in the next one
        self._n_quotes = self._n_elements = self._n_bytes = 0
        self._brackets: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Read the next piece."""
        outside = self._outside(self._escape + piece)
        if b"[" * (MOST_LEVELS + 1) in outside:
            raise _too_deep()
        self._n_elements += _elements(outside)
        if self._n_elements >= MOST_VALUES or self._n_quotes > 2 * MOST_VALUES:
            raise _too_many()
        self._n_bytes += len(outside) - sum(map(outside.count, _BLANKS))
        if self._n_bytes > MOST_LITERAL_BYTES:
            raise InvalidRequest(f"the body has more than {MOST_LITERAL_BYTES:,} bytes of numbers and punctuation")
        if _BRACKET.search(outside):
            self._brackets.append(outside.translate(_OPENING, _NOT_BRACKETS))

    def end(self) -> None:
        """Check the last string, and the levels of arrays and objects."""
        if self._in_string:
            raise InvalidRequest("the body is not valid JSON: its last string has no end")
        brackets = b"".join(self._brackets)
        for _ in range(MOST_LEVELS):  # each pass removes the innermost level
            if b"()" not in brackets:
                break
            brackets = brackets.replace(b"()", b"")
        if b"()" in brackets or b"(" * (MOST_LEVELS + 1) in brackets:
            raise _too_deep()

    def _outside(self, piece: bytes) -> bytes:
        self._escape = b""
        if piece.endswith(b"\\"):
            n_last = len(piece) - len(piece.rstrip(b"\\"))
            piece, self._escape = piece[: len(piece) - n_last], b"\\" * (n_last % 2)
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        n_quotes = piece.count(b'"')
        self._n_quotes += n_quotes
        began_inside, self._in_string = self._in_string, self._in_string ^ (n_quotes % 2 == 1)
        if self._n_quotes > 2 * MOST_VALUES:
            return b""
        return b"".join(piece.split(b'"')[began_inside::2])


def _too_many() -> InvalidRequest:
    return InvalidRequest(f"the body has more than {MOST_VALUES:,} values, field names included")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested too deeply: more than {MOST_LEVELS} levels of arrays and objects")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
