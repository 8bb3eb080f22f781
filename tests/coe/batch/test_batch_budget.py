"""A batch within a budget: rows assigned jointly, priced as the plan prices them, resumed with the same assignment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from batch_runs import InProcess, Quiet, Stop, records, results, run, write_lines

from coe.batch.budget import Budget
from coe.batch.errors import BudgetError
from coe.batch.planning.plan import plan_batch
from coe.batch.planning.rates import Rates
from coe.config import load_config
from coe.runs.errors import RunFolderError
from routers.artifacts import save
from routers.encoders.build import build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

EXPERTS = """
experts:
  - {name: big, kind: model, source: "fake://upper", size_bytes: 1073741824,
     price: {input_usd_per_mtok: 0, output_usd_per_mtok: 10000}}
  - {name: small, kind: model, source: "fake://echo", size_bytes: 1073741824,
     price: {input_usd_per_mtok: 0, output_usd_per_mtok: 1000}}
  - {name: unpriced, kind: model, source: "fake://echo", size_bytes: 100}
"""
POLICIES = """
  default: {router: router}
  one: {expert: small}
  vote: {router: router, composition: vote, k: 2}
  two: {router: router, k: 2}
"""
LENGTHS = {"big": 10.0, "small": 10.0}
"""A call costs 0.1 USD to `big`, 0.01 to `small`."""
HARD, EASY = "prove the theorem of", "say hello to"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    service(tmp_path)
    rows = [{"id": f"{i:02}", "prompt": f"{HARD if i < 10 else EASY} {i}", "max_tokens": 50} for i in range(20)]
    write_lines(tmp_path / "in.jsonl", rows)
    encoder = build_encoder("hashing:64")
    table = OutcomeTable(
        query_ids=tuple(map(str, range(40))),
        prompts=tuple(f"{HARD if i < 20 else EASY} {i}" for i in range(40)),
        experts=("big", "small"),
        scores=np.array([[1.0, 0.0]] * 20 + [[1.0, 1.0]] * 10 + [[1.0, 0.0]] * 5 + [[0.0, 0.0]] * 5),
    )
    save(build("knn", encoder, {"k": 10}).fit(table), tmp_path / "router", table=table, encoder=encoder)
    return tmp_path


def service(place: Path, policies: str = POLICIES, part_rows: int = 7) -> Path:
    path = place / "service.yaml"
    path.write_text(
        f"experts: [experts.yaml]\nhost: {{budget: 1GiB}}\npolicies: {policies}\nbatch: {{part_rows: {part_rows}}}\n"
    )
    return path


def go(
    place: Path, usd: float, output: str = "out", executor: InProcess | None = None, **options: Any
) -> dict[str, Any]:
    limits = {name: options.pop(name) for name in ("capacity", "load_weight") if name in options}
    budget = Budget(usd, mean_tokens=LENGTHS, **limits)
    return run(place / "service.yaml", place / "in.jsonl", place / output, executor, budget=budget, **options)


def all_rows(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output / "results.parquet").to_pylist()
    return rows


def experts(place: Path, output: str = "out") -> list[str]:
    return [row["expert"] for row in records(place / output).values()]


def test_the_budget_goes_to_the_rows_that_gain_most(place: Path) -> None:
    found = go(place, 1.11)["assignment"]  # ten calls to each are 1.1 USD
    assert experts(place) == ["big"] * 10 + ["small"] * 10
    assert found["price_usd"] == pytest.approx(1.1) and found["experts"] == {"big": 10, "small": 10}
    assert found["own"]["price_usd"] == pytest.approx(2.0) and found["own"]["quality"] >= found["quality"]
    assert found["upper_bound"] >= found["quality"] > found["upper_bound"] - 0.2 and found["gap"] < 0.2
    assert found["method"] == "linear programme" and found["priced_by_limit"] == []
    row = records(place / "out")["15"]
    assert row["reason"].startswith("assigned jointly within 1.11 USD: small has an estimated quality of ")
    assert "on its own the row goes to big: " in row["reason"] and row["policy"] == "default"
    assert row["answer"] == f"{EASY} 15" and 0 < row["confidence"] < 1


def test_a_budget_that_does_not_bind_routes_every_row_to_its_best_expert(place: Path) -> None:
    found = go(place, 100.0)["assignment"]
    assert experts(place) == ["big"] * 20 and found["quality_per_usd"] == 0.0
    assert found["quality"] == pytest.approx(found["own"]["quality"])


def test_too_little_money_is_refused_with_the_least_budget(place: Path) -> None:
    with pytest.raises(BudgetError, match=r"cost 0.2 USD, more than the budget of 0.1 USD. .*--budget-usd 0.2 or more"):
        go(place, 0.1, executor=(executor := InProcess()))
    assert executor.items == [] and (executor.routed, executor.stepped) == (1, 0)  # no expert was loaded


def test_named_experts_and_policies_of_one_expert_cost_and_errors_do_not(place: Path) -> None:
    rows = [{"id": f"{i}", "prompt": f"{HARD} {i}", "max_tokens": 50} for i in range(2)]
    rows += [{"id": "2", "prompt": "x", "model": "big", "max_tokens": 50}]
    rows += [{"id": "3", "prompt": "x", "model": "coe/one", "max_tokens": 50}, {"id": "4", "prompt": 5}]
    write_lines(place / "in.jsonl", rows)
    found = go(place, 0.22)["assignment"]  # 0.11 are spent by names, which leaves 0.1 + 0.01
    assert sorted(experts(place)[:2]) == ["big", "small"] and experts(place)[2:] == ["big", "small", None]
    assert found["rows"] == 4 and found["rows_with_choice"] == 2 and found["price_usd"] == pytest.approx(0.22)
    assert records(place / "out")["2"]["reason"] == "named by the request"


def test_a_row_with_the_id_of_an_earlier_one_is_neither_priced_nor_called(place: Path) -> None:
    rows: list[Any] = [{"id": f"{i:03}", "prompt": f"{EASY} {i}", "max_tokens": 50} for i in range(64)]
    rows += [{"id": "007", "prompt": "x", "model": "big", "max_tokens": 50}, {"id": "new", "prompt": f"{EASY} you"}]
    rows += [{"id": "new", "prompt": 5}]  # wrong, and a duplicate: one error
    write_lines(place / "in.jsonl", [*rows, *[""] * 64])  # three parts, the last one without rows
    executor, watch = InProcess(), Quiet()
    found = go(place, 0.65, executor=executor, watch=watch)  # 65 calls to `small`; one to `big` would be 0.1 more
    assert found["assignment"]["rows"] == 65 and found["assignment"]["price_usd"] == pytest.approx(0.65)
    assert found["results"]["errors"] == {"duplicate_id": 2} and found["results"]["experts"] == {"small": 65}
    assert executor.items == [[("small",)]]
    run(place / "service.yaml", place / "in.jsonl", place / "free")
    failed = {place: [row for row in all_rows(place) if row["error"]] for place in (place / "out", place / "free")}
    assert failed[place / "out"] == failed[place / "free"]  # the same errors as without a budget
    budget = Budget(0.65, mean_tokens=LENGTHS)
    planned = plan_batch(
        load_config(place / "service.yaml"), source=str(place / "in.jsonl"), watch=Quiet(), budget=budget
    )
    record = planned.record()
    assert record["errors"] == {"duplicate_id": 2} and record["totals"]["calls"] == 65
    assert record["joint"]["price_usd"] == pytest.approx(0.65)


def test_errors_alone_make_an_empty_assignment(place: Path) -> None:
    write_lines(place / "in.jsonl", ["nonsense", "[]"])
    assert go(place, 1.0)["assignment"]["rows"] == 0 and len(records(place / "out")) == 2


def test_capacities_and_loads_count(place: Path) -> None:
    found = go(place, 100.0, capacity={"big": 3})["assignment"]
    assert found["experts"] == {"big": 3, "small": 17} and found["quality_per_row_of_capacity"]["big"] > 0
    heavy = go(place, 100.0, "heavy", load_weight=50.0)["assignment"]  # a second load is worth no quality
    assert heavy["loads"] == 1 and heavy["load_cost"] == 50.0 and heavy["gap"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(BudgetError, match="did you mean 'small'"):
        go(place, 100.0, "other", capacity={"smal": 3})


def test_capacities_that_are_too_small_are_named_and_a_budget_for_them_is_exact(place: Path) -> None:
    with pytest.raises(BudgetError, match=r"20 queries can go to big, small alone, .* allow 8 \(big 5, small 3\)"):
        go(place, 100.0, capacity={"big": 5, "small": 3})
    least = r"cheapest assignment within the capacities costs 1.55 USD, .*--budget-usd 1.55 or more, or with larger cap"
    with pytest.raises(BudgetError, match=least):
        go(place, 1.5, "poor", capacity={"small": 5})
    assert go(place, 1.55, "enough", capacity={"small": 5})["assignment"]["experts"] == {"big": 15, "small": 5}
    write_lines(place / "in.jsonl", [{"id": str(i), "prompt": "x", "model": "big", "max_tokens": 5} for i in range(3)])
    with pytest.raises(BudgetError, match="3 queries can go to big alone, and its capacity is 1"):
        go(place, 100.0, "named", capacity={"big": 1})


def test_policies_that_call_several_experts_are_refused_and_the_others_named(place: Path) -> None:
    for name, why in (("vote", "composition, vote, may call several"), ("two", "selector, top-k, may choose several")):
        with pytest.raises(BudgetError, match=f"{why} experts for a row.*coe/default can"):
            go(place, 1.0, model=f"coe/{name}")
    rows = [{"prompt": "a"}, {"prompt": "b", "model": "coe/vote"}]
    write_lines(place / "in.jsonl", rows)
    with pytest.raises(BudgetError, match="policy 'vote' cannot be assigned"):
        go(place, 1.0)


def test_a_router_that_maps_rows_to_experts_leaves_nothing_to_choose(place: Path) -> None:
    table = OutcomeTable(("a",), ("x",), ("big", "small"), np.array([[1.0, 0.0]]))
    save(build("fixed", None, {"expert": "big"}).fit(table), place / "fixed", table=table, encoder=None)
    service(place, "{default: {router: fixed}}")
    with pytest.raises(BudgetError, match="leaves one expert for each row"):
        go(place, 10.0)


def test_an_expert_without_a_price_is_refused(place: Path) -> None:
    write_lines(place / "in.jsonl", [{"prompt": "a", "model": "unpriced"}])
    with pytest.raises(BudgetError, match="'unpriced' has no price"):
        go(place, 1.0)


@pytest.mark.parametrize("stop_after", [0, 2, 3, 4])
def test_an_interrupted_run_resumes_with_the_same_assignment(place: Path, stop_after: int) -> None:
    whole = go(place, 1.11, "whole")["assignment"]
    with pytest.raises(Stop):
        go(place, 1.11, executor=InProcess(stop_after=stop_after))
    executor = InProcess()
    again = run(  # other lengths by now: those of the run's start hold
        place / "service.yaml", place / "in.jsonl", place / "out", executor, budget=Budget(1.11), resume=True
    )
    assert again["assignment"] == whole and results(place / "out") == results(place / "whole")


def test_another_budget_is_another_run(place: Path) -> None:
    go(place, 1.11)
    with pytest.raises(RunFolderError, match=r"holds another run \(budget: ~usd 1.11 -> 1.2\)"):
        go(place, 1.2, resume=True)
    with pytest.raises(RunFolderError, match="budget"):
        run(place / "service.yaml", place / "in.jsonl", place / "out", resume=True)
    assert go(place, 1.11, resume=True)["status"] == "complete"


def test_a_plan_has_the_assignment_of_the_run_and_what_other_budgets_buy(place: Path) -> None:
    budget = Budget(1.11, mean_tokens=LENGTHS)
    rates = Rates(mean_tokens=LENGTHS, load_bytes_per_s=2.0**30, tokens_per_s=10.0)
    config = load_config(place / "service.yaml")
    record = plan_batch(config, source=str(place / "in.jsonl"), watch=Quiet(), rates=rates, budget=budget).record()
    joint = record["joint"]
    ran = go(place, 1.11)["assignment"]
    assert {name: joint[name] for name in ran} == ran
    [stage] = record["stages"]
    assert {name: each["calls"] for name, each in stage["experts"].items()} == ran["experts"]
    assert record["totals"]["cost_usd"] == pytest.approx(ran["price_usd"])  # one rule for prices
    assert json.loads(json.dumps(joint)) == joint and len(joint["points"]) == 8
    assert joint["points"][0]["price_usd"] == pytest.approx(0.2)
    assert joint["points"][-1]["quality"] == pytest.approx(joint["own"]["quality"])
    more = record["more_memory"]
    assert more["more_bytes"] == 2**30 and more["loads_ahead"] == 1 and record["stages"][0]["loads_ahead"] == 0
    assert more["seconds"] == record["totals"]["seconds"] - 1.0  # a load of 1 s hides behind 10 s of work


@pytest.mark.parametrize(
    "wrong", [{"usd": -1.0}, {"usd": float("nan")}, {"usd": 1, "load_weight": -1}, {"usd": 1, "capacity": {"a": -1}}]
)
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="must be"):
        Budget(**wrong)
