"""The router commands on small tables, and reports that fit 80 columns with names never cut."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import planted_table
from test_cli_router import run

from coe.cli.outcomes import app as outcomes_app

LONG = "an-organisation-with-a-long-name/a-model-with-a-very-long-name-3.1-70B-Instruct-v0.2-GGUF-Q4_K_M-16k-context"


def written(tmp_path, rows, **changes):
    table = replace(planted_table(rows), **changes)
    table.write(tmp_path / "t.parquet")
    return table


def train(tmp_path, kind, *more, ok=True):
    command = ["router", "train", "--outcomes", tmp_path / "t.parquet", "--kind", kind, "--out", tmp_path / "r"]
    return run(*command, "--encoder", "hashing:64", *more, ok=ok)


def cv(tmp_path, kind, *more, ok=True):
    command = ["router", "cv", "--outcomes", tmp_path / "t.parquet", "--kind", kind, "--encoder", "hashing:64"]
    return run(*command, *more, ok=ok)


def widest(text):
    return max(map(len, text.splitlines()))


def joined(text):
    """The text without the line ends and borders that wrapping put into it."""
    return "".join(text.replace("│", " ").split())


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))


def test_knn_is_trained_on_sixty_six_rows(tmp_path):
    written(tmp_path, 66)
    train(tmp_path, "knn")
    refused = train(tmp_path, "knn", "--set", "k=67", ok=False)
    assert "k=67 neighbours asked of 66 training queries" in str(refused.exception)


def test_twenty_rows_with_few_rows_a_domain_are_cross_validated(tmp_path):
    written(tmp_path, 20, domains=tuple(f"domain {row // 2}" for row in range(20)))
    result = cv(tmp_path, "quality", "--kind", "knn", "--json", tmp_path / "cv.json")
    assert [report["n_queries"] for report in json.loads((tmp_path / "cv.json").read_text())] == [20, 20]
    assert "warning" not in result.stderr


def test_more_folds_than_rows_are_refused(tmp_path):
    written(tmp_path, 20)
    assert "20 rows cannot be split into 21 folds" in str(cv(tmp_path, "knn", "--folds", "21", ok=False).exception)


@pytest.mark.parametrize("command", [train, cv])
def test_fewer_rows_than_twenty_bring_a_warning(tmp_path, command):
    written(tmp_path, 12)
    assert "12 rows are too few to train or compare routers on" in " ".join(command(tmp_path, "knn").stderr.split())


def test_auto_without_time_finishes_a_candidate_and_lists_what_it_skipped(tmp_path):
    written(tmp_path, 60)
    result = train(tmp_path, "auto", "--budget-minutes", "0.000001", "--json", tmp_path / "auto.json")
    board = json.loads((tmp_path / "auto.json").read_text())["scoreboard"]
    tried = [row for row in board if row["score"] is not None]
    assert len(tried) == 2
    assert f"tried 2 of {len(board)} candidates; skipped:" in result.stdout
    for row in board:
        assert joined(row["candidate"]) in joined(result.stdout)
        assert row in tried or "budget" in row["skipped"]
    report, _ = result.stdout.strip().rsplit("\n", 1)  # the last line is the folder and the digest
    assert widest(report) <= 80
    assert "…" not in result.stdout


def test_auto_on_twenty_rows_says_which_candidates_need_more(tmp_path):
    written(tmp_path, 20)
    shown = " ".join(train(tmp_path, "auto").stdout.split())
    assert "skipped: knn(k=40, encoder=hashing:64): k=40 neighbours asked of 13 training queries" in shown


def test_auto_fails_where_nothing_can_be_tried(tmp_path):
    written(tmp_path, 30)
    candidates = json.dumps([{"kind": "knn", "settings": {"k": 500}}])
    result = train(tmp_path, "auto", "--set", f"candidates={candidates}", ok=False)
    assert "no candidate could be tried" in str(result.exception)
    assert not (tmp_path / "r").exists()


def check(path, *more):
    from typer.testing import CliRunner

    result = CliRunner().invoke(outcomes_app, ["check", str(path), *more])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_check_lists_scores_by_expert_and_domain(tmp_path):
    table = written(tmp_path, 90)
    document = json.loads(check(tmp_path / "t.parquet", "--json", "-"))["mean_score_by_domain"]
    rows = np.array(table.domains) == "law"
    assert document["law"]["n_queries"] == rows.sum()
    expected = dict(zip(table.experts, table.scores[rows].mean(axis=0), strict=True))
    assert document["law"]["mean_score"] == pytest.approx(expected)
    shown = joined(check(tmp_path / "t.parquet"))
    for expert, score in expected.items():
        assert f"{expert}={score:.3f}" in shown


def test_check_fits_eighty_columns_and_cuts_no_name(tmp_path):
    experts = (LONG, *(f"expert-{number}" for number in range(27)))
    domains = tuple(f"a rather long name of a domain, number {row % 14}" for row in range(60))
    scores = np.random.default_rng(0).random((60, 28)).round(2)
    written(tmp_path, 60, experts=experts, domains=domains, scores=scores, costs_usd=None)
    shown = check(tmp_path / "t.parquet")
    assert widest(shown.split("\n", 1)[1]) <= 80  # the first line names the file
    assert "…" not in shown
    assert joined(f"expert-26={scores[0::14, 27].mean():.3f}") in joined(shown)
    assert all(joined(name) in joined(shown) for name in experts)


def test_check_shows_no_domains_where_there_are_none(tmp_path):
    written(tmp_path, 30, domains=None)
    assert "best first" not in check(tmp_path / "t.parquet")
    assert json.loads(check(tmp_path / "t.parquet", "--json", "-"))["mean_score_by_domain"] is None
