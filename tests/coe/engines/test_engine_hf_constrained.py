"""Answers of a model of random weights are valid JSON: only the grammar can make them so."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_models import model_spec, say
from jsonschema import Draft202012Validator

from coe.engines.base import Adapter
from coe.engines.constrained.grammar import MOST_LEVELS, MOST_SCHEMA_BYTES, CallForm, Grammar
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.errors import Rejected, Unsupported
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest
from routers.base import Message, Query
from routers.constraints import check

FLAT: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"},
        "kind": {"enum": ["order", "refund"]},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["id", "kind", "lines"],
    "additionalProperties": False,
    "$defs": {
        "line": {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}, "gift": {"type": "boolean"}},
            "required": ["n", "gift"],
            "additionalProperties": False,
        }
    },
}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"v": {"enum": [1, 2]}, "kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
    "required": ["v", "kids"],
    "additionalProperties": False,
}


def request(schema: Mapping[str, Any] | None, text: str = "the capital", **fields: Any) -> GenerateRequest:
    given = None if schema is None else {"name": "answer", "schema": schema}
    fields = {"max_tokens": 300, **fields}
    return GenerateRequest(messages=(Message("user", text),), format="json", json_schema=given, **fields)


def is_valid(text: str, schema: Mapping[str, Any]) -> bool:
    return Draft202012Validator(schema).is_valid(json.loads(text))


@pytest.mark.parametrize("schema", [FLAT, NESTED, TREE], ids=["flat", "nested", "recursive"])
async def test_every_answer_satisfies_its_schema(expert: HFExpert, schema: dict[str, Any]) -> None:
    requests = [request(schema, temperature=1.0, seed=seed) for seed in range(12)] + [request(schema)]
    answers = await asyncio.gather(*(say(expert, each) for each in requests))
    finished = [answer for answer in answers if answer.reason == "stop"]
    assert len(finished) >= 6 and all(is_valid(answer.text, schema) for answer in finished)
    assert all(answer.reason in ("stop", "length") for answer in answers)
    assert len({answer.text for answer in answers}) > 3


async def test_an_object_has_no_other_properties_than_its_schema_lists_unless_it_states_them(expert: HFExpert) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"properties": {"c": {"enum": [3]}}}}}
    listed, other, inner = '{"a": 1, "b": {"c": 3}}', '{"a": 1, "z": 2}', '{"b": {"z": 2}}'
    assert await accepts(expert, schema, listed)
    assert not await accepts(expert, schema, other) and not await accepts(expert, schema, inner)
    stated = {**schema, "additionalProperties": True}
    assert await accepts(expert, stated, listed) and await accepts(expert, stated, other)
    assert not await accepts(expert, stated, inner)


async def accepts(expert: HFExpert, schema: Mapping[str, Any], text: str) -> bool:
    """Whether a text may be the whole answer."""
    grammar = Grammar.of_request(request(schema))
    assert grammar is not None
    state = (await expert._preparation.grammars.matcher(grammar, expert="tiny")).state.deep_copy()
    ids = expert.loaded.tokenizer.encode(text, add_special_tokens=False)
    return bool(state.try_consume_tokens(ids) == len(ids) and state.is_accepting())


async def test_rows_without_a_schema_in_the_same_batch_stay_as_they_are(expert: HFExpert) -> None:
    plain = GenerateRequest(messages=(Message("user", "the capital"),), max_tokens=12)
    alone = await say(expert, plain)
    together = await asyncio.gather(say(expert, request(FLAT)), say(expert, plain), say(expert, request(NESTED)))
    assert together[1].text == alone.text and together[1].reason == alone.reason
    assert is_valid(together[0].text, FLAT) and is_valid(together[2].text, NESTED)


async def test_bounds_of_64_bits_can_be_kept(expert: HFExpert) -> None:
    schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    said = await say(expert, request(schema, temperature=1.0, seed=1))
    assert said.reason == "stop" and is_valid(said.text, schema)


async def test_an_object_without_a_schema_is_any_object(expert: HFExpert) -> None:
    answer = await say(expert, request(None, max_tokens=60))
    assert answer.text.startswith("{")
    assert answer.reason == "length" or isinstance(json.loads(answer.text), dict)


async def test_an_answer_that_max_tokens_cuts_is_a_beginning(expert: HFExpert) -> None:
    whole = await say(expert, request(FLAT))
    assert whole.usage is not None and whole.reason == "stop"
    cut = await say(expert, request(FLAT, max_tokens=whole.usage.completion_tokens - 1))
    assert cut.reason == "length" and whole.text.startswith(cut.text) and cut.text != whole.text
    full = await say(expert, request(FLAT, max_tokens=whole.usage.completion_tokens))
    assert (full.text, full.reason) == (whole.text, "stop")


async def test_an_answer_ends_where_nothing_can_follow_without_an_end_token(expert: HFExpert) -> None:
    options = SamplingOptions(ignore_eos=True, min_tokens=200)
    answer = await say(expert, request(FLAT, sampling=options))
    assert answer.reason == "stop" and is_valid(answer.text, FLAT)


async def test_special_tokens_and_adapters(expert: HFExpert, adapters: list[Adapter]) -> None:
    bias = SamplingOptions(logit_bias=dict.fromkeys(range(2), 100.0))  # the special tokens of the tokenizer
    for adapter in (None, *adapters[:2]):
        answer = await say(expert, request(FLAT, sampling=bias), adapter)
        assert answer.reason == "stop" and is_valid(answer.text, FLAT)


async def test_the_same_seed_gives_the_same_answer_in_any_batch(expert: HFExpert) -> None:
    alone = await say(expert, request(FLAT, temperature=1.0, seed=3))
    others = [request(NESTED, temperature=1.0, seed=seed) for seed in range(5)]
    together = await asyncio.gather(*(say(expert, each) for each in [*others, request(FLAT, temperature=1.0, seed=3)]))
    assert together[-1].text == alone.text


async def test_penalties_and_cut_offs_keep_to_the_schema(expert: HFExpert) -> None:
    options = SamplingOptions(top_k=3, min_p=0.1, frequency_penalty=2, presence_penalty=2, repetition_penalty=2.0)
    answers = [
        await say(expert, request(NESTED, temperature=1.5, top_p=0.5, seed=s, sampling=options)) for s in range(4)
    ]
    assert all(is_valid(answer.text, NESTED) for answer in answers if answer.reason == "stop")


async def test_a_newline_cannot_repeat_for_ever(expert: HFExpert) -> None:
    newline = expert.loaded.tokenizer.encode("\n")
    answer = await say(expert, request(FLAT, sampling=SamplingOptions(logit_bias={newline[0]: 100.0})))
    assert answer.reason == "stop" and is_valid(answer.text, FLAT)
    assert "\n" * 24 in answer.text and "\n" * 25 not in answer.text


async def test_a_repeated_schema_is_compiled_once(expert: HFExpert, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    problem = expert._preparation.grammars._checker.problem

    def counted(grammar: str) -> str | None:
        checked.append(grammar)
        return problem(grammar)

    monkeypatch.setattr(expert._preparation.grammars._checker, "problem", counted)
    await asyncio.gather(*(say(expert, request(FLAT)) for _ in range(4)))
    with pytest.raises(Rejected):
        await say(expert, request({"not": {}}))
    with pytest.raises(Rejected):
        await say(expert, request({"not": {}}))
    assert len(checked) == 2


async def test_no_more_grammars_are_kept_than_allowed(expert: HFExpert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.engines.constrained.compiler._MOST_KEPT", 2)
    for most in (1, 2, 3, 1):
        await say(expert, request({"type": "array", "items": {"type": "null"}, "minItems": most, "maxItems": most}))
    assert len(expert._preparation.grammars._kept) == 2


# Schemas that are invalid, unsupported or hostile


def having(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"e": schema}, "required": ["e"], "additionalProperties": False}


def deep(levels: int) -> dict[str, Any]:
    """A schema of this many levels of objects."""
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"not_a_keyword": schema}
    return schema


HUGE = having({"enum": ["x" * 1000 for _ in range(1000)]})


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        (having({"not": {"type": "string"}}), r"the keyword 'not' .* is not supported \(at /properties/e/not\)"),
        (having({"type": "array", "uniqueItems": True}), r"'uniqueItems' .* \(at /properties/e/uniqueItems\)"),
        (
            having({"oneOf": [{"type": "number"}, {"type": "integer"}]}),
            r"oneOf .* \(at /properties/e/oneOf\): use anyOf",
        ),
        (having({"type": "string", "pattern": "^(?=a)b"}), r"pattern .* \(at /properties/e/pattern\): .*look-ahead"),
        (
            having({"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)\d*$"}]}),  # a Decimal
            r"pattern .* \(at /properties/e/anyOf/1/pattern\): .*look-ahead",
        ),
        (having({"enum": [1, 2**53 + 1]}), r"number 9007199254740993 \(at /properties/e/enum\), which is not exact"),
        (having({"type": "string", "pattern": "("}), r"pattern .* \(at /properties/e/pattern\): .*unclosed group"),
        (having({"type": "string", "format": "zebra"}), r"\(at /properties/e/format\): Unknown format: zebra"),
        (having({"type": "strnig"}), r"\(at /properties/e/type\): Invalid type: strnig"),
        (having({"$ref": "#/$defs/missing"}), r"\(at /properties/e/\$ref\): .*'/\$defs/missing' does not exist"),
        (having({"$ref": "http://127.0.0.1:9/x.json"}), "does not fetch resources"),
        (having(False), "unsatisfiable"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
            "no answer can satisfy",
        ),
        (having({"type": "array", "minItems": 10**9}), "it takes (more than 2 s|too much memory) to compile"),
        (
            having({"type": "array", "maxItems": 10**9, "items": {"type": "integer"}}),
            "it takes (more than 2 s|too much)",
        ),
        (having({"enum": [f"value {i}" for i in range(10_000)], "minLength": 3}), "schema too large"),
        (HUGE, f"has 1,0.* bytes, at most {MOST_SCHEMA_BYTES:,} are compiled"),
        (deep(MOST_LEVELS + 1), f"more than {MOST_LEVELS} levels of arrays and objects, at /not_a_keyword/"),
        (deep(100_000), f"more than {MOST_LEVELS} levels"),
    ],
)
async def test_a_schema_that_cannot_be_followed_is_rejected_with_the_place(
    expert: HFExpert, schema: dict[str, Any], match: str
) -> None:
    async with asyncio.timeout(60):
        with pytest.raises(Rejected, match=match) as caught:
            await say(expert, request(schema))
    assert caught.value.status == 400 and len(str(caught.value)) < 1000
    assert (await say(expert, request(FLAT))).reason == "stop"  # and the expert still answers


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"properties": {"a": {"type": "strnig"}}}, " cannot be used (at /properties/a/type): Invalid type: strnig"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}}, " cannot be used (at /properties/a/$ref): Pointer '/$defs/x' d"),
        ({"not": {}}, "the keyword 'not' of the schema of the parameters of tool 'get' is not supported (at /not)"),
        ({"properties": {"a": {"pattern": "(?=a)"}}}, "tool 'get' is not supported (at /properties/a/pattern): regex"),
        ({"required": ["a"], "properties": {"a": False}}, "of tool 'get' cannot be used: Unsatisfiable schema"),
        ({"properties": {"a": {"type": "array", "maxItems": 10**9, "items": {"type": "integer"}}}},
         "the schema of a tool's parameters cannot be used: it takes "),
        ({"description": "x" * MOST_SCHEMA_BYTES}, "the schema of the parameters of tool 'get' has 262,181 bytes, at"),
        ({"description": "x" * (MOST_SCHEMA_BYTES - 50)}, "the schemas of all tools have 262,2"),
        (deep(MOST_LEVELS + 1), "tool 'get' has more than 64 levels of arrays and objects, at /not_a_keyword/"),
    ],
)  # fmt: skip
async def test_parameters_that_cannot_be_followed_are_rejected_with_their_tool(
    expert: HFExpert, parameters: dict[str, Any], problem: str
) -> None:
    now = {"type": "object", "properties": {"when": {"$ref": "#"}}}  # may be used: it is recursive
    tools = {"now": now, "get": parameters}
    offered = tuple({"type": "function", "function": {"name": name, "parameters": tools[name]}} for name in tools)
    demanded = GenerateRequest(messages=(Message("user", "Go."),), tools=offered, tool_choice="required", max_tokens=8)
    with pytest.raises(Rejected) as caught:
        await say(expert, demanded)
    assert problem in str(caught.value) and len(str(caught.value)) < 600 and caught.value.status == 400
    assert "<tool_call>" not in str(caught.value) and "%json" not in str(caught.value), "no line of the grammar"


async def test_a_schema_with_a_huge_enumeration_is_compiled(expert: HFExpert) -> None:
    huge = having({"enum": [f"value {i}" for i in range(10_000)]})
    assert is_valid((await say(expert, request(huge))).text, huge)


async def test_a_schema_of_the_most_levels_is_compiled(expert: HFExpert) -> None:
    assert (await say(expert, request(deep(MOST_LEVELS), max_tokens=2))).reason in ("length", "stop")


async def test_the_loop_runs_while_a_hostile_schema_is_checked(expert: HFExpert) -> None:
    hostile = asyncio.create_task(say(expert, request(having({"type": "array", "minItems": 10**9}))))
    plain = GenerateRequest(messages=(Message("user", "the capital"),), max_tokens=5)
    async with asyncio.timeout(30):
        assert (await say(expert, plain)).reason == "length"
    assert not hostile.done()
    with pytest.raises(Rejected):
        await hostile


@pytest.mark.parametrize(
    "pattern", ["^(a+)+$", "^(.*a.{40})$", "^((a{1000}){1000}){1000}$", "^(.{1,100}a){100}$", "^a{1000000000}$"]
)
async def test_a_catastrophic_pattern_ends_the_answer_within_limits(expert: HFExpert, pattern: str) -> None:
    async with asyncio.timeout(60):
        try:
            answer = await say(expert, request(having({"type": "string", "pattern": pattern}), max_tokens=100))
        except Rejected as error:
            assert "cannot continue an answer in the required format" in str(error) and error.status == 400
        else:
            assert answer.reason == "length" or is_valid(answer.text, having({"type": "string"}))


async def test_a_schema_that_is_too_complex_to_match_is_rejected(expert: HFExpert) -> None:
    optional = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1_000)}}
    with pytest.raises(Rejected, match=r"its JSON schema is too complex \(.*items.*\): use fewer optional properties"):
        await say(expert, request(optional))
    assert (await say(expert, request(FLAT))).reason == "stop"


async def test_a_tokenizer_that_cannot_be_constrained_is_named(
    expert: HFExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("Only fast tokenizers are supported")

    monkeypatch.setattr("llguidance.hf.from_tokenizer", fail)
    with pytest.raises(Unsupported, match="its tokenizer .*is not supported by llguidance: Only fast"):
        await say(expert, request(FLAT))


# Tool calls


def test_a_call_that_is_demanded_is_not_in_the_format_of_answers() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    demanded = request(FLAT, tools=(tool,), tool_choice="required")
    assert Grammar.of_request(demanded) is None
    assert Grammar.of_request(replace(demanded, tool_choice="auto")) == Grammar.of_request(request(FLAT))


async def test_an_answer_in_a_format_is_text_though_the_prompt_opens_reasoning(
    engine: HFEngine, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "thinks"
    shutil.copytree(tiny, folder)
    template = (folder / "chat_template.jinja").read_text()
    assert "assistant\n" in template
    (folder / "chat_template.jinja").write_text(
        template.replace("assistant\n", "assistant\n<think>\n") + "{# <think> </think> #}"
    )
    expert = await engine.load(model_spec(folder), folder)
    try:
        answer = await say(expert, request(FLAT))
        assert is_valid(answer.text, FLAT) and not any(chunk.reasoning for chunk in answer.chunks)
    finally:
        await engine.unload(expert)


@pytest.mark.parametrize("several", [False, True])
async def test_a_call_of_an_offered_tool_can_be_forced(expert: HFExpert, several: bool) -> None:
    forms = [
        CallForm.of(f'<call>\n{{"name": "{name}", "arguments": ', schema, "}\n</call>")
        for name, schema in (("now", {}), ("get", {k: v for k, v in FLAT.items() if k != "type"}))
    ]
    forms[0] = replace(forms[0], schema='{"type": "object", "additionalProperties": false}')
    grammar = Grammar.of_calls(forms, separator="\n", several=several)
    matcher = await expert._preparation.grammars.matcher(grammar, expert="tiny")
    encode = expert.loaded.tokenizer.encode
    one = '<call>\n{"name": "now", "arguments": {}}\n</call>'
    other = '<call>\n{"name": "get", "arguments": {"name": "a", "age": 7}}\n</call>'
    for text, expected in ((one, True), (other, True), (f"{one}\n{other}", several), ("hi", False), (one[:-3], False)):
        state = matcher.state.deep_copy()
        ids = encode(text, add_special_tokens=False)
        assert (state.try_consume_tokens(ids) == len(ids) and state.is_accepting()) is expected, text


async def test_special_tokens_around_a_call_are_tokens(expert: HFExpert) -> None:
    form = CallForm.of("<|im_start|>now ", {"additionalProperties": False}, "<|im_start|>.")
    matcher = await expert._preparation.grammars.matcher(Grammar.of_calls([form]), expert="tiny")
    encode = expert.loaded.tokenizer.encode
    ids = encode("<|im_start|>now {}<|im_start|>.", add_special_tokens=False)
    assert ids[0] == 0 and matcher.state.try_consume_tokens(ids) == len(ids) and matcher.state.is_accepting()


def test_every_hf_expert_is_eligible_for_json(expert: HFExpert) -> None:
    specs, engines = {"tiny": expert.spec}, {"tiny": frozenset({"json_schema"})}
    for needs in (frozenset[str](), frozenset({"json_schema"})):
        query = Query.of("Hello", format="json", needs=needs)
        assert check(query, specs, engines=engines).experts == {"tiny"}
        assert not check(query, specs, engines={"tiny": frozenset()}).experts
