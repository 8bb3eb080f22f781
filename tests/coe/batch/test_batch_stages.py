"""The calls of a stage and their order; requests, decisions and answers as columns and back."""

from dataclasses import replace

import pytest

from coe.batch.records import RoutedRow, describe, dump_outcome, dump_request, load_outcome, load_request
from coe.batch.stages import Unit, compositions, plan_units, plan_work_items, step
from coe.compose import Aggregate, ExpertCall, Single, WithFallback, Without
from coe.errors import (
    CoeError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    Overloaded,
    Rejected,
    RemoteError,
    WeightsError,
)
from coe.types import Answer, Failure, GenerateRequest, Usage
from routers.base import Message, RoutingDecision

REQUEST = GenerateRequest(messages=(Message("user", "hi"),), stream=False)
DECISION = RoutingDecision(("a", "b"), (0.6, 0.4), (0.9, 0.8), 0.9, label="sums", reason="best")
ROW = RoutedRow(3, "x", "auto", None, REQUEST, policy="p", decision=DECISION)
BASES = {"base": "base", "tuned": "base", "also-tuned": "base", "alone": "alone"}


def answer(expert: str) -> Answer:
    return Answer(expert, f"{expert} says", "stop", Usage(3, 2), 0.5)


def test_a_row_goes_from_expert_to_expert_and_then_to_the_fallback() -> None:
    row = RoutedRow(**{**{f: getattr(ROW, f) for f in ROW.__slots__}, "fallback": "c"})
    composition = compositions({"p": Single}, {})(row)
    assert isinstance(composition, WithFallback)
    done: dict[str, Answer | Failure] = {}
    for expert in ("a", "b", "c"):
        following = step(row, composition, done)
        assert isinstance(following, tuple) and [call.expert for call in following] == [expert]
        done[following[0].id] = Failure(expert, EngineError(f"{expert} is down"))
    failed = step(row, composition, done)
    assert isinstance(failed, EngineError) and str(failed) == "c is down"
    done["fallback"] = answer("c")
    notes = ("a failed: EngineError: a is down", "b failed: EngineError: b is down")
    assert step(row, composition, done) == replace(answer("c"), notes=notes)


def test_a_fallback_that_failed_as_the_chosen_expert_is_no_further_stage() -> None:
    row = RoutedRow(1, "x", "auto", None, REQUEST, policy="p", fallback="b", decision=DECISION)
    composition = compositions({"p": Single}, {})(row)
    done: dict[str, Answer | Failure] = {"0": Failure("a", EngineError("a is down"))}
    for error, again in ((WeightsError("b is gone"), False), (Overloaded("b is busy"), True)):
        done["1"] = load_outcome(dump_outcome(0, "1", Failure("b", error)))
        following = step(row, composition, done)
        if again:
            assert isinstance(following, tuple) and [call.expert for call in following] == ["b"]
        else:
            assert isinstance(following, WeightsError) and str(following) == "b is gone"


def test_a_row_with_echo_is_answered_by_one_expert_though_its_policy_combines_texts() -> None:
    request_ = GenerateRequest(prompt="The capital is", echo=True, stream=False)
    row = replace(ROW, request=request_, fallback="c")
    composition = compositions({"p": lambda: Aggregate("d")}, {})(row)
    following = step(row, composition, {})
    assert isinstance(following, tuple) and [(call.expert, call.request) for call in following] == [("a", request_)]
    assert isinstance(composition, WithFallback) and composition.expert == "c"


def test_without_a_policy_the_named_expert_answers_alone() -> None:
    row = RoutedRow(1, "x", "a", None, REQUEST, decision=DECISION)
    assert isinstance(compositions({}, {})(row), Single)
    wrong = {"0": Failure("a", InvalidRequest("too long"))}
    assert isinstance(step(row, Single(), wrong), InvalidRequest)  # another expert would fail too


@pytest.mark.parametrize("code", ["context_length_exceeded", "content_filter", None])
def test_what_one_expert_rejects_the_next_stage_asks_of_another(code: str | None) -> None:
    row = RoutedRow(1, "x", "auto", None, REQUEST, policy="p", fallback="c", decision=DECISION)
    composition = compositions({"p": Single}, {})(row)
    done: dict[str, Answer | Failure] = {}
    for call, expert in (("0", "a"), ("1", "b"), ("fallback", "c")):
        following = step(row, composition, done)
        assert isinstance(following, tuple) and [(each.id, each.expert) for each in following] == [(call, expert)]
        error = Rejected(f"{expert} rejects it", status=413, code=code, public="short")
        done[call] = load_outcome(dump_outcome(0, call, Failure(expert, error)))
    last = step(row, composition, done)
    assert isinstance(last, Rejected) and str(last) == "c rejects it"
    assert (last.status, last.code, last.public) == (413, code or "invalid_request", "short")


def test_the_time_of_a_rate_limit_is_kept() -> None:
    error = RemoteError("later", retryable=True, status=429, retry_after_s=17)
    kept = load_outcome(dump_outcome(0, "0", Failure("a", error)))
    assert isinstance(kept, Failure) and isinstance(kept.error, RemoteError)
    assert (kept.error.status, kept.error.retry_after_s, kept.error.retryable) == (429, 17, True)


def test_units_are_by_expert_bases_before_their_adapters() -> None:
    names = ("tuned", "alone", "base", "also-tuned", "tuned")
    calls = [(i, ExpertCall("0", name, REQUEST)) for i, name in enumerate(names)]
    planned = plan_units(4, calls, BASES.__getitem__)
    assert [(unit.expert, unit.number, unit.calls) for unit, _ in planned] == [
        ("alone", 0, 1),
        ("base", 1, 1),
        ("also-tuned", 2, 1),
        ("tuned", 3, 2),
    ]
    assert [row for row, _ in planned[3][1]] == [0, 4] and planned[0][0] == Unit(4, 0, "alone", "alone", 1)


def unit(part: int, expert: str, calls: int) -> Unit:
    return Unit(part, 0, expert, BASES[expert], calls)


def test_one_host_takes_each_group_once_adapter_by_adapter() -> None:
    units = [unit(part, expert, 10) for part in (0, 1) for expert in ("alone", "tuned", "base")]
    first, second = plan_work_items(units, hosts=1)
    assert [(u.expert, u.part) for u in first] == [("base", 0), ("base", 1), ("tuned", 0), ("tuned", 1)]
    assert [(u.expert, u.part) for u in second] == [("alone", 0), ("alone", 1)]


def test_several_hosts_cut_only_what_is_more_than_their_share() -> None:
    units = [unit(part, "alone", 10) for part in range(6)] + [unit(0, "base", 10), unit(1, "tuned", 10)]
    items = plan_work_items(units, hosts=2)
    assert [sum(u.calls for u in item) for item in items] == [40, 20, 20]
    assert [item[0].residency for item in items] == ["alone", "alone", "base"]
    assert sorted((u for item in items for u in item), key=str) == sorted(units, key=str)
    assert plan_work_items([], hosts=2) == []


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        GenerateRequest(prompt="once"),
        GenerateRequest(
            messages=(Message("system", "s"), Message("user", "ü")),
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            stop=("a", "b"),
            seed=4,
            format="json",
            stream=False,
        ),
    ],
)
def test_requests_come_back_as_they_were(request_: GenerateRequest) -> None:
    assert load_request(dump_request(request_)) == request_


def test_routed_rows_and_answers_come_back_as_they_were() -> None:
    wrong = RoutedRow(1, "y", "auto", "/v1/completions", error=describe(InvalidRequest("no")))
    for row in (ROW, wrong):
        assert RoutedRow.of(row.record()) == row
    assert load_outcome(dump_outcome(2, "0", answer("a"))) == answer("a")
    vector = replace(answer("a"), text="", value=b"\x00\xff")
    assert load_outcome(dump_outcome(2, "0", vector)) == vector


@pytest.mark.parametrize(
    "error",
    [
        EngineError("down"),
        WeightsError("torn"),
        DeadlineExceeded("late"),
        RemoteError("gone", retryable=True),
        ContextLengthExceeded("a", prompt_tokens=9, max_tokens=2, context_length=10),
    ],
)
def test_an_error_comes_back_in_its_class_with_its_words(error: CoeError) -> None:
    failure = load_outcome(dump_outcome(0, "0", Failure("a", error)))
    assert isinstance(failure, Failure) and isinstance(failure.error, CoeError)
    assert type(failure.error) is type(error) and str(failure.error) == str(error)
    assert (failure.error.retryable, failure.error.code) == (error.retryable, error.code)
    assert describe(failure.error) == describe(error)


def test_an_error_of_a_class_of_its_own_comes_back_as_what_it_is_kind_of() -> None:
    class Special(InvalidRequest):
        pass

    failure = load_outcome(dump_outcome(0, "0", Failure("a", Special("odd"))))
    assert isinstance(failure, Failure) and isinstance(failure.error, InvalidRequest)


def test_what_a_composition_reads_of_an_error_is_kept_and_its_deadlines_are_not() -> None:
    error = ContextLengthExceeded("c", prompt_tokens=90, max_tokens=20, context_length=100)
    kept = load_outcome(dump_outcome(3, "1.aggregator", Failure("c", error)))
    assert isinstance(kept, Failure) and isinstance(kept.error, ContextLengthExceeded)
    assert vars(kept.error) | {"status": 0} == {**vars(error), "status": 0, "code": error.code, "retryable": False}
    assert load_request(dump_request(replace(REQUEST, deadline_s=2.0))) == REQUEST


def test_a_row_keeps_its_excluded_experts_and_the_request_for_all_answers() -> None:
    row = replace(ROW, barred={"z": "allowed experts: the caller does not allow it"}, answers=True)
    assert RoutedRow.of(row.record()) == row
    assert isinstance(compositions({"p": lambda: Aggregate("z")}, {})(row), Without)
    assert compositions({"p": lambda: Aggregate("z")}, {})(ROW) == Aggregate("z")
