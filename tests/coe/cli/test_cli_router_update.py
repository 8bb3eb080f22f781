"""`coe router update` on saved routers: what it writes, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from coe.cli.router.app import app as router_app
from registry.spec import ExpertSpec
from registry.store import Registry
from routers.artifacts import load
from routers.errors import InvalidOutcomes, RouterError
from routers.outcomes.table import OutcomeTable

app = typer.Typer()
app.add_typer(router_app, name="router")

EXPERTS = ("cook", "judge")


def outcomes(first, n, experts=EXPERTS):
    """Each expert is right on the topic it is named after; topics alternate."""
    topics = [EXPERTS[row % 2] for row in range(first, first + n)]
    return OutcomeTable(
        query_ids=[f"q{row}" for row in range(first, first + n)],
        prompts=[f"{'oven butter' if t == 'cook' else 'court clause'} {first + i}" for i, t in enumerate(topics)],
        experts=experts,
        scores=[[float(name == topic) for name in experts] for topic in topics],
        domains=topics,
    )


def run(*arguments, ok=True):
    result = CliRunner().invoke(app, ["router", *(str(argument) for argument in arguments)])
    assert not ok or result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture
def router(tmp_path):
    outcomes(0, 40).write(tmp_path / "train.parquet")
    run("train", "--outcomes", tmp_path / "train.parquet", "--kind", "knn", "--set", "k=5", "--encoder", "hashing:64",
        "--out", tmp_path / "r")  # fmt: skip
    return tmp_path / "r"


def test_further_rows_are_learned_and_told(router, tmp_path):
    outcomes(40, 20).write(tmp_path / "new.jsonl")
    result = run("update", router, "--outcomes", tmp_path / "new.jsonl", "--out", tmp_path / "u", "--json", "-")
    document, loaded = json.loads(result.stdout), load(tmp_path / "u")
    assert (document["kind"], document["n_queries"], document["experts"]) == ("knn", 60, list(EXPERTS))
    assert document["digest"] == loaded.meta.digest
    assert "updated a knn router, now of 60 queries and 2 experts" in result.stderr
    assert loaded.meta.reference.seen(["q3", "q59", "q60"]).tolist() == [True, True, False]
    assert len(loaded.router.rows) == 60


def test_an_expert_goes_and_another_comes(router, tmp_path, coe_home):
    with Registry() as store:
        store.add(ExpertSpec(name="poet", kind="model", source="/m", digest="sha256:poet"))
    outcomes(0, 40, ("poet", "idle")).write(tmp_path / "poet.parquet")
    run("update", router, "--remove-expert", "cook", "--outcomes", tmp_path / "poet.parquet", "--add-expert", "poet",
        "--out", router)  # fmt: skip
    meta = load(router).meta
    assert dict(meta.experts) == {"judge": None, "poet": "sha256:poet"}
    assert meta.reference.experts == ("judge", "poet")
    np.testing.assert_allclose(meta.reference.mean_scores, [0.5, 0.0])


def test_a_solved_cost_weight_is_not_carried_over_in_silence(tmp_path):
    priced = replace(outcomes(0, 40), costs_usd=np.full((40, 2), 0.25))
    priced.write(tmp_path / "train.parquet")
    run("train", "--outcomes", tmp_path / "train.parquet", "--kind", "knn", "--set", "k=5", "--encoder", "hashing:64",
        "--budget-usd", "1", "--out", tmp_path / "r")  # fmt: skip
    assert load(tmp_path / "r").meta.solved is not None
    result = run("update", tmp_path / "r", "--remove-expert", "cook", "--out", tmp_path / "u")
    assert "was solved on the old outcomes and is not carried over" in " ".join(result.stderr.split())
    assert load(tmp_path / "u").meta.solved is None


def test_a_solved_selector_is_not_carried_over_in_silence(tmp_path):
    outcomes(0, 40).write(tmp_path / "train.parquet")
    run("train", "--outcomes", tmp_path / "train.parquet", "--kind", "knn", "--set", "k=5", "--encoder", "hashing:64",
        "--max-calls", "1.5", "--out", tmp_path / "r")  # fmt: skip
    stored = load(tmp_path / "r").meta.policy
    assert stored is not None and list(stored) == ["select"]
    result = run("update", tmp_path / "r", "--remove-expert", "cook", "--out", tmp_path / "u")
    assert "select, solved for a policy on the old outcomes, are not carried over" in " ".join(result.stderr.split())
    assert load(tmp_path / "u").meta.policy is None


def test_what_cannot_be_updated_is_said_and_nothing_is_written(router, tmp_path):
    outcomes(30, 20).write(tmp_path / "new.parquet")
    result = run("update", router, "--outcomes", tmp_path / "new.parquet", "--out", tmp_path / "u", ok=False)
    assert isinstance(result.exception, InvalidOutcomes)
    assert "10 of 20 rows were trained on before" in str(result.exception)
    run("train", "--outcomes", tmp_path / "train.parquet", "--kind", "best-single", "--out", tmp_path / "b")
    result = run("update", tmp_path / "b", "--remove-expert", "cook", "--out", tmp_path / "u", ok=False)
    assert isinstance(result.exception, RouterError)
    assert "keeps no training rows" in str(result.exception)
    assert not (tmp_path / "u").exists()


def test_wrong_command_lines(router, tmp_path):
    result = run("update", router, "--out", tmp_path / "u", ok=False)
    assert (result.exit_code, "nothing to update" in result.output) == (2, True)
    result = run("update", router, "--add-expert", "poet", "--remove-expert", "cook", "--out", tmp_path / "u", ok=False)
    assert (result.exit_code, "needs --outcomes" in result.output) == (2, True)
