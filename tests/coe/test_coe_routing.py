"""Decisions with all their inputs: reproducible later, and one bad query affects no other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from coe.compose import ExpertCall, ExpertCalls, FallbackOnly, Final, Single, WithFallback
from coe.compose.fallback import CHOSEN_SHARE
from coe.engines import Capabilities
from coe.errors import CoeError, EngineError, InvalidRequest, RoutingFailed
from coe.policy import Always, Policy
from coe.routing import Routed, bypass, route
from coe.tokens import TokenCounter, Tokenizers
from coe.types import Answer, Failure, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Message, Query, RoutingDecision
from routers.constraints import CONTEXT_LENGTH
from routers.decision import Utility
from routers.errors import NoEligibleExpert, RouterError
from routers.selectors import TopK

SNAPSHOT = Snapshot(
    1,
    {
        name: ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", context_length=length)
        for name, length in (("a", 100), ("b", None), ("c", None))
    },
)


@dataclass
class ByLength:
    """Quality by the length of the text: the longer, the better `b` is; `c` knows no cost."""

    cost: Mapping[str, float] | None = None
    batches: tuple[int, ...] = ()
    requires: frozenset[str] = frozenset()

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        self.batches += (len(queries),)
        length = np.array([len(query.text) for query in queries])
        quality = np.stack([np.full(len(queries), 0.5), length / 100, np.full(len(queries), 0.5)], axis=1)
        cost = None if self.cost is None else np.tile(list(self.cost.values()), (len(queries), 1))
        return Estimate(("a", "b", "c"), quality, cost_usd=cost, reasons=tuple(map(str, length)))


def decided(outcomes: Sequence[Routed | RouterError | CoeError]) -> list[RoutingDecision]:
    return [outcome.decision for outcome in outcomes if isinstance(outcome, Routed)]


def test_a_batch_decides_each_query_as_it_would_be_decided_alone() -> None:
    queries = [Query.of("x" * n, cost_weight=cost_weight) for n, cost_weight in ((10, None), (90, None), (90, 2.0))]
    policy = Policy("p", ByLength({"a": 0.1, "b": 0.4, "c": 0.2}), utility=Utility(cost_weight=0.1), select=TopK(2))
    together = decided(route(queries, policy, SNAPSHOT, {}))
    assert together == [decided(route([query], policy, SNAPSHOT, {}))[0] for query in queries]
    assert [decision.experts[0] for decision in together] == ["a", "b", "a"]


def test_what_a_decision_was_made_from_makes_it_again() -> None:
    policy = Policy("p", ByLength(), utility=Utility(latency_weight=0.1), select=TopK(3))
    [routed] = route([Query.of("x" * 55, allowed=frozenset("abc"))], policy, SNAPSHOT, {"b": 1.0})
    assert isinstance(routed, Routed) and routed.inputs is not None and routed.policy is policy
    assert routed.inputs.decide() == routed.decision and routed.decision.experts == ("a", "c", "b")
    waited = replace(routed.inputs, load_s={})
    assert waited.decide().experts == ("b", "a", "c")


def test_a_seed_breaks_ties_by_chance_always_the_same_one() -> None:
    policy = Policy("p", ByLength())
    plain, *seeded = [Query.of("x"), *(Query.of("x", seed=seed) for seed in range(20))]
    first = [d.experts[0] for d in decided(route([plain, *seeded], policy, SNAPSHOT, {}))]
    again = [d.experts[0] for d in decided(route([plain, *seeded], policy, SNAPSHOT, {}))]
    assert first == again and first[0] == "a" and set(first[1:]) == {"a", "c"}


def test_a_query_without_an_eligible_expert_does_not_disturb_the_others() -> None:
    router = ByLength()
    queries = [Query.of("x"), Query.of("y", tools=({"type": "function"},)), Query.of("x" * 90)]
    one, nobody, two = route(queries, Policy("p", router), SNAPSHOT, {})
    assert decided([one, two])[1].experts == ("b",) and router.batches == (2,)
    assert isinstance(nobody, NoEligibleExpert) and "tools" in str(nobody)
    assert route([queries[1]], Policy("p", router), SNAPSHOT, {})[0].__class__ is NoEligibleExpert
    assert route([], Policy("p", router), SNAPSHOT, {}) == [] and router.batches == (2,)


def test_a_cost_weight_that_the_router_cannot_price_is_refused_to_its_own_query_only() -> None:
    fine, refused = route([Query.of("x"), Query.of("x", cost_weight=1.0)], Policy("p", ByLength()), SNAPSHOT, {})
    assert isinstance(fine, Routed) and isinstance(refused, RouterError) and "knows no costs" in str(refused)


def test_naming_an_expert_bypasses_the_router_but_not_what_it_can_do() -> None:
    routed = bypass(Query.of("hi"), "a", SNAPSHOT.experts)
    assert routed.decision.experts == ("a",) and routed.inputs is None and routed.policy is None
    with pytest.raises(InvalidRequest, match="'a'.*does not promise JSON"):
        bypass(Query.of("hi", format="json"), "a", SNAPSHOT.experts)
    assert bypass(Query.of("x" * 1000), "a", SNAPSHOT.experts).decision.experts == ("a",)  # the engine counts exactly


def test_the_fallback_is_part_of_the_composition_where_the_caller_lets_it_in() -> None:
    policy = Policy("p", ByLength(), fallback="c")
    inside, outside = route([Query.of("x"), Query.of("x", allowed=frozenset("a"))], policy, SNAPSHOT, {})
    assert isinstance(inside, Routed) and isinstance(inside.composition, WithFallback)
    assert isinstance(outside, Routed) and isinstance(outside.composition, Single)


def test_a_fallback_steps_in_once_and_its_own_failure_is_the_answer() -> None:
    request = GenerateRequest(messages=(Message("user", "hi"),))
    decision = RoutingDecision(("a",), (1.0,), (1.0,), 1.0)
    composition = WithFallback(Single(), "c")
    down = {"0": Failure("a", EngineError("a is down"))}
    assert composition.step(request, decision, {}) == ExpertCalls(
        (ExpertCall("0", "a", request),), last=True, deadline_share=CHOSEN_SHARE
    )
    why = ("a failed: EngineError: a is down",)
    assert composition.step(request, decision, down) == ExpertCalls(
        (ExpertCall("fallback", "c", request),), last=True, notes=why
    )
    answer = Answer("c", "hello", "stop", Usage(1, 1))
    assert composition.step(request, decision, {**down, "fallback": answer}) == Final(replace(answer, notes=why))
    with pytest.raises(EngineError, match="c too"):
        composition.step(request, decision, {**down, "fallback": Failure("c", EngineError("c too"))})
    with pytest.raises(InvalidRequest, match="too long"):
        composition.step(request, decision, {"0": Failure("a", InvalidRequest("too long"))})


def test_an_expert_whose_engine_cannot_do_what_a_query_needs_is_removed_before_any_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    able = {n: replace_spec(spec, capabilities=frozenset({"chat", "tools"})) for n, spec in SNAPSHOT.experts.items()}
    snapshot, query = Snapshot(1, able), Query.of("x", tools=({"type": "function"},))
    router = ByLength()
    monkeypatch.setattr("coe.engines._names", lambda kind: Capabilities().names)
    [refused] = route([query], Policy("p", router), snapshot, {})
    assert isinstance(refused, NoEligibleExpert) and router.batches == ()
    assert ": a, b, c (tools: the engine that serves it cannot call tools)" in str(refused)
    with pytest.raises(InvalidRequest, match="'b'.*the engine that serves it cannot call tools"):
        bypass(query, "b", snapshot.experts)
    monkeypatch.setattr("coe.engines._names", lambda kind: Capabilities(tools=True).names)
    assert decided(route([query], Policy("p", router), snapshot, {}))[0].experts == ("a",)
    [nobody] = route([query], Policy("p", router), SNAPSHOT, {})
    assert isinstance(nobody, NoEligibleExpert), "the engine alone is not enough: the expert must be able to as well"


def replace_spec(spec: ExpertSpec, **fields: object) -> ExpertSpec:
    return spec.model_copy(update=fields)


def words(n: int) -> str:
    return "word " * n


def counted(snapshot: Snapshot) -> TokenCounter:
    return TokenCounter(snapshot, Tokenizers())


def snapshot_of(**lengths: int | None) -> Snapshot:
    kinds = {"kind": Kind.MODEL, "source": "fake://echo"}
    return Snapshot(1, {name: ExpertSpec(name=name, context_length=n, **kinds) for name, n in lengths.items()})  # type: ignore[arg-type]


def test_an_expert_without_room_for_the_answer_is_not_chosen_however_well_it_scores() -> None:
    snapshot, policy = snapshot_of(a=2000, b=2000, c=32_000), Policy("p", ByLength())
    for query, chosen in (
        (Query.of("x" * 90), "b"),
        (Query.of("x" * 90, max_tokens=1900), "b"),
        (Query.of("x" * 90, max_tokens=5000), "c"),
        (Query.of(words(1500), max_tokens=600), "c"),
        (Query.of(words(1500), max_tokens=500), "b"),
        (Query.of(words(1999)), "c"),
        (Query.of(words(1900)), "b"),
    ):
        [routed] = route([query], policy, snapshot, {}, counted(snapshot))
        assert isinstance(routed, Routed) and routed.decision.experts == (chosen,)
        assert routed.inputs is not None and routed.inputs.decide() == routed.decision


def test_the_counts_of_a_decision_are_among_its_inputs_and_its_reasons_beside_it() -> None:
    snapshot = snapshot_of(a=2000, b=2000, c=None)
    [routed] = route([Query.of(words(1990), max_tokens=50)], Policy("p", ByLength()), snapshot, {}, counted(snapshot))
    assert isinstance(routed, Routed) and routed.inputs is not None and routed.eligible is not None
    assert routed.inputs.prompt_tokens == {"a": 1990, "b": 1990} and routed.inputs.allowed == {"c"}
    why = "context length: at least 1990 tokens and 50 for the answer do not fit its 2000"
    assert routed.eligible.removed == {"a": why, "b": why}
    [short] = route([Query.of("hi")], Policy("p", ByLength()), snapshot, {}, counted(snapshot))
    assert isinstance(short, Routed) and short.inputs is not None and short.inputs.prompt_tokens == {}


def test_an_estimate_leaves_the_only_expert_that_the_router_knows_to_decide() -> None:
    remote = {"kind": Kind.REMOTE, "source": "https://host/v1"}
    experts = {name: ExpertSpec(name=name, context_length=n, **remote) for name, n in (("a", 100), ("big", 9000))}  # type: ignore[arg-type]
    snapshot, query = Snapshot(1, experts), Query.of("नमस्ते " * 300)
    [routed] = route([query], Policy("p", Always("a"), fallback="big"), snapshot, {}, counted(snapshot))
    assert isinstance(routed, Routed) and routed.decision.experts == ("a",)
    assert isinstance(routed.composition, WithFallback), "its refusal leads to the fallback"


def test_an_expert_with_room_stands_by_where_only_the_chosen_one_can_count() -> None:
    remote = {"kind": Kind.REMOTE, "source": "https://host/v1"}
    lengths = {"a": None, "b": 400, "c": 400}
    snapshot = Snapshot(1, {n: ExpertSpec(name=n, context_length=length, **remote) for n, length in lengths.items()})  # type: ignore[arg-type]
    unsure, sure = Query.of("नमस्ते " * 70), Query.of("x" * 90)
    [routed] = route([unsure], Policy("p", ByLength()), snapshot, {}, counted(snapshot))
    assert isinstance(routed, Routed) and routed.eligible is not None and routed.eligible.unsure == {"b", "c"}
    assert routed.decision.experts == ("b",) and isinstance(routed.composition, WithFallback)
    assert routed.composition.expert == "a"
    [plain] = route([sure], Policy("p", ByLength()), snapshot, {}, counted(snapshot))
    assert isinstance(plain, Routed) and isinstance(plain.composition, Single)
    [two] = route([unsure], Policy("p", ByLength(), select=TopK(2)), snapshot, {}, counted(snapshot))
    assert isinstance(two, Routed) and two.decision.experts == ("b", "a") and isinstance(two.composition, Single)
    [only] = route([replace(unsure, allowed=frozenset("bc"))], Policy("p", ByLength()), snapshot, {})
    assert isinstance(only, Routed) and isinstance(only.composition, Single), "nobody else may answer"


def test_the_fallback_answers_a_query_that_no_expert_of_the_router_can_take() -> None:
    snapshot = snapshot_of(a=100, b=100, c=100, big=10_000)
    policy = Policy("p", ByLength(), fallback="big")
    reasons = {
        "at least 200 tokens": Query.of(words(200)),
        "500 tokens for the answer": Query.of("hi", max_tokens=500),
        "this router only knows a, b, c": Query.of("x", allowed=frozenset({"big"})),
    }
    for why, query in reasons.items():
        [routed] = route([query], policy, snapshot, {}, counted(snapshot))
        assert isinstance(routed, Routed) and routed.inputs is not None
        decision = routed.decision
        assert decision.experts == ("big",) and decision.fallback and decision.confidence == 0.0
        assert why in decision.reason and decision.reason.endswith("the fallback big answers")
        assert routed.inputs.decide() == decision
        request = GenerateRequest(messages=(Message("user", "hi"),))
        call = ExpertCall("fallback", "big", request)
        assert routed.composition.step(request, decision, {}) == ExpertCalls(
            (call,), last=True, notes=(decision.reason,)
        )
        done = Answer("big", "hello", "stop", Usage(1, 1))
        assert routed.composition.step(request, decision, {"fallback": done}) == Final(
            replace(done, notes=(decision.reason,))
        )
        with pytest.raises(EngineError, match="down"):
            routed.composition.step(request, decision, {"fallback": Failure("big", EngineError("down"))})


def test_a_fallback_that_cannot_take_the_query_either_is_named_with_its_reason() -> None:
    snapshot = snapshot_of(a=100, b=100, c=100, big=150)
    policy = Policy("p", ByLength(), fallback="big")
    [nobody] = route([Query.of(words(200))], policy, snapshot, {}, counted(snapshot))
    assert isinstance(nobody, NoEligibleExpert) and nobody.constraints == {CONTEXT_LENGTH}
    assert "big (context length: at least 200 tokens do not fit its 150)" in str(nobody)
    [outside] = route([Query.of(words(200), allowed=frozenset({"a"}))], policy, snapshot_of(a=100, big=None), {})
    assert isinstance(outside, Routed), "without a counter the expert decides"
    [inside] = route([Query.of("hi", max_tokens=120)], Policy("p", ByLength(), fallback="big"), snapshot, {})
    assert isinstance(inside, Routed) and inside.decision.experts == ("big",)
    [without] = route([Query.of("hi", max_tokens=120)], Policy("p", ByLength()), snapshot, {})
    assert isinstance(without, NoEligibleExpert) and without.constraints == {CONTEXT_LENGTH}
    assert "big" not in str(without), "the router does not know it"


def test_a_query_for_the_fallback_does_not_disturb_the_others_of_its_batch() -> None:
    snapshot = snapshot_of(a=100, b=100, c=100, big=None)
    policy = Policy("p", ByLength(), fallback="big", select=TopK(2))
    queries = [Query.of("x" * 90), Query.of(words(200)), Query.of("x")]
    found = decided(route(queries, policy, snapshot, {}, counted(snapshot)))
    assert [decision.experts for decision in found] == [("b", "a"), ("big",), ("a", "c")]
    assert [decision.fallback for decision in found] == [False, True, False]


def test_a_fallback_that_cannot_take_the_query_is_not_called_after_the_others() -> None:
    snapshot = snapshot_of(a=5000, b=5000, c=5000, small=100)
    policy = Policy("p", ByLength(), fallback="small")
    short, long = route([Query.of("x"), Query.of(words(200))], policy, snapshot, {}, counted(snapshot))
    assert isinstance(short, Routed) and isinstance(short.composition, WithFallback)
    assert isinstance(long, Routed) and isinstance(long.composition, Single)


class Broken(Always):
    """Fails on queries with the word `break`."""

    error: BaseException = ZeroDivisionError("a secret of the router")

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        if any("break" in query.text for query in queries):
            raise self.error
        return super().estimate(queries)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("a secret of the router"), RouterError("a secret"), SystemExit(1), StopIteration()]
)
def test_the_fallback_answers_the_queries_on_which_the_router_fails(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = snapshot_of(a=1000, b=1000, c=1000)
    router = Broken("a")
    router.error = error
    queries = [Query.of("hi"), Query.of("break it"), Query.of("hi"), Query.of("break", allowed=frozenset({"a"}))]
    first, broken, other, barred = route(queries, Policy("p", router, fallback="b"), snapshot, {})
    for routed in (first, other):
        assert isinstance(routed, Routed) and routed.decision.experts == ("a",)
    assert isinstance(broken, Routed) and isinstance(broken.composition, FallbackOnly) and broken.inputs is not None
    assert broken.decision == broken.inputs.decide() and broken.decision.experts == ("b",)
    assert broken.decision.reason == f"the router failed: {type(error).__name__}; the fallback b answers"
    assert isinstance(barred, RoutingFailed | RouterError), "the caller excludes the fallback"
    assert "the router of policy 'p' failed" in caplog.text


def test_without_a_fallback_a_router_that_fails_is_one_error() -> None:
    [failed] = route([Query.of("break")], Policy("p", Broken("a")), snapshot_of(a=1000), {})
    assert isinstance(failed, RoutingFailed) and failed.client_text is None
    assert str(failed) == "the router of policy 'p' failed: ZeroDivisionError: a secret of the router"
