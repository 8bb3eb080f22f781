"""JSON text: whole numbers with too many digits are named with their place."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest

from registry.json_text import LongNumber, loads

MOST = sys.get_int_max_str_digits()
LONG = "1" * (MOST + 1)


@pytest.mark.parametrize(
    "text", ["1", '{"a": [1.5, -2, null, true, "x"]}', "[]", '"1e400"', "1" * MOST, "-" + "1" * MOST, "1e5000"]
)
def test_values_are_those_of_json(text: str) -> None:
    assert loads(text) == json.loads(text) and loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (LONG, ""),
        (f"-{LONG}", ""),
        (f'{{"seed": {LONG}}}', "seed: "),
        (f'{{"a": {{"b": [0, {{"c d": {LONG}}}]}}, "e": {LONG[1:]}}}', "a.b[1].c d: "),
        (f"[[[{LONG}]]]", "[0][0][0]: "),
        (f'{{"\\u001b[31m": {LONG}}}', "?[31m: "),
        (f'{{"{"k" * 200}": {LONG}}}', "k" * 77 + "...: "),
    ],
)
def test_a_long_number_is_named_with_its_place(text: str, place: str) -> None:
    with pytest.raises(LongNumber) as error:
        loads(text)
    assert str(error.value) == f"{place}a whole number of {MOST + 1:,} digits; at most {MOST:,} are read: " + (
        "shorten it, or put it in quotes as text"
    )


@pytest.mark.parametrize("text", ["", "{", "[1,]", "nul", f"[{LONG}", f"{LONG}x"])
def test_what_is_no_json_is_the_error_of_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|Extra data|Unterminated|delimiter|Illegal|a whole number"):
        loads(text)


def test_hooks_are_used_and_their_errors_stay() -> None:
    def refuse(pairs: list[tuple[str, Any]]) -> Any:
        raise ValueError("twice")

    assert loads('{"a": 1.5}', parse_float=str, object_pairs_hook=list) == [("a", "1.5")]
    with pytest.raises(ValueError, match="twice"):
        loads('{"a": 1}', object_pairs_hook=refuse)
    with pytest.raises(ValueError, match="twice"):
        loads(f'{{"a": {LONG}}}', object_pairs_hook=refuse)


def test_many_long_numbers_take_little_time() -> None:
    started = time.monotonic()
    with pytest.raises(LongNumber):
        loads("[" + ",".join(["9" * 100_000] * 40) + "]")
    assert time.monotonic() - started < 5
