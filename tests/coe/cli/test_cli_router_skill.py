"""The router commands with the skill router, from labels and from the words of a keyword expert."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from coe.cli.route.command import route
from coe.cli.router.app import app as router_app
from coe.errors import ConfigError
from coe.local import open_local
from coe.types import GenerateRequest
from registry.documents import load_document
from registry.reconcile import apply, plan
from registry.store import Registry
from routers.artifacts import load
from routers.base import Message
from routers.outcomes.table import OutcomeTable

app = typer.Typer()
app.add_typer(router_app, name="router")
app.command("route")(route)

WORDS = {"cooking": "oven flour butter", "geometry": "triangle angle radius", "tenancy": "tenant landlord deposit"}
NAMED = {"cooking": "cooking, chemistry", "geometry": "geometry", "tenancy": "tenancy, courts"}
EXPERTS = ("cook", "geometer", "lawyer")


def planted(n: int, seed: int) -> OutcomeTable:
    """Each expert is right on one topic, and the lawyer now and then elsewhere."""
    rng = np.random.default_rng(seed)
    topics = [list(WORDS)[i % 3] for i in range(n)]
    scores = np.array([[float(topic == of) for of in WORDS] for topic in topics])
    scores[::7, 2] = 1.0
    prompts = [f"{' '.join(rng.permutation(WORDS[topic].split()))} number {seed} {i}" for i, topic in enumerate(topics)]
    ids = tuple(f"{seed}-{i}" for i in range(n))
    return OutcomeTable(ids, tuple(prompts), EXPERTS, scores, domains=tuple(topics), folds=np.arange(n) // 3 % 3)


def run(*arguments: Any, ok: bool = True) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not ok or result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture
def files(tmp_path: Path) -> Path:
    planted(60, 0).write(tmp_path / "train.parquet")
    planted(30, 1).write(tmp_path / "test.parquet")
    script = "&".join(f"{WORDS[topic].split()[0]}=Keywords: {named}" for topic, named in NAMED.items())
    (tmp_path / "experts.yaml").write_text(
        f"experts:\n  - {{name: names, kind: model, source: 'fake://script?default=I do not know&{script}'}}\n"
        + "".join(f"  - {{name: {name}, kind: model, source: 'fake://echo'}}\n" for name in EXPERTS)
    )
    (tmp_path / "service.yaml").write_text("experts: [experts.yaml]\nengines: {fake: {capacity: 64}}\n")
    return tmp_path


@pytest.fixture
def by_words(files: Path) -> Path:
    options = ["--encoder", "hashing:64", "--set", "skills=keywords/names", "--config", files / "service.yaml"]
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "skill", "--out", files / "w", *options)
    return files / "w"


def test_a_router_is_trained_and_judged_by_keywords_that_its_expert_gives(files: Path, by_words: Path) -> None:
    assert load(by_words).router.requires == {"keywords/names"}
    with Registry(f"sqlite:///{files}/registry.db") as store:
        apply(plan(load_document(files / "experts.yaml"), store), store)
    registry = ["--registry", f"sqlite:///{files}/registry.db", "--json", "-"]
    options = ["--encoder", "hashing:64", "--set", "skills=keywords/names"]
    command = ["router", "cv", "--outcomes", files / "train.parquet", "--kind", "skill", "--kind", "random", *options]
    [crossed, by_chance] = json.loads(run(*command, *registry).stdout)
    assert crossed["accuracy"] > 0.99 > by_chance["accuracy"]
    [scored] = json.loads(run("router", "eval", by_words, "--outcomes", files / "test.parquet", *registry).stdout)
    assert scored["accuracy"] > 0.99
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "best-single", "--out", files / "b")
    compared = run("router", "compare", by_words, files / "b", "--outcomes", files / "test.parquet", *registry)
    assert json.loads(compared.stdout)[0]["gain"] == pytest.approx(scored["best_single"] - scored["accuracy"])


def test_a_keyword_expert_that_is_not_there_is_told(files: Path) -> None:
    options = ["--encoder", "hashing:64", "--set", "skills=keywords/name", "--config", files / "service.yaml"]
    command = ["router", "train", "--outcomes", files / "train.parquet", "--kind", "skill", "--out", files / "w"]
    error = run(*command, *options, ok=False).exception
    assert isinstance(error, ConfigError) and "did you mean 'names'" in str(error)


def test_route_reads_the_keywords_and_explains_the_choice(files: Path, by_words: Path) -> None:
    command = ["route", "oven flour butter", "--router", by_words, "--config", files / "service.yaml"]
    shown = run(*command, "--explain", "-k", 2).stdout
    assert shown.splitlines()[0] == "cook"
    assert "skill: cooking 50%, named" in shown and "skill: chemistry 50%, named" in shown
    assert "lawyer: weight 0.000; S -28.00: in reserve" in shown
    assert "cook: weight " in shown and "good at chemistry +20.0, cooking +20.0" in shown
    document = json.loads(run(*command, "-k", 2, "--json", "-").stdout)
    assert document["experts"][0] == "cook" and sum(document["weights"]) == pytest.approx(1)
    explained = document["recruiting"]
    assert {skill["name"]: (skill["share"], skill["found"]) for skill in explained["skills"]} == {
        "cooking": (0.5, "exact"),
        "chemistry": (0.5, "exact"),
    }
    first = explained["experts"][0]
    assert (first["expert"], first["profile"]) == ("cook", [20.0, 20.0])
    assert first["weight"] == pytest.approx(document["weights"][0])


def test_route_obeys_the_flags(files: Path) -> None:
    options = ["--encoder", "hashing:64", "--set", "trim=0"]
    run("router", "train", "--outcomes", files / "train.parquet", "--kind", "skill", "--out", files / "t", *options)
    command = ["route", "tenant landlord radius", "--router", files / "t"]
    assert run(*command, "-k", 1).stdout.split() == ["lawyer"]
    asked = run(*command, "--select", "top-k", "-k", 3).stdout.split()
    assert asked[0] == "lawyer" and set(asked) == set(EXPERTS)
    shown = run(*command, "--explain").stdout
    assert "skill: tenancy" in shown and "from similar training queries" in shown
    assert "recruited" in shown


def test_route_without_a_known_skill_recruits_by_competency(files: Path, by_words: Path) -> None:
    command = ["route", "What is this?", "--router", by_words, "--config", files / "service.yaml", "--explain"]
    shown = run(*command).stdout
    assert "no known skill, so by competency" in shown


async def test_a_service_in_process_recruits_by_keywords_and_leaves_nothing_behind(files: Path, by_words: Path) -> None:
    policies = "policies: {default: {router: w, select: {kind: recruit, k: 2}}}\n"
    (files / "local.yaml").write_text(f"experts: [experts.yaml]\n{policies}")
    async with open_local(files / "local.yaml") as system:
        replies = system.answers([request("butter on an oven plate"), request("a tenant moves out")])
        assert [reply.decision.experts[0] for reply in replies] == ["cook", "lawyer"]
        assert await replies[0].text() == "butter on an oven plate"
        assert "expert:names" in {thread.name for thread in threading.enumerate()}
    assert "expert:names" not in {thread.name for thread in threading.enumerate()}


def request(text: str) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),))
