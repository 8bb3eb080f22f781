"""TextStream: pieces are whole characters and never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coe.engines.parsing.text import SpecialTokens, TextStream


def decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def pieces(data: bytes, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream, out = TextStream(decode_bytes, stop), []
    for byte in data:
        stream.push(byte)
        out.append(stream.take())
        if stream.stopped:
            return out, True
    return [*out, stream.take(last=True)], False


def test_a_character_comes_out_when_its_last_byte_is_there() -> None:
    out, _ = pieces("a€🙂é".encode())
    assert out == ["a", "", "", "€", "", "", "", "🙂", "", "é", ""]


def test_a_character_cut_off_by_the_end_shows_as_unfinished() -> None:
    out, _ = pieces("a€".encode()[:-1])
    assert out == ["a", "", "", "\ufffd"]


def test_invalid_bytes_come_out_when_something_follows_or_after_a_while() -> None:
    assert "".join(pieces(b"\xff\xffab")[0]) == "\ufffd\ufffdab"
    out, _ = pieces(b"\xff" * 100)
    assert "".join(out) == "\ufffd" * 100
    assert out[64] == "\ufffd" * 65  # not held until the end


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_pieces_joined_are_the_text_decoded_at_once(data: bytes) -> None:
    assert "".join(pieces(data)[0]) == decode_bytes(list(data))


@given(st.lists(st.binary(max_size=30), max_size=12))
@settings(deadline=None)
def test_the_text_does_not_depend_on_when_it_is_taken(parts: list[bytes]) -> None:
    stream, out = TextStream(decode_bytes), []
    for part in parts:
        for byte in part:
            stream.push(byte)
        out.append(stream.take())
    assert "".join(out) + stream.take(last=True) == decode_bytes(list(b"".join(parts)))


@pytest.mark.parametrize("every", [3, 90])
def test_takes_that_never_meet_the_end_of_a_character_split_none_and_decode_few_tokens(every: int) -> None:
    decoded: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        decoded.append(len(tokens))
        return decode_bytes(tokens)

    stream, out = TextStream(decode), []
    for i, byte in enumerate(("日" * 400).encode()):
        stream.push(byte)
        if i % every == 1:
            out.append(stream.take())
    assert "".join(out) + stream.take(last=True) == "日" * 400
    assert not any("\ufffd" in piece for piece in out)
    assert max(decoded) <= 2 * every + 2


@pytest.mark.parametrize(
    ("stop", "shown", "stopped"),
    [
        (["END"], "so it ", True),
        (["it END", "xyz"], "so ", True),
        (["EN", "END"], "so it ", True),
        (["ENDE"], "so it END here", False),
        (["here", "re"], "so it END ", True),
        (["herein"], "so it END here", False),
    ],
)
def test_text_ends_before_the_first_stop_string_and_no_part_of_it_slips_out(
    stop: list[str], shown: str, stopped: bool
) -> None:
    out, ended = pieces(b"so it END here", stop)
    assert ("".join(out), ended) == (shown, stopped)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_stop_strings_cut_as_on_the_whole_text(text: str, stop: list[str]) -> None:
    cuts = [text.index(s) + len(s) for s in stop if s in text]
    out, stopped = pieces(text.encode(), stop)
    assert stopped == bool(cuts)
    read = text[: min(cuts, default=len(text))]  # generation ends with the first stop string that is complete
    assert "".join(out) == read[: min((read.index(s) for s in stop if s in read), default=len(read))]


def test_nothing_follows_a_stop_and_held_text_comes_at_the_end() -> None:
    stream = TextStream(decode_bytes, ["ab"])
    assert stream.watches
    for byte in b"xa":
        stream.push(byte)
    assert stream.take() == "x"
    assert stream.take(last=True) == "a"
    assert (stream.take(), stream.stopped) == ("", False)
    for byte in b"abc":
        stream.push(byte)
    assert (stream.take(), stream.stopped, stream.take(last=True)) == ("", True, "")
    assert not TextStream(decode_bytes).watches


def test_words_keep_their_spaces_with_a_tokenizer_that_drops_the_first() -> None:
    words = ["▁the", "▁end", "s", "▁here"]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ")

    stream, out = TextStream(decode), []
    for token in (0, 1, 2, 3):
        stream.push(token)
        out.append(stream.take())
    assert out == ["the", " end", "s", " here"]


@pytest.mark.parametrize("every", [1, 3])
def test_a_real_tokenizer_decodes_the_same_in_pieces(tokenizer: Any, every: int) -> None:
    text = "the answer: naïve 日本 🙂, end of the end"
    stream, out = TextStream(partial(tokenizer.decode, skip_special_tokens=True)), []
    for i, token in enumerate(tokenizer(text)["input_ids"]):
        stream.push(token)
        if i % every == 0:
            out.append(stream.take())
    assert "".join(out) + stream.take(last=True) == text
    assert len(out) > 3
    assert not any("\ufffd" in piece for piece in out)


SPECIAL = {256: "<|im_start|>", 257: "</s>", 258: "<|im_start|>x", 259: "<pad>"}


def answer(tokens: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
    """The text of bytes and special tokens, taken after every token."""
    stream = TextStream(lambda ids: decode_bytes([i for i in ids if i < 256]), stop, SPECIAL)
    out = ""
    for token in tokens:
        stream.push(token)
        out += stream.take()
        if stream.stopped:
            return out, True
    return out + stream.take(last=True), stream.stopped


@pytest.mark.parametrize(
    ("tokens", "stop", "shown"),
    [
        ([*b"hi", 256, *b"user"], ["<|im_start|>"], "hi"),
        ([*b"hi", 257], ["</s>"], "hi"),
        ([*b"hi\n", 256, *b"user"], ["\n<|im_start|>"], "hi"),
        ([*b"hi\n", 256, *b"user: x"], ["\n<|im_start|>user"], "hi"),
        ([*b"hi", 257, 256, *b"a"], ["</s><|im_start|>a"], "hi"),
        ([*b"hi", 258, *b"a"], ["<|im_start|>x"], "hi"),  # the longer token of two that begin alike
        ([*b"h", 259, *b"i", 259, 256], ["i<|im_start|>"], "h"),  # tokens that no stop string has do not count
        ([*b"a", 256, *b"b", 256, *b"c"], ["ab", "<|im_start|>c"], ""),  # what is shown has "ab"
        ([*b"<|im_", *b"start|>x"], ["<|im_start|>"], ""),  # the same characters, written out
        ([*b"so", *"é".encode(), 257], ["</s>"], "soé"),
    ],
)
def test_a_stop_string_may_have_special_tokens(tokens: list[int], stop: list[str], shown: str) -> None:
    assert answer(tokens, stop) == (shown, True)


@pytest.mark.parametrize(
    ("tokens", "stop", "shown"),
    [
        ([*b"a", 256, *b"b"], ["|", "start", "<", ">b", "</s>"], "ab"),
        ([*b"a", 256, *b"b"], ["<|im_start|>c", "x<|im_start|>"], "ab"),
        ([*b"a\n", 256, *b"us", 257, *b"er"], ["\n<|im_start|>user</s>"], "a\nuser"),
        ([0xC3, 256, 0xA9, *b"!"], ["<|im_start|>?"], "é!"),  # a character around a special token
        ([256, 257, 259], ["<|im_start|></s>?"], ""),
    ],
)
def test_special_tokens_are_never_shown_and_stop_only_as_a_whole(
    tokens: list[int], stop: list[str], shown: str
) -> None:
    assert answer(tokens, stop) == (shown, False)


@given(st.lists(st.sampled_from([*b"ab|", 256, 257, 259]), max_size=24), st.lists(st.integers(0, 6), max_size=3))
@settings(deadline=None)
def test_stop_strings_with_special_tokens_cut_as_on_the_whole_answer(tokens: list[int], chosen: list[int]) -> None:
    """The reference: each special token as one character of its own; those that no stop string has do not count."""
    strings = ["a", "ab", "</s>", "b<|im_start|>", "<|im_start|>a", "a</s>b", "</s><|im_start|>"]
    stop = [strings[i] for i in chosen]

    def reduced(string: str) -> str:
        return string.replace("<|im_start|>", "S").replace("</s>", "E")

    counted = {256: "S", 257: "E"}
    symbols = [chr(t) if t < 256 else counted.get(t, "") for t in tokens]
    symbols = [each for each in symbols if each not in "SE" or each in "".join(map(reduced, stop))]
    expected, stopped = "", False
    for n in range(len(symbols) + 1):
        raw = "".join(symbols[:n])
        shown = raw.replace("S", "").replace("E", "")
        cuts = [len(raw[: raw.index(r)].replace("S", "").replace("E", "")) for s in stop if (r := reduced(s)) in raw]
        cuts += [shown.index(s) for s in stop if reduced(s) == s and s in shown]
        expected, stopped = shown, bool(cuts)
        if cuts:
            expected = shown[: min(cuts)]
            break
    assert answer(tokens, stop) == (expected, stopped)


def test_special_tokens_are_found_in_stop_strings_however_many_there_are() -> None:
    many = {i: f"<unused{i}>" for i in range(10_000)}
    found = SpecialTokens(many | SPECIAL | {7: "", 8: "</s>"})
    assert found.within(["\n<|im_start|>x", "a<unused4097></s>"]) == {
        256: "<|im_start|>",
        258: "<|im_start|>x",
        4097: "<unused4097>",
        257: "</s>",
        8: "</s>",
    }
    assert found.within(["unused", ""]) == found.within([]) == {}


def test_an_end_token_is_matched_but_not_shown() -> None:
    stream = TextStream(decode_bytes, ["d</s>"], SPECIAL)
    for byte in b"end":
        stream.push(byte)
    assert stream.take() == "en"
    stream.push_end(257)
    assert (stream.take(last=True), stream.stopped) == ("", True)
    plain = TextStream(decode_bytes, ["x"], SPECIAL)
    plain.push(ord("a"))
    plain.push_end(257)
    assert (plain.take(last=True), plain.stopped) == ("a", False)
