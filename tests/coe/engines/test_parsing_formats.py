"""Answers in every format: text, reasoning and calls are the same whole, and streamed in any division."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coe.chunks import Joined
from coe.engines.answer import AnswerStream
from coe.engines.parsing.formats import CALLS, REASONING, calls_of, detected
from coe.engines.parsing.parser import MOST_CALLS, AnswerParser
from coe.engines.parsing.response_format import ResponseFormat
from coe.engines.parsing.text import TextStream
from coe.errors import TemplateError
from coe.types import Answer, Chunk, GenerateRequest, Usage
from routers.base import Message

PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}, "city": {"type": "string"}}}
TOOLS = tuple({"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("w", "v"))
MARKS = {each.name: " ".join(each.marks) for each in reversed(CALLS)}
HERMES = MARKS["hermes"] + " </think>"
HARMONY_CALL = "<|start|>assistant<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
THOUGHT = "<|channel|>analysis<|message|>So.<|end|>"

ONE, TWO = [("w", {"n": 1})], [("w", {"n": 1}), ("v", {"city": "Köln 🙂"})]
CASES: list[tuple[str, str, str, str, list[Any]]] = [
    # format, answer, text, reasoning, calls
    ("hermes", '<tool_call>\n{"name": "w", "arguments": {"n": 1}}\n</tool_call>', "", "", ONE),
    (
        "hermes",
        '<tool_call>{"name": "w", "arguments": {"n": 1}}</tool_call>\n'
        '<tool_call>{"name": "v", "arguments": {"city": "Köln 🙂"}}</tool_call>',
        "",
        "",
        TWO,
    ),
    ("hermes", 'Let me see.\n\n<tool_call>{"name": "w", "arguments": {"n": 1}}</tool_call>\n', "Let me see.", "", ONE),
    ("hermes", '<tool_call>{"name": "w", "arguments": {"n": 1}}', "", "", ONE),  # its end token closes it
    ("hermes", '<tool_call>{"name": "w", "arguments": "{\\"n\\": 1}"}</tool_call>', "", "", ONE),
    ("hermes", '<tool_call>{"name": "w"}</tool_call> Done', "Done", "", [("w", {})]),
    ("hermes", '<think>\nhm <tool_call>{"name": "w"}</tool_call>\n</think>\n\nHi', "Hi", "", []),
    ("hermes", 'a <tool_call>{"name": w}</tool_call> b\n', 'a <tool_call>{"name": w}</tool_call> b\n', "", []),
    ("hermes", 'a <tool_call>{"name": "w", "arg', 'a <tool_call>{"name": "w", "arg', "", []),
    ("hermes", '<tool_call>{"name": "w", "arguments": {"n": NaN}}</tool_call>', None, "", []),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', None, "", []),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": "w", "arguments": [1]}</tool_call>', None, "", []),  # type: ignore[list-item]
    ("hermes", "a < b, <tool and <tool_calls>", "a < b, <tool and <tool_calls>", "", []),
    (
        "hermes",
        '<tool_call>{"name": "w", "arguments": {"city": "a\nb\tc"}}</tool_call>',
        "",
        "",
        [("w", {"city": "a\nb\tc"})],
    ),
    (
        "hermes",
        '<tool_call>{"name": "w", "arguments": "{\\"city\\": \\"a\nb\\"}"}</tool_call>',
        "",
        "",
        [("w", {"city": "a\nb"})],
    ),
    ("hermes", '<tool_call>{"name": "w", "arguments": ""}</tool_call>', "", "", [("w", {})]),
    (
        "hermes",
        '<tool_call>{"name": "w", "arguments": {"city": "a\\ud83d"}}</tool_call>',
        "",
        "",
        [("w", {"city": "a?"})],
    ),
    ("hermes", '<tool_call>{"name": "w", "arguments": {"n": 1e999}}</tool_call>', None, "", []),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": "w", "arguments": {"n": -1e999}}</tool_call>', None, "", []),  # type: ignore[list-item]
    ("hermes", 'One.\n<tool_call>{"name": "w"}</tool_call>\n\nTwo.\n', "One.\nTwo.", "", [("w", {})]),
    ("hermes", '<tool_call>{"name": "w"}</tool_call>\n\nTwo.\n', "Two.", "", [("w", {})]),
    ("qwen-xml", "<tool_call>\n<function=w>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>", "", "", ONE),
    (
        "qwen-xml",
        "Hm.\n<tool_call><function=w><parameter=n>1</parameter></function></tool_call>\n"
        "<tool_call><function=v><parameter=city>Köln 🙂</parameter></function></tool_call>",
        "Hm.",
        "",
        TWO,
    ),
    (
        "qwen-xml",
        "<tool_call><function=w><parameter=n>1e999</parameter></function></tool_call>",
        "",
        "",
        [("w", {"n": "1e999"})],
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "w", "arguments": {"n": 1}}]', "", "", ONE),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "w", "arguments": {"n": 1}}, {"name": "v", "arguments": {"city": "K\\u00f6ln 🙂"}}]',
        "",
        "",
        TWO,
    ),
    ("mistral", 'Hm. [TOOL_CALLS]w[ARGS]{"n": 1}[TOOL_CALLS]v[CALL_ID]aB3[ARGS]{"city": "Köln 🙂"}', "Hm.", "", TWO),
    ("mistral", "[TOOL_CALLS] w(1)", "[TOOL_CALLS] w(1)", "", []),
    ("llama3", '{"name": "w", "parameters": {"n": 1}}', "", "", ONE),
    ("llama3", '\n<|python_tag|>{"name": "w", "parameters": {"n": 1}}', "", "", ONE),
    ("llama3", '{"name": "w", "parameters": {"n": 1}}; {"name": "v", "parameters": {"city": "Köln 🙂"}}', "", "", TWO),
    ("llama3", '{"name": "w", "parameters": {"n": 1}}\nThat is it.', "That is it.", "", ONE),
    ("llama3", '{"answer": 4}', '{"answer": 4}', "", []),
    ("llama3", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', "", []),
    ("llama3", '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', "", []),
    ("llama3", '<|python_tag|>{"name": "other", "parameters": {}}', "", "", [("other", {})]),
    ("llama3", '{"type": "function", "function": "w", "parameters": {"n": 1}}', "", "", ONE),
    ("llama3", 'As JSON: {"name": "w", "parameters": {}}', 'As JSON: {"name": "w", "parameters": {}}', "", []),
    ("harmony", HARMONY_CALL.format("w", '{"n": 1}'), "", "", ONE),
    (
        "harmony",
        THOUGHT + HARMONY_CALL.format("w", '{"n": 1}') + HARMONY_CALL.format("v", '{"city": "Köln 🙂"}'),
        "",
        "So.",
        TWO,
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Hi",
        "Hi",
        "So.",
        [],
    ),
    (
        "harmony",
        "<|channel|>commentary<|message|>I look it up.<|end|>"
        + "<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}<|return|>",
        "I look it up.\n{}",
        "",
        [],
    ),
]
REASONED = "hm <tool_call>" + '{"name": "w"}</tool_call>'
CASES = [(f, a, a if text is None else text, REASONED if "<think>" in a else r, c) for f, a, text, r, c in CASES]


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest((Message("user", "?"),), **{"tools": TOOLS} | fields)


def marks(name: str) -> str:
    return HERMES if name == "hermes" else MARKS[name]


def parse(answers: ResponseFormat | None, pieces: Iterable[str], prompt: str = "", **fields: Any) -> Answer:
    assert answers is not None
    parser = AnswerParser(answers, request(**fields), prompt, expert="e")
    joined = Joined()
    for piece in pieces:
        for chunk in parser.feed(piece):
            joined.add(chunk)
    for chunk in parser.finish():
        joined.add(chunk)
    return joined.answer("e", Chunk("", "stop", Usage(0, 0)))


def parts(answer: Answer) -> tuple[str, str, list[Any]]:
    return answer.text, answer.reasoning, [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


@pytest.mark.parametrize(("name", "answer", "text", "reasoning", "calls"), CASES)
def test_an_answer_whole_and_in_every_division_in_two(
    name: str, answer: str, text: str, reasoning: str, calls: list[Any]
) -> None:
    answers = ResponseFormat.of(marks(name))
    whole = parse(answers, [answer])
    assert parts(whole) == (text, reasoning, calls)
    assert parse(answers, answer) == whole
    for cut in range(1, len(answer)):
        assert parse(answers, [answer[:cut], answer[cut:]]) == whole


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_any_text_in_any_division_is_the_same(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([each.name for each in CALLS]))
    bits = [part for mark in CALLS for part in mark.marks] + [
        "</tool_call>",
        "<think>",
        "</think>",
        "[ARGS]",
        '{"name":',
    ]
    bits += ['"w"', "}", "[", "]", "\n", " ", "é", '"arguments": {}', "<|end|>", "<", "`", '{"name": "w"}', ";"]
    answer = "".join(data.draw(st.lists(st.sampled_from(bits), max_size=14)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    answers = ResponseFormat.of(marks(name))
    assert parse(answers, pieces) == parse(answers, [answer])


@pytest.mark.parametrize("each", REASONING, ids=lambda each: each.name)
def test_reasoning_streams_and_its_marks_are_in_no_text(each: Any) -> None:
    answers = ResponseFormat.of(each.marks[0])
    assert answers is not None
    answer = f"{each.name}\nFirst, {each.marks[0]}\n\nSo: it is.\n"
    assert parts(parse(answers, answer)) == ("So: it is.\n", "First,", [])
    parser = AnswerParser(answers, request(), "", expert="e")
    shown = [chunk.reasoning for piece in (each.name, "First, ", "then ", "x") for chunk in parser.feed(piece)]
    assert "".join(shown) == "First, then x"


def test_a_prompt_that_opens_or_closes_reasoning() -> None:
    answers = ResponseFormat.of(HERMES)
    assert parts(parse(answers, "so\n</think>\n\nHi", "<|im_start|>assistant\n<think>\n")) == ("Hi", "so", [])
    assert parts(parse(answers, "Hi", "<|im_start|>assistant\n<think>\n\n</think>\n\n")) == ("Hi", "", [])
    assert parts(parse(answers, "Hi", "What is <think>?\n<|im_start|>assistant\n")) == ("Hi", "", [])


def test_marks_in_quotes_are_text_and_reasoning_that_does_not_end_is_no_text() -> None:
    answers = ResponseFormat.of(HERMES)
    quoted = "Write `<think>` or '<think>' first."
    assert parts(parse(answers, quoted)) == (quoted, "", [])
    assert parts(parse(answers, "<think>and so on")) == ("", "and so on", [])
    assert parts(parse(answers, "<think>a</think>b<think>c</think>d")) == ("bd", "a\nc", [])


def test_without_offered_tools_a_call_is_text_and_reasoning_is_not() -> None:
    answers = ResponseFormat.of(HERMES)
    call = '<tool_call>{"name": "w"}</tool_call>'
    for fields in ({"tools": ()}, {"tool_choice": "none"}):
        assert parts(parse(answers, f"<think>a</think>{call}", **fields)) == (call, "a", [])


def test_one_call_if_the_request_allows_one_and_never_more_than_the_most() -> None:
    answers = ResponseFormat.of(HERMES)
    call = '<tool_call>{"name": "w"}</tool_call>'
    assert parts(parse(answers, f"a {call}{call} b", parallel_tool_calls=False)) == ("a", "", [("w", {})])
    assert len(parse(answers, call * 300).tool_calls) == MOST_CALLS
    named = parse(answers, f'{call}<tool_call>{{"name": "v"}}</tool_call>', tool_choice="required", tool_name="v")
    assert parts(named) == (call, "", [("v", {})])


def test_ids_follow_from_the_conversation_and_the_seed() -> None:
    answers = ResponseFormat.of(HERMES)
    call = '<tool_call>{"name": "w"}</tool_call>'
    ids = [tuple(c.id for c in parse(answers, call * 2, seed=seed).tool_calls) for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    assert len(set(ids[0])) == 2


def test_the_marks_of_reasoning_are_those_of_the_models() -> None:
    names = {"<think>", "[THINK]", "<seed:think>", "<|START_THINKING|>", "◁think▷"}
    assert {each.name for each in REASONING} == names
    assert parts(parse(ResponseFormat.of("<|END_THINKING|>"), "<|START_THINKING|>a<|END_THINKING|>b")) == ("b", "a", [])


# Stop strings


def stream(answer: str, stop: Sequence[str], size: int) -> tuple[str, str, list[Any]]:
    answers = ResponseFormat.of(HERMES)
    assert answers is not None
    parser = AnswerParser(answers, request(stop=tuple(stop)), "", expert="e")
    text = TextStream(lambda tokens: bytes(tokens).decode("utf-8", "replace"), stop)
    out, joined = AnswerStream(text, parser), Joined()
    for at, byte in enumerate(answer.encode()):
        out.push(byte)
        if at % size == 0:
            joined.add(out.take())
            if out.stopped:
                break
    joined.add(out.take(last=True))
    return parts(joined.answer("e", Chunk("", "stop", Usage(0, 0))))


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("answer", "stop", "expected"),
    [
        ('a\n<tool_call>\n{"name": "w"}\n</tool_call>', ["\n"], ("a", "", [("w", {})])),
        (
            '<tool_call>{"name": "w", "arguments": {"n": "é STOP"}}</tool_call>',
            ["STOP"],
            ("", "", [("w", {"n": "é STOP"})]),
        ),
        ('a STOP <tool_call>{"name": "w"}</tool_call>', ["STOP"], ("a ", "", [])),
        ("<think>one\n\ntwo STOP</think>\n\nYes. STOP No.", ["STOP", "\n\n"], ("Yes. ", "one\n\ntwo STOP", [])),
        ('a ST<tool_call>{"name": "w"}</tool_call>', ["STOP"], ("a ST", "", [("w", {})])),
        ("é `<think>` END", ["END"], ("é `<think>` ", "", [])),
        ('a\n<tool_call>\n{"name": "w", "arg', ["\n"], ('a\n<tool_call>\n{"name": "w", "arg', "", [])),
        ('a ST<tool_call>{"name": "w", "arg STOP \n', ["STOP"], ('a ST<tool_call>{"name": "w", "arg STOP \n', "", [])),
        ('a STOP<tool_call>{"name": "w', ["STOP"], ("a ", "", [])),
        ("a <tool_ca STOP", ["STOP"], ("a <tool_ca ", "", [])),
    ],
)
def test_stop_strings_end_the_text_and_nothing_inside_markup(
    answer: str, stop: Sequence[str], expected: Any, size: int
) -> None:
    assert stream(answer, stop, size) == expected


# Detection


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '<tool_call><function=x><parameter=y>' }}", "qwen-xml"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ('{{ \'<|start_header_id|>\' }} {"name": function name, "parameters": dictionary}', "llama3"),
        ("<|channel|>analysis<|message|>", "harmony"),
        ("{{ '<|im_start|>' }}", None),
    ],
)
def test_the_format_follows_from_the_chat_template(template: str, name: str | None) -> None:
    found = calls_of(template)
    assert (found and found.name) == name
    assert (detected(template) is None) == (name is None)


# Templates of checkpoints

OWN = {
    "start_anchor": "<|turn|>assistant",
    "fields": {
        "thinking": {"open": "<r>", "close": "</r>"},
        "content": {"close_pattern": r"\s*<\|end\|>"},
        "tool_calls": {
            "open_pattern": r"<call:(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "kv-lines",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}


def test_a_response_template_of_the_checkpoint_is_used() -> None:
    answers = ResponseFormat.of("<tool_call>", OWN)
    answer = "so</r>Hi\n<call:w>\nn: 1\ncity: 2\n</call> <|end|>"
    whole = parse(answers, [answer], "<|turn|>user<r><|turn|>assistant<r>")
    assert parts(whole) == ("Hi", "so", [("w", {"n": 1, "city": "2"})])  # of the types in the schema
    assert parse(answers, answer, "<|turn|>user<r><|turn|>assistant<r>") == whole
    assert parts(parse(answers, "<tool_call>", "<|turn|>assistant")) == ("<tool_call>", "", [])


@pytest.mark.parametrize(
    "broken",
    [
        {"fields": {}},
        {"start_anchor": "x", "fields": {"content": {}, "more": {}}},
        {"start_anchor": "x", "fields": {"content": {"open_pattern": "("}}},
        {"start_anchor": "x", "fields": {"content": {"open_pattern": "(a{1000}){1000}"}}},
        {"start_anchor": "x", "fields": {"content": {"open": "a" * 3000}}},
        {"start_anchor": "x", "fields": {f"content{i}": {"open": str(i)} for i in range(50)}},
        [1],
        "text",
    ],
)
def test_a_broken_response_template_is_logged_and_the_chat_template_decides(
    broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answers = ResponseFormat.of(HERMES, broken, expert="e")
    assert "the response template of 'e' cannot be used" in caplog.text
    assert answers is not None and answers.calls and answers.calls.name == "hermes"


@pytest.mark.parametrize(
    "field",
    [
        {"open_pattern": r"(?:(?:x+)+y|(x+x+)+z)"},
        {"open_pattern": r"(?=x)", "close_pattern": r"(?=x)"},  # opens and closes without end
        {"open": "<", "content": "xml-inline", "content_args": {"tag_pattern": r"(?P<key>(x+x+)+)y(?P<value>z)"}},
    ],
)
def test_patterns_of_a_checkpoint_are_bounded(field: Any) -> None:
    template = {"start_anchor": "\0", "fields": {"content": {}, "tool_calls": field}}
    with pytest.raises(TemplateError, match="the response template of 'e' takes more than 1 s"):
        parse(ResponseFormat.of(None, template), ["<" + "x" * 5000])


# Hostile answers


@pytest.mark.parametrize("name", [each.name for each in CALLS])
@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>" * 90_000,
        "[TOOL_CALLS] " * 20_000,
        "<think>" * 140_000,
        "<|channel|>" * 90_000,
        '{"name":"w","parameters":' + "[" * 900_000,
        '<tool_call>{"name":"w","arguments":' + '{"a":' * 190_000,
        '<tool_call>{"name":"w","arguments":{"n":' + "9" * 900_000 + "}}</tool_call>",
        "<tool_call>" + " " * 10**6,
    ],
    ids=lambda answer: answer[:12],
)
def test_a_megabyte_of_markup_takes_bounded_time_and_loses_nothing(answer: str, name: str) -> None:
    answers, short = ResponseFormat.of(marks(name)), answer[:50_000]
    whole = parse(answers, [answer])
    assert len(whole.text) + len(whole.reasoning) >= len(answer) - 16
    assert not whole.tool_calls
    tokens = (short[at : at + 4] for at in range(0, len(short), 4))
    assert parse(answers, tokens) == parse(answers, [short])
