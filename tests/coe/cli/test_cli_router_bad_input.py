"""Malformed tables, prompts and routers: a clear error, or a result that is still correct."""

import json

import numpy as np
import pytest
from test_cli_router import files, planted, run, trained  # noqa: F401  # fixtures

from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidOutcomes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # printed on the console


def cv(files, table, *more, ok=True):  # noqa: F811
    table.write(files / "odd.parquet")
    command = ["router", "cv", "--outcomes", files / "odd.parquet", "--encoder", "hashing:64", "--json", files / "o"]
    result = run(*command, "--kind", "knn", "--kind", "category", "--set", "k=9", *more, ok=ok)
    return result, json.loads((files / "o").read_text()) if result.exit_code == 0 else []


def test_one_category_is_reported_once_and_uses_the_best_single_expert(files):  # noqa: F811
    result, reports = cv(files, planted(90, 3, domains=["all"] * 90))
    told = " ".join(result.stderr.split())
    assert told.count("every training query is of category 'all'") == 1
    assert reports[1]["accuracy"] == reports[1]["best_single"]
    assert list(reports[0]["by_domain"]) == ["all"]


def test_an_expert_without_any_score_is_named(files):  # noqa: F811
    frame = planted(40, 3).to_frame()
    frame["score::law-expert"] = np.nan
    frame.to_parquet(files / "nan.parquet")
    result = run("router", "cv", "--outcomes", files / "nan.parquet", "--kind", "best-single", ok=False)
    assert isinstance(result.exception, InvalidOutcomes)
    assert "score::law-expert is missing (NaN)" in str(result.exception)


def test_a_table_without_experts_says_what_it_lacks(files):  # noqa: F811
    planted(40, 3).to_frame()[["query_id", "prompt"]].to_parquet(files / "none.parquet")
    result = run("router", "cv", "--outcomes", files / "none.parquet", "--kind", "best-single", ok=False)
    assert "there is no `score::<expert>` column" in str(result.exception)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_constant_scores_leave_nothing_to_gain(files, score):  # noqa: F811
    _, reports = cv(files, planted(90, 3, scores=np.full((90, 3), score)), "--plot", files / "flat.png")
    for report in reports:
        assert report["accuracy"] == report["best_single"] == report["oracle"] == score
        assert (report["gain_ci95_low"], report["gain_ci95_high"], report["gap_recovered"]) == (0, 0, None)
    assert (files / "flat.png").stat().st_size > 1000


def test_equal_costs_leave_nothing_to_save(files):  # noqa: F811
    result, reports = cv(
        files, planted(90, 3, costs_usd=np.full((90, 3), 0.01)), "--save-cost", "--plot", files / "e.png"
    )
    assert reports[0]["cost_saved"] == pytest.approx(0)
    assert reports[0]["aiq"] is None
    assert "saved" in result.stdout


def test_costs_of_nothing_are_no_share_of_nothing(files):  # noqa: F811
    _, reports = cv(files, planted(90, 3, costs_usd=np.zeros((90, 3))))
    assert (reports[0]["mean_cost"], reports[0]["cost_saved"], reports[0]["aiq"]) == (0, None, None)


def test_duplicate_ids_are_named_with_their_rows(files):  # noqa: F811
    frame = planted(40, 3).to_frame()
    frame.loc[7, "query_id"] = frame.loc[2, "query_id"]
    frame.to_parquet(files / "twice.parquet")
    result = run("router", "cv", "--outcomes", files / "twice.parquet", "--kind", "best-single", ok=False)
    assert "duplicate query id: '3-2' (rows 3, 8)" in str(result.exception)


def test_empty_long_and_non_english_prompts_are_trained_on_and_routed(files):  # noqa: F811
    table = planted(90, 3)
    odd = ["", "   ", "猫は屋根の上で寝ています", "e\u0301 \U0001f44d\U0001f3fd", "oven flour " * 10_000, "\x00\x07"]
    _, reports = cv(files, planted(90, 3, prompts=[*odd, *table.prompts[len(odd) :]]))
    assert reports[1]["accuracy"] > reports[1]["best_single"]
    options = ["--kind", "knn", "--encoder", "hashing:64", "--set", "k=9", "--out", files / "r"]
    run("router", "train", "--outcomes", files / "odd.parquet", *options)
    for prompt in odd[:5]:
        assert run("route", prompt, "--router", files / "r").stdout.strip() in table.experts
    assert run("route", "oven flour garlic " * 6_000, "--router", files / "r").stdout.strip() == "food-expert"


def test_an_encoder_of_other_dimensions_is_refused(files, trained, monkeypatch):  # noqa: F811
    monkeypatch.setattr("routers.encoders.build.build_encoder", lambda name: HashingEncoder(32))
    result = run("router", "eval", trained, "--outcomes", files / "test.jsonl", ok=False)
    assert isinstance(result.exception, InvalidArtifact)
    assert "128 dimensions" in str(result.exception)


def test_a_table_that_lacks_the_routers_experts_is_refused(files, trained):  # noqa: F811
    planted(40, 4).with_experts(["law-expert", "food-expert"]).write(files / "few.parquet")
    result = run("router", "eval", trained, "--outcomes", files / "few.parquet", ok=False)
    assert "no expert 'shapes-expert' in the table" in str(result.exception)
    part = run("router", "eval", trained, "--outcomes", files / "few.parquet", "--experts", "law-expert,food-expert")
    assert part.exit_code == 0


def test_fewer_rows_than_neighbours_names_both(files):  # noqa: F811
    result, _ = cv(files, planted(9, 3), "--set", "k=40", ok=False)
    assert "k=40 neighbours asked of 6 training queries" in str(result.exception)


def test_prices_that_miss_an_expert_name_it(files):  # noqa: F811
    (files / "some.json").write_text(json.dumps({"law-expert": 1, "food-expert": 2}))
    result, _ = cv(files, planted(40, 3), "--prices", files / "some.json", ok=False)
    assert "no price for shapes-expert" in str(result.exception)
