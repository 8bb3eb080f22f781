"""A plan predicts the batch: the same calls and loads, prices and seconds by hand, no guesses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_runs import MIXED, InProcess, Quiet, run, service, write_lines

from coe.batch.errors import InputError
from coe.batch.planning.plan import BatchPlan, Memory, plan_batch
from coe.batch.planning.rates import Rates, profiled_tokens, rates_of_run
from coe.batch.planning.rehearsal import Demand, PlannedItem
from coe.config import load_config
from coe.errors import UnknownModel
from coe.runs.errors import RunFolderError
from registry.profiles import Measure, Profiles
from registry.spec import ExpertSpec, Kind, Price
from registry.store import Snapshot
from routers.artifacts import save
from routers.encoders.build import build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable


@pytest.fixture
def place(tmp_path: Path) -> Path:
    service(tmp_path)
    write_lines(tmp_path / "in.jsonl", MIXED)
    return tmp_path


def plan(place: Path, **options: Any) -> BatchPlan:
    config = load_config(place / "service.yaml")
    return plan_batch(config, source=str(place / "in.jsonl"), watch=Quiet(), **options)


def knn(place: Path) -> None:
    """A router that ranks base first, then loud, then tuned."""
    encoder = build_encoder("hashing:64")
    table = OutcomeTable(
        query_ids=tuple("0123456789"),
        prompts=tuple(f"question {i}" for i in range(10)),
        experts=("base", "loud", "tuned"),
        scores=np.array([[1.0] * 3] * 6 + [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]] + [[0.0] * 3] * 2),
    )
    save(build("knn", encoder, {"k": 10}).fit(table), place / "router", table=table, encoder=encoder)


def test_the_first_stage_has_the_calls_and_loads_of_the_batch(place: Path) -> None:
    executor = InProcess()
    run(place / "service.yaml", place / "in.jsonl", place / "out", executor)
    planned = plan(place)
    record = planned.record()
    [stage] = record["stages"]  # no failure is expected, so no fallback
    session = json.loads((place / "out" / "run.json").read_text())["sessions"][0]
    assert {name: each["calls"] for name, each in stage["experts"].items()} == session["answers"] | {"base": 51}
    assert [tuple(item.experts) for item in planned.stages[0]] == executor.items[0]
    assert stage["loads"] == {"base": 1, "broken": 1, "loud": 1} and stage["loaded_bytes"] == 300
    assert record["errors"] == {"model_not_found": 50, "invalid_request": 1} and record["if_answers_agree"] is None
    assert not list(place.glob("*plan*"))  # its output is lost


def test_prompts_bounds_and_prices_by_hand(place: Path) -> None:
    rows = [
        {"prompt": "x" * 40, "model": "base", "max_tokens": 10},  # 4 + 11
        {"prompt": "x" * 40, "model": "base"},  # the rest of its context of 64
        {"prompt": "x" * 236, "model": "base", "max_tokens": 10},  # 64 and 10 do not fit
        {"prompt": "x", "model": "tuned"},
    ]
    write_lines(place / "in.jsonl", rows)
    [stage] = plan(place, rates=Rates(mean_tokens={"base": 20.0})).record()["stages"]
    base, tuned = stage["experts"]["base"], stage["experts"]["tuned"]
    assert (base["calls"], base["prompt_tokens"], base["too_long"]) == (3, 15 + 15 + 64, 1)
    assert base["tokens_at_most"] == 10 + 49 + 1 and base["tokens"] == 10 + 20 + 1
    assert base["cost_usd_at_most"] == pytest.approx((94 * 1 + 60 * 2) / 1e6)
    assert base["cost_usd"] == pytest.approx((94 * 1 + 31 * 2) / 1e6)
    assert tuned["tokens"] is None and tuned["cost_usd_at_most"] is None  # it has no price
    assert stage["loads"] == {"base": 1}


def test_a_cascade_has_its_most_and_its_fewest_calls(place: Path) -> None:
    knn(place)
    service(place, "{default: {router: router, composition: {kind: cascade, confidence: 0.99}, k: 3}}")
    write_lines(place / "in.jsonl", [{"prompt": f"say {i}"} for i in range(5)])
    executor = InProcess()
    run(place / "service.yaml", place / "in.jsonl", place / "out", executor)
    record = plan(place).record()
    least = record["if_answers_agree"]["calls"]
    session = json.loads((place / "out" / "run.json").read_text())["sessions"][0]
    assert record["totals"]["calls"] == 15 > least >= 10
    assert least <= sum(session["answers"].values()) <= 15


def test_a_vote_makes_the_same_calls_whatever_the_answers(place: Path) -> None:
    knn(place)
    service(place, "{default: {router: router, composition: vote, k: 3}}")
    write_lines(place / "in.jsonl", [{"prompt": f"say {i}"} for i in range(5)])
    record = plan(place).record()
    assert record["totals"]["calls"] == 15 and record["totals"]["loads"] == 2 and record["if_answers_agree"] is None


def test_a_second_stage_is_planned_by_aggregator_with_prompts_that_hold_the_answers(place: Path) -> None:
    knn(place)
    aggregate = "{kind: aggregate, aggregator: tuned, max_answer_tokens: 8}"
    service(place, f"{{default: {{router: router, composition: {aggregate}, k: 2}}}}")
    write_lines(place / "in.jsonl", [{"prompt": f"say {i}", "max_tokens": 4} for i in range(5)])
    executor = InProcess()
    run(place / "service.yaml", place / "in.jsonl", place / "out", executor)
    record = plan(place).record()
    first, second = record["stages"]
    assert record["if_answers_agree"] is None  # the aggregator is called whatever the answers are
    assert [{name: each["calls"] for name, each in stage["experts"].items()} for stage in (first, second)] == [
        {"base": 5, "loud": 5},
        {"tuned": 5},
    ]
    assert executor.items == [[("base",), ("loud",)], [("tuned",)]] and second["loads"] == {"base": 1}
    assert first["experts"]["base"]["tokens_at_most"] == 5 * 8 and second["experts"]["tuned"]["tokens_at_most"] == 5 * 4
    # The prompt is as long as the question, the template and two answers of eight tokens.
    assert second["experts"]["tuned"]["prompt_tokens"] > first["experts"]["base"]["prompt_tokens"] + 5 * 16


SPECS = {
    name: ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", price=Price.of_parameters(10**9))
    for name in ("a", "b", "c")
}


def planned(items: str, memory: Memory, hosts: int = 1, rates: Rates | None = None) -> dict[str, Any]:
    """The record of a stage with one work item for each letter, of 100 tokens."""
    stage = [PlannedItem(residency, {residency: Demand(10, 50, 200, 100.0)}) for residency in items]
    rates = rates or Rates(load_bytes_per_s=2.0, tokens_per_s=50.0)
    [record] = BatchPlan(1, hosts, Snapshot(1, SPECS), [stage], [stage], {}, memory, rates).record()["stages"]
    return dict(record)


def test_seconds_overlap_where_memory_has_room_for_two() -> None:
    sizes = dict.fromkeys("abc", 6)  # 3 s to load, 2 s to answer (4 s at most)
    alone = planned("abc", Memory(6, sizes))
    assert (alone["seconds"], alone["seconds_at_most"], alone["loads_ahead"]) == (15.0, 21.0, 0)
    beside = planned("abc", Memory(12, sizes))
    # Expected: work hides 2 s of each later load. At most: all of it.
    assert (beside["seconds"], beside["seconds_at_most"], beside["loads_ahead"]) == (3 + 3 + 3 + 2, 3 + 4 * 3, 2)
    pinned = planned("abc", Memory(17, sizes | {"d": 6}, frozenset("d")))
    assert pinned["seconds"] == 15.0


def test_hosts_work_in_parallel_and_a_residency_that_goes_on_is_not_loaded_again() -> None:
    sizes = dict.fromkeys("abc", 6)
    assert planned("abc", Memory(6, sizes), hosts=3)["seconds"] == 5.0
    assert planned("aab", Memory(6, sizes), hosts=1)["seconds"] == 3 + 2 + 2 + 3 + 2
    assert planned("abc", Memory(6, sizes), hosts=2)["loads_ahead"] is None


def test_what_is_not_known_is_none_and_what_has_no_weights_takes_no_time_to_load() -> None:
    sizes = {"a": 6, "b": None, "c": 0}
    assert planned("a", Memory(6, sizes), rates=Rates(tokens_per_s=50.0))["seconds"] is None
    assert planned("a", Memory(6, sizes), rates=Rates(load_bytes_per_s=1.0))["seconds"] is None
    unsized = planned("ab", Memory(6, sizes))
    assert unsized["seconds"] is None and unsized["loaded_bytes"] is None and unsized["loads_ahead"] == 0
    assert planned("c", Memory(0, sizes), rates=Rates(by_residency={"c": 100.0}))["seconds"] == 1.0
    assert Memory(5, sizes).too_large == ["a"] and Memory(6, sizes).fits("a") and not Memory(9, sizes).fits("b")


def test_an_earlier_run_tells_lengths_and_rates(place: Path) -> None:
    run(place / "service.yaml", place / "in.jsonl", place / "out")
    path = place / "out" / "run.json"
    told = json.loads(path.read_text())
    [session] = told["sessions"]
    session |= {"work_s": {"base": 2.0, "loud": 0.5}, "load_s": 1.5, "loaded_bytes": 300}
    path.write_text(json.dumps(told))
    rates = rates_of_run(str(place / "out"), plan(place).snapshot)
    assert rates.mean_tokens == pytest.approx({"base": (50 * 2 + 50 * 2 + 3) / 101, "loud": 2.0, "tuned": 3.0})
    assert rates.by_residency == {"base": (203 + 150) / 2.0, "loud": 100 / 0.5} and rates.load_bytes_per_s == 200.0
    record = plan(place, rates=rates).record()
    assert record["totals"]["tokens"] is None  # `broken` never answered
    assert record["stages"][0]["experts"]["loud"]["tokens"] == 100.0
    path.write_text('{"sessions": [{}]}')
    with pytest.raises(RunFolderError, match="has no figures"):
        rates_of_run(str(place / "out"), plan(place).snapshot)
    with pytest.raises(RunFolderError, match="does not exist"):
        rates_of_run(str(place / "nowhere"), plan(place).snapshot)


def test_profiles_tell_lengths_where_they_were_recorded() -> None:
    cells = {("a", "x"): Measure(1.0, 2, 60.0), ("a", "y"): Measure(0.0, 1, 30.0), ("b", "x"): Measure(1.0, 2)}
    assert profiled_tokens(Profiles(cells)) == {"a": 30.0}


def test_wrong_inputs_and_models_are_refused_as_by_the_batch(place: Path) -> None:
    with pytest.raises(UnknownModel, match="did you mean 'shaky'"):
        plan(place, model="coe/shakey")
    (place / "in.jsonl").unlink()
    with pytest.raises(InputError, match="no such file"):
        plan(place)


def test_rows_with_errors_only_make_no_calls(place: Path) -> None:
    write_lines(place / "in.jsonl", ["nonsense", "[]"])
    record = plan(place).record()
    assert record["stages"] == [] and record["errors"] == {"invalid_request": 2}
    assert record["totals"]["calls"] == record["totals"]["loads"] == 0
