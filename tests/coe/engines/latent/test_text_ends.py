"""Ends of tokens in their text, against the bytes of the text, for tokenizers of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
from engine_models import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from other_tokenizer import make_piece_tokenizer

from coe.engines.latent.text_ends import TextEnds
from coe.errors import Unsupported

KINDS = {"bytes": make_tokenizer, "pieces": make_piece_tokenizer}
TEXTS = (
    "the end of the answer",
    " the  end ",
    "Zoë is 😀👩‍👩‍👧 the end",
    "e\u0301\u0302a",  # combining marks
    "a\r\nb\n\n c",
    "日本語 the",
    "\ufffd\ufffd the \ufffd",
    "",
)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {kind: make() for kind, make in KINDS.items()}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def bytes_of(tokenizer: Any, token: int) -> int:
    """Bytes of the text that a token stands for."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece.startswith("<0x"):
        return 1
    return len(piece.replace("▁", " ").encode()) if "<pad>" in tokenizer.get_vocab() else len(piece)


def brute(tokenizer: Any, ids: list[int], text: str) -> tuple[list[int], list[int]]:
    """Characters that are complete, and that are begun, after each token: counted in bytes."""
    ends, n = [], 0
    for character in text:
        n += len(character.encode())
        ends.append(n)
    complete, begun, at = [], [], 0
    for token in ids:
        at += bytes_of(tokenizer, token)
        complete.append(sum(end <= at for end in ends))
        begun.append(complete[-1] + (at not in (0, *ends)))
    return complete, begun


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ends_are_those_of_the_bytes(tokenizers: dict[str, Any], kind: str, text: str) -> None:
    check(tokenizers[kind], text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("the end\n😀\u0301")), max_size=24))
def test_ends_of_any_text(tokenizers: dict[str, Any], kind: str, text: str) -> None:
    check(tokenizers[kind], text)


def check(tokenizer: Any, text: str) -> None:
    ids = ids_of(tokenizer, text)
    if tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text:
        return  # such as a text that holds the mark for spaces
    ends = TextEnds.of(tokenizer, ids, text)
    complete, begun = brute(tokenizer, ids, text)
    if "\ufffd" not in text:
        assert ends.given.tolist() == complete
        assert ends.read.tolist() == begun
    # What was given is never more, and what was read never less, even where decoding is ambiguous.
    assert all(mine <= own for mine, own in zip(ends.given.tolist(), complete, strict=True))
    assert all(mine >= own for mine, own in zip(ends.read.tolist(), begun, strict=True))
    if ids:
        assert ends.given[-1] == ends.read[-1] == len(text)


def test_a_character_of_several_tokens_is_given_with_its_last_and_read_with_its_first(
    tokenizers: dict[str, Any],
) -> None:
    for tokenizer in tokenizers.values():
        ends = TextEnds.of(tokenizer, ids_of(tokenizer, "x😀y"), "x😀y")
        assert ends.given.tolist() == [1, 1, 1, 1, 2, 3]
        assert ends.read.tolist() == [1, 2, 2, 2, 2, 3]


def test_tokens_that_do_not_decode_to_the_text_take_the_characters_that_the_tokenizer_states() -> None:
    tokenizer = make_tokenizer()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    text = "THE End x"
    ends = TextEnds.of(tokenizer, ids_of(tokenizer, text), text)
    plain = TextEnds.of(tokenizer, ids_of(tokenizer, text.lower()), text.lower())
    assert ends.given.tolist() == plain.given.tolist()
    assert all(a >= b for a, b in zip(ends.read.tolist(), plain.read.tolist(), strict=True))


def test_tokens_of_another_text_are_refused(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="not those of the text"):
        TextEnds.of(tokenizers["bytes"], ids_of(tokenizers["bytes"], "the end"), "the answer")
