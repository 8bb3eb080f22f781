"""Hostile requests: what is counted, how much of it an error repeats, and each limit with one above."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from coe.protocol import bounds as f
from coe.protocol.errors import MOST_COUNTED, InvalidFields, error_body
from coe.protocol.problems import MOST_PROBLEMS
from coe.protocol.requests import parse_chat

TURN = {"role": "user", "content": "hello"}
PART = {"type": "text", "text": "a"}


def chat(**given: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [TURN], **given}


def refused(body: dict[str, Any], experts: tuple[str, ...] = ()) -> InvalidFields:
    """The error. It is small, and described within a second, however large the body."""
    started = time.perf_counter()
    with pytest.raises(InvalidFields) as caught:
        parse_chat(body).query_among(experts)
    assert len(caught.value.problems) <= MOST_PROBLEMS
    assert len(str(caught.value).encode()) < 5_000
    assert time.perf_counter() - started < 1
    return caught.value


PNG = "data:image/png;base64,"
CALL = {"id": "c", "function": {"name": "f", "arguments": ""}}


def tool(i: int, text: str = "", schema: Any = None) -> dict[str, Any]:
    parameters = {} if schema is None else {"parameters": schema}
    return {"type": "function", "function": {"name": f"f{i}", "description": text, **parameters}}


def filled(n: int, document: Any) -> str:
    """The text that makes a document of `document("")` n bytes long as JSON."""
    return "x" * (n - len(json.dumps(document, separators=(",", ":"))))


def of_bytes(n: int) -> dict[str, Any]:
    """Tools of n bytes."""
    return {"tools": [tool(0, filled(n, [tool(0)]))]}


def schema_of_bytes(n: int) -> dict[str, Any]:
    empty = {"name": "x", "description": "", "schema": {}}
    return {"response_format": {"type": "json_schema", "json_schema": empty | {"description": filled(n, empty)}}}


def nested(n: int) -> dict[str, Any]:
    """n levels of objects."""
    document: dict[str, Any] = {}
    for _ in range(n - 1):
        document = {"not": document}
    return document


def images(n: int, url: str = PNG) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}] * n}]}


def image_of_bytes(n: int) -> dict[str, Any]:
    return images(1, PNG + "A" * (n - len(PNG)))


LIMITS = [
    ("tools", lambda n: {"tools": [tool(i) for i in range(n)]}, f.MOST_TOOLS),
    ("tools", of_bytes, f.MOST_TOOL_BYTES),
    ("tools", lambda n: {"tools": [tool(0, schema=nested(n - 3))]}, f.MOST_LEVELS),
    ("response_format.json_schema", schema_of_bytes, f.MOST_SCHEMA_BYTES),
    ("response_format.json_schema", lambda n: {"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": nested(n - 1)}}}, f.MOST_LEVELS),
    ("chat_template_kwargs", lambda n: {"chat_template_kwargs": {"a": filled(n, {"a": ""})}}, f.MOST_TEMPLATE_BYTES),
    ("chat_template_kwargs", lambda n: {"chat_template_kwargs": {"a": nested(n - 1)}}, f.MOST_LEVELS),
    ("messages", lambda n: {"messages": [{"role": "assistant", "tool_calls": [CALL] * n}]}, f.MOST_CALLS),
    ("messages", lambda n: {"messages": [{"role": "assistant", "tool_calls": [CALL] * 4}] * (n // 4) + [
        {"role": "assistant", "tool_calls": [CALL] * (n % 4), "content": ""}]}, f.MOST_CALLS),
    ("messages", images, f.MOST_IMAGES),
    ("messages", image_of_bytes, f.MOST_IMAGE_BYTES),
    ("messages[0].content[0].image_url.url", lambda n: images(1, "https://e.org/".ljust(n, "a")), f.MOST_URL),
    ("logit_bias", lambda n: {"logit_bias": {str(i): 1 for i in range(n)}}, f.MOST_BIASES),
    ("n", lambda n: {"n": n}, f.MOST_ANSWERS),
    ("top_logprobs", lambda n: {"logprobs": True, "top_logprobs": n}, f.MOST_CHAT_LOGPROBS),
    ("messages", lambda n: {"messages": [TURN] * n}, f.MOST_MESSAGES),
    ("messages", lambda n: {"messages": [{"role": "user", "content": [PART] * n}]}, f.MOST_PARTS),
    ("messages", lambda n: {"messages": [{"role": "user", "content": [PART] * (n - 1)}, TURN, TURN | {
        "content": [PART]}]}, f.MOST_PARTS),
    ("stop", lambda n: {"stop": ["a"] * n}, f.MOST_STOPS),
    ("coe.experts", lambda n: {"coe": {"experts": ["a"] * n}}, f.MOST_EXPERTS),
    ("coe.exclude", lambda n: {"coe": {"exclude": ["b"] * n}}, f.MOST_EXPERTS),
    ("model", lambda n: {"model": "m" * n}, f.MOST_NAME),
    ("max_tokens", lambda n: {"max_tokens": n}, 2**63 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("param", "given", "most"), LIMITS)
def test_a_request_at_its_limit_is_taken_and_one_above_is_refused(param: str, given: Any, most: int) -> None:
    parse_chat(chat(**given(most))).query_among(["a", "b"])
    error = refused(chat(**given(most + 1)), ("a", "b"))
    assert error.param == param and len(error.problems) == 1


@pytest.mark.parametrize(
    "place",
    [
        "body",
        "coe",
        "coe.session",
        "stream_options",
        "response_format",
        "response_format.json_schema",
        "tool_choice",
        "messages[0]",
        "part",
    ],
)
def test_an_object_with_too_many_fields_is_not_looked_at(place: str) -> None:
    def given(count: int) -> dict[str, Any]:
        many = {f"f{i}": 1 for i in range(count)}
        if place == "part":
            return chat(messages=[{"role": "user", "content": [many]}])
        outer, _, inner = place.partition(".")
        more = (
            {"tools": [tool(0)]}
            if place == "tool_choice"
            else {"type": "json_schema"}
            if inner == "json_schema"
            else {}
        )
        whole = {"body": many, "messages[0]": chat(messages=[many])}
        if inner:
            return chat(**{outer: {**more, inner: many}})
        return whole.get(place) or chat(**{place: many}, **more)

    assert "is not a known field" in str(refused(given(f.MOST_FIELDS)))
    error = refused(given(f.MOST_FIELDS + 1))
    assert str(error).endswith(f"has {f.MOST_FIELDS + 1} fields, at most {f.MOST_FIELDS} are read")
    assert error.code == "too_many" and error.param == {"part": "messages[0].content[0]"}.get(place, place)


def test_at_most_twenty_problems_are_described_and_the_others_counted() -> None:
    error = refused(chat(**{f"f{i}": 1 for i in range(50)}))
    assert str(error).startswith("50 problems, the first 20:\nf0: is not a known field")
    assert (len(error.problems), error.more) == (20, 30)
    error = refused(chat(**{f"f{i}": 1 for i in range(20)}))
    assert str(error).startswith("20 problems:\n") and error.more == 0


def test_every_wrong_message_is_found_until_counting_stops() -> None:
    wrong = {"rol": "user", "content": "x"}
    error = refused(chat(messages=[TURN, wrong, TURN, wrong, "text"], temperature="hot"))
    assert [problem.param for problem in error.problems] == [
        "temperature",
        "messages[1].role",
        "messages[1].rol",
        "messages[3].role",
        "messages[3].rol",
        "messages[4]",
    ]
    error = refused(chat(messages=[wrong] * f.MOST_MESSAGES))
    assert str(error).startswith(f"{MOST_COUNTED} problems or more, the first 20:\n")
    assert error.more == MOST_COUNTED - 20
    error = refused(chat(messages=[TURN | {"tool_calls": [1], "audio": {}}] * f.MOST_MESSAGES))
    assert str(error).startswith(f"{MOST_COUNTED} problems or more") and error.param == "messages[0].tool_calls[0]"


@pytest.mark.parametrize(
    "body",
    [
        chat(tools=[tool(i, "x" * 4_000) for i in range(1_000)]),
        chat(tools=[{"type": "function", "function": {"name": f"{i} {i}", f"x{i}": 1}} for i in range(f.MOST_TOOLS)]),
        chat(**schema_of_bytes(4_000_000)),
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": nested(900)}}),
        chat(messages=[{"role": "assistant", "tool_calls": [CALL | {"id": 5}] * 8}] * 500),
        chat(**images(8_000, "ftp://e.org/" + "a" * 500)),
        chat(logit_bias={f"token {i}": "x" * 100 for i in range(f.MOST_BIASES)}),
        chat(chat_template_kwargs={f"a b {i}": "x" for i in range(100)}),
        {f"unknown_{i}": i for i in range(60_000)},
        chat(messages=[{"rol": "user", "content": "x"}] * 80_000),
        chat(coe={"experts": [f"unknown-{i}" for i in range(40_000)]}),
        chat(coe={"experts": [f"expert-{i}x" for i in range(10_000)]}),
        chat(coe={"exclude": ["x" * 512 + str(i) for i in range(100)]}),
        chat(stop=["a"] * 200_000),
        chat(messages=[{"role": "user", "content": [PART] * 100_000}]),
        chat(messages=[{"role": "user", "content": [{f"f{i}": 1 for i in range(90)}] * 1024}]),
        chat(**{"x" * 100_000 + str(i): 1 for i in range(20)}),
        chat(tools=[[1] * 90_000], temperature=["y" * 1_000_000], n="z" * 2_000_000),
        chat(model="m" * 4_000_000),
        chat(max_tokens=10**4000, seed=-(10**4000), temperature=float("inf")),
        chat(messages=[{"role": "user", "content": [{"type": "x" * 1_000_000}]}]),
    ],
    ids="tools wrong-tools schemas deep-schema calls images biases template "
    "fields messages experts close exclude stops parts part-fields names values model numbers type".split(),
)
def test_a_hostile_body_gets_a_short_answer_soon(body: dict[str, Any]) -> None:
    refused(body, tuple(f"expert-{i}" for i in range(900)))


def test_lone_surrogates_and_nul_in_any_text_are_answered() -> None:
    bad = "\ud800"
    for body, param in (
        (chat(**{bad: 1}), "body"),
        (chat(messages=[{"role": "user", "content": "x", bad: 1}]), "messages[0]"),
        (chat(model=bad), "model"),
        (chat(stop=[bad]), "stop[0]"),
        (chat(coe={"experts": [bad]}), "coe.experts[0]"),
        (chat(messages=[{"role": bad, "content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "user", "content": [PART, {"type": "text", "text": bad}]}]),
         "messages[0].content[1].text"),
    ):  # fmt: skip
        error = refused(body)
        assert error.param == param
        assert str(error_body(error)[1]).encode(), "the answer is text"
    assert parse_chat(chat(messages=[{"role": "user", "content": "a\0b"}])).request.messages[0].content == "a\0b"


def test_parts_are_joined_whether_plain_or_with_more_fields() -> None:
    more = PART | {"text": "b", "prompt_cache_breakpoint": {"type": "x"}}
    for parts, text in (([PART, PART], "aa"), ([PART, more], "ab"), ([], "")):
        parsed = parse_chat(chat(messages=[{"role": "user", "content": parts}]))
        assert parsed.request.messages[0].content == text
