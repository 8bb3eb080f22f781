"""Votes: the winner, the returned answer, the usage, and failing experts."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_experts import LISTED, REQUEST, answer, decision, prior, run

from coe.compose import Cascade, Composition, ExpertCalls, Vote, WeightedVote, build_composition
from coe.compose.weighted_vote import evidence, head_start
from coe.errors import ConfigError, ContextLengthExceeded, EngineError, InvalidRequest
from coe.types import Timing, Usage
from routers.base import RoutingDecision

THREE = decision(a=0.8, b=0.6, c=0.5)
DOWN, WRONG = EngineError("down"), ContextLengthExceeded("b", prompt_tokens=9, max_tokens=1, context_length=8)


def test_the_majority_wins_and_its_best_expert_is_quoted_in_full() -> None:
    final, rounds = run(Vote(), THREE, {"a": "It is 4. The answer is C", "b": "The answer is (B).", "c": "B"})
    assert (final.expert, final.text) == ("b", "The answer is (B).")
    assert rounds == [["a", "b", "c"]]


def test_what_all_of_them_took_is_disclosed() -> None:
    timed = {
        "a": answer("a", "C", 0.5, Timing(0, 0, 2)),
        "b": answer("b", "B", 0.25, Timing(1, 2, 3)),
        "c": answer("c", "B", 0.125, Timing(0, 0, 4)),
    }
    final, _ = run(Vote(), THREE, timed)
    assert (final.usage, final.cost_usd, final.timing) == (Usage(30, 6), 0.875, Timing(1, 2, 3))


def test_a_cost_that_is_unknown_leaves_the_sum_unknown() -> None:
    final, _ = run(Vote(), THREE, {"a": "A", "b": answer("b", "A", None), "c": "A"})
    assert final.cost_usd is None


def test_ties_go_to_the_side_of_the_best_expert() -> None:
    assert run(Vote(), THREE, {"a": "C", "b": "B", "c": "A"})[0].expert == "a"
    four = decision(a=0.8, b=0.6, c=0.5, d=0.4)
    assert run(Vote(), four, {"a": "A", "b": "B", "c": "B", "d": "A"})[0].expert == "a"
    cheap_first = decision(a=0.4, b=0.6)
    assert run(Vote(), cheap_first, {"a": "A", "b": "B"})[0].expert == "b"


def test_who_says_nothing_does_not_vote() -> None:
    assert run(Vote(), THREE, {"a": "", "b": " ", "c": "B"})[0].text == "B"
    assert run(Vote(key="choice"), THREE, {"a": "no idea", "b": "no idea", "c": "B"})[0].expert == "c"
    assert run(Vote(), THREE, {"a": "", "b": "", "c": ""})[0].expert == "a"


IDK = "I don't know."


@pytest.mark.parametrize("composition", [Vote(), WeightedVote(), Cascade(), Cascade(confidence=0.5), Vote(key="text")])
def test_refusals_do_not_vote_and_are_noted(composition: Composition) -> None:
    final, _ = run(composition, THREE, {"a": IDK, "b": "I'm sorry, but I can't help with that.", "c": "Paris"})
    assert (final.expert, final.text) == ("c", "Paris")
    assert final.notes == ("a gave no answer (refusal)", "b gave no answer (refusal)")


@pytest.mark.parametrize("composition", [Vote(), WeightedVote(), Cascade()])
def test_if_all_refuse_the_best_refusal_is_the_answer(composition: Composition) -> None:
    final, _ = run(composition, THREE, {"a": IDK, "b": IDK, "c": "Keine Ahnung."})
    assert (final.expert, final.text) == ("a", IDK)


def test_an_answer_without_a_key_is_better_than_a_refusal() -> None:
    final, _ = run(Vote(key="number"), THREE, {"a": IDK, "b": IDK, "c": "Many of them."})
    assert final.text == "Many of them."


def test_thinking_text_does_not_vote_unless_a_setting_keeps_it() -> None:
    says = {"a": "<think>Maybe A.</think>B", "b": "<think>Is it C?</think>The answer is B", "c": "C"}
    assert run(Vote(), THREE, says)[0].expert == "a"
    assert run(Vote(key="text", keep_thinking=True), THREE, says)[0].text == says["a"]  # all differ
    unsure = {"a": "<think>I don't know. Perhaps 4?</think>4", "b": "<think>4?</think>I don't know.", "c": "5"}
    assert run(Vote(), THREE, unsure)[0].text == unsure["a"]


def test_the_rest_decide_when_some_fail() -> None:
    final, _ = run(Vote(), THREE, {"a": DOWN, "b": "B", "c": "C"})
    assert (final.expert, final.cost_usd) == ("b", 2.0)


@pytest.mark.parametrize("composition", [Vote(), WeightedVote()])
def test_when_all_fail_the_last_error_is_raised_and_a_rejection_only_if_all_reject(
    composition: Composition,
) -> None:
    with pytest.raises(EngineError, match="also down"):
        run(composition, THREE, {"a": DOWN, "b": DOWN, "c": EngineError("also down")})
    with pytest.raises(EngineError, match="down"):
        run(composition, THREE, {"a": DOWN, "b": WRONG, "c": WRONG})
    with pytest.raises(ContextLengthExceeded):
        run(composition, THREE, {"a": WRONG, "b": WRONG, "c": WRONG})
    with pytest.raises(InvalidRequest, match="of any expert"):
        run(composition, THREE, {"a": DOWN, "b": InvalidRequest("of any expert"), "c": DOWN})
    with pytest.raises(InvalidRequest, match="no expert can take this request: too long"):
        composition.step(REQUEST, RoutingDecision((), (), (), 0.0, reason="too long"), {})


@pytest.mark.parametrize("composition", [Vote(), WeightedVote()])
def test_one_expert_is_just_asked_and_may_be_streamed(composition: Composition) -> None:
    step = composition.step(REQUEST, decision(a=0.8), {})
    assert isinstance(step, ExpertCalls) and step.last and len(step.calls) == 1
    several = composition.step(REQUEST, THREE, {})
    assert isinstance(several, ExpertCalls) and not several.last and len({call.id for call in several.calls}) == 3


def test_the_weight_of_a_vote_is_the_log_odds_of_its_experts_quality() -> None:
    weights = evidence(decision(a=0.8, b=0.5, c=0.05, d=1.0), 10)
    assert weights[:2] == pytest.approx([math.log(4 * 9), math.log(9)])
    assert weights[2] == 0.0  # worse than guessing among ten: log(9 / 19) < 0
    assert weights[3] == pytest.approx(math.log(0.98 / 0.02 * 9))
    assert evidence(RoutingDecision(("a",), (1.0,), (1.0,), 1.0), 10) == [1.0]


def test_one_strong_expert_outweighs_two_weak_ones_when_few_options_make_agreement_cheap() -> None:
    says = {"a": "A", "b": "B", "c": "B"}
    strong = decision(a=0.9, b=0.6, c=0.6)  # log-odds 2.20 against 2 * 0.41
    assert run(WeightedVote(options=2), strong, says)[0].expert == "a"
    assert run(WeightedVote(options=10), strong, says)[0].expert == "b"  # 2.20 + 2.20 against 2 * (0.41 + 2.20)
    assert run(Vote(), strong, says)[0].expert == "b"


@settings(max_examples=50, deadline=None)
@given(
    qualities=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    texts=st.lists(st.sampled_from(["A", "B", "C", ""]), min_size=5, max_size=5),
    composition=st.sampled_from([Vote(), WeightedVote(), WeightedVote(options=3)]),
)
def test_any_vote_returns_an_answer_of_a_strongest_side(
    qualities: list[float], texts: list[str], composition: Vote | WeightedVote
) -> None:
    of = decision(**{f"e{i}": quality for i, quality in enumerate(qualities)})
    said = dict(zip(of.experts, texts, strict=False))
    final, [asked] = run(composition, of, said)
    assert asked == list(of.experts) and final.cost_usd == len(asked)
    weights = [1.0] * 5 if isinstance(composition, Vote) else evidence(of, composition.options)
    sides = {text: sum(w for w, t in zip(weights, said.values(), strict=False) if t == text) for text in said.values()}
    sides.pop("", None)
    if sides:
        assert sides[final.text] == pytest.approx(max(sides.values()))


def test_a_prior_gives_the_options_that_a_question_lists_a_head_start() -> None:
    # with weight log(9) on the words of the question: P(A), P(B), P(C) = 1/11, 9/11, 1/11
    ahead = head_start(prior(in_question=math.log(9)), LISTED)
    assert ahead == pytest.approx({"A": math.log(3 / 11), "B": math.log(27 / 11), "C": math.log(3 / 11)})
    assert head_start(prior(in_question=0.0), LISTED) == pytest.approx({"A": 0, "B": 0, "C": 0})
    assert head_start(prior(in_question=1.0), REQUEST) == {} == head_start(None, LISTED)


def test_the_prior_settles_close_votes_and_not_clear_ones(tmp_path: Path) -> None:
    prior(in_question=math.log(9)).write(tmp_path / "prior.json")
    vote = build_composition("weighted-vote", {"options": 3, "prior": str(tmp_path / "prior.json")})
    close, clear = decision(a=0.7, b=0.6), decision(a=0.95, b=0.5)
    says = {"a": "A", "b": "B"}
    assert run(WeightedVote(options=3), close, says, LISTED)[0].text == "A"
    assert run(vote, close, says, LISTED)[0].text == "B"
    assert run(vote, clear, says, LISTED)[0].text == "A"  # 19 : 1 against the prior's 1 : 9
    assert run(vote, close, {"a": "C", "b": "A"}, LISTED)[0].text == "C"  # an option without a vote does not win
    with pytest.raises(ConfigError, match="prior: .*none.json is not an option prior"):
        build_composition("cascade", {"prior": str(tmp_path / "none.json")})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("vot", {}, "no composition 'vot'; did you mean 'vote'"),
        ("vote", {"options": 3}, "composition 'vote' has no setting options; it has: key"),
        ("single", {"key": "auto"}, "it has: none"),
        ("vote", {"key": "letter"}, "no answer key 'letter'"),
        ("weighted-vote", {"options": 1}, "options must be a whole number of at least 2"),
        ("cascade", {"confidence": 0}, r"confidence must be a number in \(0, 1\], got 0"),
        ("cascade", {"confidence": "high"}, "confidence must be a number"),
    ],
)
def test_compositions_that_cannot_be_built_say_why(kind: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_composition(kind, settings)
