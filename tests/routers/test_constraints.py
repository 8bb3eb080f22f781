"""Constraints: who may answer, which constraint removed the others, and errors that name it with both numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.spec import ExpertSpec, Kind
from routers.base import EMBEDDING, Message, Query
from routers.constraints import check, context_length, estimate_tokens, prune
from routers.errors import NoEligibleExpert
from routers.tokens import TokenRange


def spec(name, **kwargs):
    return ExpertSpec(name=name, kind=kwargs.pop("kind", Kind.MODEL), source=kwargs.pop("source", "folder"), **kwargs)


SPECS = {
    s.name: s
    for s in (
        spec("short", context_length=100),
        spec("long", context_length=10_000),
        spec("able", context_length=1_000, capabilities=frozenset({"chat", "tools", "json"})),
        spec("adapter", kind=Kind.ADAPTER, base="short"),
        spec("endless", kind=Kind.REMOTE, source="https://host/v1"),
        spec("embedder", kind=Kind.EMBEDDING),
    )
}
CHATTERS = {"short", "long", "able", "adapter", "endless"}


def test_a_plain_query_suits_all_that_can_chat():
    found = check(Query.of("hi"), SPECS)
    assert found.experts == CHATTERS
    assert found.removed == {"embedder": "modality: it cannot chat"}
    assert prune([Query.of("hi"), Query.of("ho")], SPECS) == [CHATTERS, CHATTERS]
    assert check(Query.of("hi"), {"mute": spec("mute", capabilities=frozenset({"classify"}))}).experts == frozenset()


def counted(low, likely=None):
    return lambda name: TokenRange(low, likely or low, likely or low)


def test_the_whole_conversation_must_fit_the_context():
    history = tuple(Message("user", "four " * 100) for _ in range(3))
    query = Query(messages=(*history, Message("user", "and now?")))
    found = check(query, SPECS, count=counted(302))
    assert found.experts == {"long", "able", "endless"}
    assert found.removed["short"] == "context length: at least 302 tokens do not fit its 100"
    assert found.removed["adapter"].endswith("its 100")  # its base's context
    assert found.counted == {"short": 302, "adapter": 302, "able": 302}, "only where the estimate does not decide"


def test_the_answer_needs_room_too():
    query = Query.of("four " * 60)
    assert "short" in check(query, SPECS, count=counted(60)).experts
    removed = check(query, SPECS, answer_tokens=50, count=counted(60)).removed
    assert removed["short"] == "context length: at least 60 tokens and 50 for the answer do not fit its 100"
    assert check(replace(query, max_tokens=50), SPECS, count=counted(60)).removed == removed, "as the request states it"
    assert "short" in check(replace(query, max_tokens=40), SPECS, count=counted(60)).experts, "exactly its context"
    assert "short" not in check(replace(query, max_tokens=41), SPECS, count=counted(60)).experts


def test_an_answer_longer_than_a_context_needs_no_count():
    def count(name):
        raise AssertionError(name)

    found = check(Query.of("hi", max_tokens=1000), SPECS, count=count)
    assert found.experts == {"long", "endless"}
    assert found.removed["able"] == "context length: 1000 tokens for the answer do not fit its 1000"


@pytest.mark.parametrize("text", ["four " * 500, "7" * 900, "привет " * 300, "नमस्ते " * 200, "🦜" * 400, "x" * 90_000])
def test_an_estimate_alone_excludes_no_expert(text):
    found = check(Query.of(text), SPECS)
    assert found.experts == CHATTERS
    assert found.among(["short"]) == CHATTERS, "a router that knows no other expert may choose it"
    assert prune([Query.of(text, allowed=frozenset({"short"}))], SPECS) == [{"short"}]
    assert check(Query.of(text), SPECS, count=lambda name: None).experts == CHATTERS, "its tokenizer is not at hand"


def test_an_expert_whose_context_an_estimate_finds_too_short_is_left_out_where_another_is_known():
    found = check(Query.of("four " * 500), SPECS)
    assert set(found.doubtful) == {"short", "adapter"}
    assert found.doubtful["short"].startswith("context length: about ") and found.doubtful["short"].endswith("its 100")
    assert found.among(["short", "long"]) == {"long", "able", "endless"}
    assert prune([Query.of("four " * 500)], SPECS) == [{"long", "able", "endless"}]


def test_an_expert_with_hardly_any_room_for_an_answer_is_left_out_where_another_is_known():
    query = Query.of("four " * 90)
    found = check(query, SPECS, count=counted(90))
    assert found.experts == CHATTERS and found.among(SPECS) == {"long", "able", "endless"}
    assert check(query, SPECS, count=counted(70)).among(SPECS) == CHATTERS
    assert check(replace(query, max_tokens=10), SPECS, count=counted(90)).among(SPECS) == CHATTERS
    assert "short" not in check(query, SPECS, count=counted(100)).experts, "no room at all"


def test_an_adapter_has_the_context_of_its_base_or_a_shorter_one():
    specs = {s.name: s for s in (spec("base", context_length=100), *(adapter(n) for n in (None, 50, 5000)))}
    assert [context_length(specs[f"on-{n}"], specs) for n in (None, 50, 5000)] == [100, 50, 100]
    assert context_length(adapter(50), {}) == 50 and context_length(adapter(None), {}) is None
    members = tuple(name for name in specs if name != "base")
    composed = ExpertSpec(name="all", kind=Kind.COMPOSED, members=members)
    assert context_length(composed, specs) == 50


def adapter(length):
    return spec(f"on-{length}", kind=Kind.ADAPTER, base="base", context_length=length)


def test_tools_and_json_ask_for_experts_that_have_them():
    tools = Query.of("hi", tools=({"type": "function", "function": {"name": "f"}},))
    assert check(tools, SPECS).experts == {"able"}
    assert check(tools, SPECS).removed["long"] == "tools: it cannot call tools"
    as_json = Query.of("hi", format="json")
    assert check(as_json, SPECS).experts == {"able"}
    assert check(as_json, SPECS).removed["long"] == "json: it does not promise JSON"


def test_texts_to_embed_suit_embedding_models_with_room_for_the_longest_one():
    embeds = {"kind": Kind.EMBEDDING, "capabilities": frozenset({EMBEDDING})}
    models = {
        "tiny": spec("tiny", context_length=32, **embeds),
        "wide": spec("wide", context_length=8192, **embeds),
        "chats": spec("chats", context_length=8192),
    }

    def found(*texts, **options):
        query = Query(tuple(Message("user", text) for text in texts), raw=True, needs=frozenset({EMBEDDING}))
        return check(query, models, **options)

    many = found(*["four words are here"] * 2000)
    assert many.experts == {"tiny", "wide"} and not many.doubtful  # each is read by itself, and needs no answer
    assert many.removed == {"chats": "modality: it cannot return an embedding"}
    assert not found("word " * 28).doubtful
    one_long = found("short", "word " * 500, "short")
    assert "tokens do not fit its 32" in one_long.doubtful["tiny"] and one_long.among(models) == {"wide"}
    assert found("short", "word " * 500, count=counted(500)).experts == {"wide"}


def test_only_allowed_experts_may_answer():
    found = check(Query.of("hi", allowed=frozenset({"long", "unheard-of"})), SPECS)
    assert found.experts == {"long"}
    assert found.removed["short"] == "allowed experts: the caller does not allow it"


def test_no_expert_left_names_every_constraint_and_both_numbers():
    query = Query.of("hi", id="q7", allowed=frozenset({"short", "embedder"}), max_tokens=500)
    with pytest.raises(NoEligibleExpert) as error:
        prune([Query.of("hi"), query], SPECS)
    assert str(error.value) == (
        "no expert can take query q7: short (context length: 500 tokens for the answer do not fit its 100); "
        "embedder (modality: it cannot chat)"
    )
    assert error.value.constraints == {"context length", "modality"}
    with pytest.raises(NoEligibleExpert, match=r"ghost \(allowed experts: not registered; registered: short, long"):
        prune([Query.of("hi", allowed=frozenset({"ghost"}))], SPECS)
    with pytest.raises(NoEligibleExpert, match="this query: none is registered"):
        prune([Query.of("hi")], {})


def test_the_error_names_a_few_of_many_experts():
    many = {f"e{i}": spec(f"e{i}", context_length=10) for i in range(5000)}
    with pytest.raises(NoEligibleExpert, match=r"e8, e9 and 4990 more \(context length: [^)]*\)$") as error:
        prune([Query.of("hi", max_tokens=10)], many)
    assert len(str(error.value)) < 2000
    with pytest.raises(NoEligibleExpert) as error:
        prune([Query.of("hi", allowed=frozenset(f"ghost{i}" for i in range(5000)))], many)
    assert len(str(error.value)) < 2000


def test_tokens_are_estimated_without_a_tokenizer():
    assert estimate_tokens(Query.of("The cat sat on the mat.")) == 7 + 4
    assert estimate_tokens(Query.of("猫は屋根の上")) == 6 + 4
    assert estimate_tokens(Query(messages=())) == 0
    assert estimate_tokens(Query.of("a", tools=({"name": "f" * 40},))) > 10


def test_an_engine_limits_what_its_experts_can_do_and_only_what_is_known_of_it():
    tools = Query.of("hi", tools=({"type": "function"},))
    without = check(tools, SPECS, engines={"able": frozenset({"streaming"})})
    assert without.removed["able"] == "tools: the engine that serves it cannot call tools"
    assert without.removed["long"] == "tools: it cannot call tools", "the expert's own limit is reported first"
    assert check(tools, SPECS, engines={"able": frozenset({"tools"})}).experts == {"able"}
    assert check(tools, SPECS, engines={}).experts == {"able"}
    assert check(Query.of("hi"), SPECS, engines={"able": frozenset()}) == check(Query.of("hi"), SPECS)


@pytest.mark.parametrize("need", ["json_schema", "logprobs", "prompt_logprobs", "token_prompts", "sampling"])
def test_a_need_is_met_by_the_expert_or_by_its_engine(need):
    query = replace(Query.of("hi"), needs=frozenset({need}))
    specs = {s.name: s for s in (spec("a", capabilities=frozenset({"chat", need})), spec("b"), spec("c"))}
    found = check(query, specs, engines={"a": frozenset(), "b": frozenset({need}), "c": frozenset()})
    assert found.experts == {"a", "b"}
    assert found.removed["c"].startswith(f"{need}: it cannot ")


@pytest.mark.parametrize("need", ["tools", "vision"])
def test_tools_and_images_need_the_expert_and_its_engine(need):
    query = replace(Query.of("hi"), needs=frozenset({need}))
    able = frozenset({"chat", need})
    specs = {s.name: s for s in (spec("a", capabilities=able), spec("b"), spec("c", capabilities=able))}
    found = check(query, specs, engines={"a": frozenset({need}), "b": frozenset({need}), "c": frozenset()})
    assert found.experts == {"a"}
    assert found.removed["c"].startswith(f"{need}: the engine that serves it cannot ")


def test_an_engine_that_constrains_its_output_promises_json_for_every_expert():
    query = replace(Query.of("hi"), format="json")
    assert check(query, {"b": spec("b")}, engines={"b": frozenset({"json_schema"})}).experts == {"b"}
    assert check(query, {"b": spec("b")}, engines={"b": frozenset()}).removed == {"b": "json: it does not promise JSON"}


def test_an_error_states_each_reason_once_with_the_experts():
    many = {name: spec(name, context_length=10_000) for name in ("a", "b", "c")}
    query = Query.of("hi", tools=({"type": "function"},))
    with pytest.raises(NoEligibleExpert) as caught:
        prune([query], {**many, "embedder": SPECS["embedder"]})
    assert str(caught.value) == (
        "no expert can take this query: a, b, c (tools: it cannot call tools); embedder (modality: it cannot chat)"
    )


def test_an_error_about_many_reasons_is_short():
    different = {f"e{i}": spec(f"e{i}", context_length=100 + i) for i in range(5_000)}
    with pytest.raises(NoEligibleExpert, match=r"fit its 109\) and 4990 more$") as error:
        prune([Query.of("hi", max_tokens=9_000)], different)
    assert len(str(error.value)) < 2_000
