"""Text that grows token by token, against the whole text, for tokenizers of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
from engine_models import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from other_tokenizer import make_piece_tokenizer

from coe.engines.latent.growing_text import GrowingText, n_common
from coe.engines.latent.text_ends import TextEnds

KINDS = {"bytes": make_tokenizer(), "pieces": make_piece_tokenizer()}
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("the end\n😀\u0301")), max_size=24)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_it_grows_to_the_whole_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = ids_of(tokenizer, text)
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        return  # such as a text that holds the mark for spaces
    ends, growing = TextEnds.of(tokenizer, ids, text), GrowingText(tokenizer)
    for i, token in enumerate(ids):
        growing.push(token)
        if "\ufffd" not in text:
            assert growing.text == text[: ends.given[i]]
            assert growing.spans(i) == [tuple(ends.spans(0)[i].tolist())]
    assert growing.tokens == ids
    assert "\ufffd" in text or growing.text == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=TEXTS, other=TEXTS, n=st.integers(0, 30))
def test_tokens_that_are_dropped_leave_nothing(kind: str, text: str, other: str, n: int) -> None:
    tokenizer = KINDS[kind]
    growing, fresh = GrowingText(tokenizer), GrowingText(tokenizer)
    ids = ids_of(tokenizer, text)
    for token in ids:
        growing.push(token)
    growing.crop(min(n, len(ids)))
    for token in ids[:n]:
        fresh.push(token)
    for token in ids_of(tokenizer, other):
        growing.push(token)
        fresh.push(token)
    assert (growing.text, growing.tokens, growing.spans()) == (fresh.text, fresh.tokens, fresh.spans())


def test_a_character_is_in_the_text_with_its_last_token() -> None:
    for tokenizer in KINDS.values():
        growing, texts = GrowingText(tokenizer), []
        for token in ids_of(tokenizer, "x😀y"):
            growing.push(token)
            texts.append(growing.text)
        assert texts == ["x", "x", "x", "x", "x😀", "x😀y"]
        assert growing.spans()[1:5] == [(1, 2)] * 4


def test_bytes_that_are_no_character_become_text_in_the_end() -> None:
    tokenizer = KINDS["bytes"]
    start = ids_of(tokenizer, "😀")[0]
    growing = GrowingText(tokenizer)
    for _ in range(9):
        growing.push(start)
    assert growing.text == "\ufffd" * 8
    for token in ids_of(tokenizer, "the"):
        growing.push(token)
    assert growing.text.endswith("the")


def test_common_tokens_are_counted() -> None:
    assert n_common([], [1]) == 0
    assert n_common([1, 2, 3], [1, 2]) == 2
    assert n_common([1, 2, 3], [1, 5, 3]) == 1
