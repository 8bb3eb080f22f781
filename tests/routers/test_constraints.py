"""Constraints: who may answer, which constraint removed the others, and errors that name it with both numbers."""

from __future__ import annotations

import pytest

from registry.spec import ExpertSpec, Kind
from routers.base import Message, Query
from routers.constraints import check, estimate_tokens, prune
from routers.errors import NoEligibleExpert


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


def test_the_whole_conversation_must_fit_the_context():
    history = tuple(Message("user", "four" * 100) for _ in range(3))  # 300 tokens and a few
    found = check(Query(messages=(*history, Message("user", "and now?"))), SPECS)
    assert found.experts == {"long", "able", "endless"}
    assert found.removed["short"] == "context length: about 318 tokens do not fit its 100"
    assert found.removed["adapter"].endswith("its 100")  # its base's context


def test_the_answer_needs_room_too():
    query = Query.of("four" * 80)
    assert "short" in check(query, SPECS).experts
    removed = check(query, SPECS, answer_tokens=50).removed
    assert removed["short"] == "context length: about 84 tokens and 50 for the answer do not fit its 100"


def test_tools_and_json_ask_for_experts_that_have_them():
    tools = Query.of("hi", tools=({"type": "function", "function": {"name": "f"}},))
    assert check(tools, SPECS).experts == {"able"}
    assert check(tools, SPECS).removed["long"] == "tools: it cannot call tools"
    as_json = Query.of("hi", format="json")
    assert check(as_json, SPECS).experts == {"able"}
    assert check(as_json, SPECS).removed["long"] == "json: it does not promise JSON"


def test_only_allowed_experts_may_answer():
    found = check(Query.of("hi", allowed=frozenset({"long", "unheard-of"})), SPECS)
    assert found.experts == {"long"}
    assert found.removed["short"] == "allowed experts: the caller does not allow it"


def test_no_expert_left_names_every_constraint_and_both_numbers():
    with pytest.raises(NoEligibleExpert) as error:
        prune([Query.of("hi"), Query.of("four" * 500, id="q7", allowed=frozenset({"short", "embedder"}))], SPECS)
    assert str(error.value) == (
        "no expert can take query q7: short (context length: about 504 tokens do not fit its 100); "
        "embedder (modality: it cannot chat)"
    )
    assert error.value.constraints == {"context length", "modality"}
    with pytest.raises(NoEligibleExpert, match=r"ghost \(allowed experts: not registered; registered: short, long"):
        prune([Query.of("hi", allowed=frozenset({"ghost"}))], SPECS)
    with pytest.raises(NoEligibleExpert, match="this query: none is registered"):
        prune([Query.of("hi")], {})


def test_tokens_are_estimated_without_a_tokenizer():
    assert estimate_tokens(Query.of("abcdefgh")) == 2 + 4
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
