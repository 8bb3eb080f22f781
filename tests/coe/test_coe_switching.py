"""The expert of the previous turns, the price of leaving it, and that a decision with both replays."""

from collections.abc import Sequence

import numpy as np
import pytest
from finished_requests import finished

from coe.policy import Policy
from coe.routing import Routed, route
from coe.serve.decisions.entry import decode, encode
from coe.serve.decisions.replay import replay
from coe.switching import PREFILL_PER_GENERATED, PREFILL_TOKENS_PER_S, tokens
from registry.spec import ExpertSpec, Kind, Price
from registry.store import Snapshot
from routers.base import Estimate, Message, Query
from routers.decision import Switch, Utility, decide
from routers.errors import RouterError

EXPERTS = ("sql", "shell", "general")
PRICE = Price(input_usd_per_mtok=10.0, output_usd_per_mtok=30.0)
SNAPSHOT = Snapshot(1, {e: ExpertSpec(name=e, kind=Kind.MODEL, source="fake://echo", price=PRICE) for e in EXPERTS})
SQL, SHELL = "Count the rows of the table orders for me, please.", "Please rename the file old.log to new.log for me."


class Words:
    """sql and shell differ by `gap` where a query names a table or a file."""

    requires: frozenset[str] = frozenset()

    def __init__(self, gap: float = 0.5) -> None:
        self._gap = gap

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        rows = [[0.4 + self._gap * ("table" in q.text), 0.4 + self._gap * ("file" in q.text), 0.4] for q in queries]
        return Estimate(EXPERTS, np.array(rows), cost_usd=np.full((len(rows), 3), 0.001))


def talk(*texts: str, answer: str = "done", **kwargs: object) -> Query:
    messages = [m for text in texts for m in (Message("user", text), Message("assistant", answer))]
    return Query(tuple(messages[:-1]), **kwargs)  # type: ignore[arg-type]


def routed(query: Query, *, gap: float = 0.5, **weights: float) -> Routed:
    policy = Policy("default", Words(gap), utility=Utility(**{"switch_weight": 1.0, **weights}))
    (found,) = route([query], policy, SNAPSHOT, {})
    assert isinstance(found, Routed) and found.inputs is not None
    return found


def switch(query: Query, **weights: float) -> Switch | None:
    found = routed(query, **weights)
    assert found.inputs is not None
    return found.inputs.switch


def test_a_conversation_moves_where_the_gain_pays_and_stays_where_it_does_not() -> None:
    long = "a row " * 4000  # 24 kB: 6,000 tokens, 1.2 s
    assert routed(talk(SQL, SHELL, answer=long), gap=0.5, switch_weight=0.1).decision.experts == ("shell",)
    assert routed(talk(SQL, SHELL, answer=long), gap=0.5, switch_weight=1.0).decision.experts == ("sql",)
    assert routed(talk(SQL, SHELL), gap=0.5, switch_weight=1.0).decision.experts == ("shell",)
    assert routed(talk(SQL, SHELL, answer=long), gap=0.5, switch_weight=0.0).decision.experts == ("shell",)


def test_the_price_is_that_of_prefilling_what_the_previous_expert_has_read() -> None:
    query = talk(SQL, SHELL, answer="x" * 8000)
    found = switch(query)
    assert found is not None and found.previous == "sql"
    assert found.tokens == tokens(query.messages[:2]) == (len(SQL) + 8000) // 4 + 8
    assert found.seconds["shell"] == pytest.approx(found.tokens / PREFILL_TOKENS_PER_S)
    assert found.cost_usd["shell"] == pytest.approx(found.tokens * 10e-6)
    utility = Utility(cost_weight=2.0, switch_weight=3.0)
    assert found.price("shell", utility) == pytest.approx(3 * found.seconds["shell"] + 2 * found.cost_usd["shell"])
    assert found.price("sql", utility) == 0.0 == found.price("shell", Utility(cost_weight=2.0))


def test_a_measured_expert_prefills_in_proportion_to_its_speed_of_generating() -> None:
    fast = Snapshot(1, SNAPSHOT.experts, {"shell": 1000.0})
    policy = Policy("default", Words(), utility=Utility(switch_weight=1.0))
    (found,) = route([talk(SQL, SHELL, answer="x" * 8000)], policy, fast, {})
    assert isinstance(found, Routed) and found.inputs and found.inputs.switch
    seconds, tokens_held = found.inputs.switch.seconds, found.inputs.switch.tokens
    assert seconds["shell"] == pytest.approx(tokens_held / (1000 * PREFILL_PER_GENERATED))
    assert seconds["general"] == pytest.approx(tokens_held / PREFILL_TOKENS_PER_S)


def test_every_utility_but_that_of_the_previous_expert_loses_the_price() -> None:
    query = talk(SQL, "and then?", answer="x" * 4000)
    free, priced = routed(query, switch_weight=0.0), routed(query)
    assert free.inputs is not None and priced.inputs is not None and priced.inputs.switch is not None
    assert repr(free.inputs.estimate) == repr(priced.inputs.estimate)
    lost = priced.inputs.switch.price("shell", priced.inputs.utility)
    estimate = Estimate(EXPERTS, priced.inputs.estimate.quality)
    (a,) = decide(estimate, k=3)
    (b,) = decide(estimate, k=3, utility=priced.inputs.utility, switch=[priced.inputs.switch])
    was, now = (dict(zip(one.experts, one.scores, strict=True)) for one in (a, b))
    assert now == pytest.approx({"sql": was["sql"], "shell": was["shell"] - lost, "general": was["general"] - lost})


@pytest.mark.parametrize(
    "query",
    [
        Query.of(SQL),
        Query((Message("assistant", "Hello!"), Message("user", SQL))),
        Query((Message("user", SQL), Message("user", SHELL))),
        talk(SQL, SHELL, raw=True),
    ],
    ids=["one turn", "assistant first", "no answer yet", "raw"],
)
def test_there_is_no_previous_expert(query: Query) -> None:
    assert switch(query) is None


def test_the_previous_expert_is_found_turn_by_turn() -> None:
    found = switch(talk(SQL, "and then?", SHELL, "why?", SQL))
    assert found is not None and found.previous == "shell"


def test_the_previous_expert_stayed_where_a_switch_did_not_pay_then_either() -> None:
    long = "x" * 40_000  # 2 s for each turn
    found = switch(talk(SQL, SHELL, "and then?", answer=long))
    assert found is not None and found.previous == "sql"


def test_an_empty_answer_is_an_answer_of_the_expert_of_its_turn() -> None:
    found, other = switch(talk(SQL, SHELL, answer="")), switch(talk(SQL, SHELL, answer="done"))
    assert found is not None and other is not None and found.previous == other.previous == "sql"
    assert found.tokens == tokens((Message("user", SQL), Message("assistant", ""))) == other.tokens - 1


def test_in_an_agent_loop_the_expert_that_called_the_tool_is_the_previous_one() -> None:
    query = Query(
        (
            *(Message("user", SQL), Message("assistant", "ok"), Message("user", SHELL)),
            *(Message("assistant", "call"), Message("tool", "27 rows of a table")),
        )
    )
    found = switch(query)
    assert found is not None and found.previous == "shell" and found.tokens == tokens(query.messages[:4])
    assert routed(query).decision.experts == ("shell",)


def test_the_caller_may_state_the_previous_expert() -> None:
    found = switch(talk(SQL, "and then?", previous="general"))
    assert found is not None and found.previous == "general"
    alone = switch(Query((Message("system", "x" * 400), Message("user", SQL)), previous="shell"))
    assert alone is not None and alone.tokens == 104
    policy = Policy("default", Words(), utility=Utility(switch_weight=1.0), reads="last")
    stated, derived = route([talk(SQL, "why?", previous="sql"), talk(SQL, "why?")], policy, SNAPSHOT, {})
    assert isinstance(stated, Routed) and stated.inputs and stated.inputs.switch
    assert stated.inputs.switch.previous == "sql"
    assert isinstance(derived, Routed) and derived.inputs and derived.inputs.switch is None


def test_a_decision_of_a_conversation_replays_from_the_log() -> None:
    for query in (talk(SQL, "and then?", answer="x" * 9000), talk(SQL, SHELL, previous="general"), Query.of(SQL)):
        one = routed(query, cost_weight=1.0)
        entry = decode(encode(finished(routed=one), texts=True), "log:1")
        assert entry.query == query and entry.inputs is not None and one.inputs is not None
        assert entry.inputs.turns == one.inputs.turns and entry.inputs.switch == one.inputs.switch
        assert (replay([entry]).repeated, replay([entry]).differing) == (1, 0)


def test_queries_of_a_batch_have_switches_of_their_own() -> None:
    queries = [Query.of(SQL), talk(SQL, SHELL), talk(SHELL, "why?", "and then?"), talk(SHELL, SQL, "why?", "why?")]
    policy = Policy("default", Words(), utility=Utility(switch_weight=1.0))
    together = route(queries, policy, SNAPSHOT, {})
    for query, outcome in zip(queries, together, strict=True):
        (alone,) = route([query], policy, SNAPSHOT, {})
        assert isinstance(outcome, Routed) and isinstance(alone, Routed)
        assert outcome.decision == alone.decision and repr(outcome.inputs) == repr(alone.inputs)


def test_bad_switches_are_refused() -> None:
    with pytest.raises(RouterError, match="seconds of a switch"):
        Switch("a", 1, {}, {"b": float("nan")})
    with pytest.raises(RouterError, match="1 switches for 2 queries"):
        decide(Estimate(EXPERTS, np.zeros((2, 3))), switch=[None])
