"""The trained compositions that the zoo ships, and the service that answers with them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from coe.cli.config.check import check_config
from coe.compose import Aggregate, build_composition
from coe.config import load_config
from coe.engines.latent.artifact import Artifact
from coe.experts import open_snapshot
from coe.local import open_local
from examples.zoo.card import read_card
from examples.zoo.demo import COMPOSITION, N_TWO_SKILLS, SERVED, train_routers
from examples.zoo.families import TWO_SKILLS
from examples.zoo.latent.benches import ALL_BENCHES, base_of
from examples.zoo.latent.methods import METHODS
from examples.zoo.latent.ship import EXPERTS, MOST_BYTES, SHIPPED, experts_text, size_of
from examples.zoo.outcomes import DIGESTS, shipped_outcomes
from examples.zoo.plan import AGGREGATOR
from examples.zoo.report import AGGREGATE, fresh_two_skill_questions
from examples.zoo.train import ZOO
from registry.composed import FILE
from registry.spec import STAGED_ARCHITECTURES

NAMES = sorted(file.parent.name for file in SHIPPED.glob(f"*/{FILE}"))
every_artifact = pytest.mark.parametrize("name", NAMES)


@every_artifact
def test_an_artifact_is_small_and_holds_no_code(name: str) -> None:
    assert size_of(SHIPPED / name) <= MOST_BYTES == 8_000_000
    assert {path.suffix for path in (SHIPPED / name).rglob("*") if path.is_file()} <= {".md", ".json", ".safetensors"}
    Artifact.read(SHIPPED / name).tensors()


@every_artifact
def test_its_members_are_those_of_the_zoo_of_today(name: str) -> None:
    digests = json.loads(DIGESTS.read_text())
    for member, identity in Artifact.read(SHIPPED / name).composed.members.items():
        base = base_of(member)
        assert identity == digests[member] + ("" if base == member else f" on {digests[base]}")


@every_artifact
def test_its_card_says_how_it_was_made_and_how_good_it_is(name: str) -> None:
    card, composed = read_card(SHIPPED / name), Artifact.read(SHIPPED / name).composed
    bench, training = ALL_BENCHES[card["training"]["bench"]], card["training"]
    assert card["members"] == [*composed.members]
    assert METHODS[training["method"]].architecture == composed.architecture
    assert training["families"] == [family.name for family in bench.families]
    assert training["parameters"] > 0 and training["seconds"] > 60
    for split in ("test", "fresh"):
        assert {family: score["n"] for family, score in card["scores"][split].items()} == {
            family.name: bench.rows[split] for family in bench.families
        }
    from_gemma = any(base_of(member) != "smollm2" for member in composed.members)
    assert card["license"] == ("gemma" if from_gemma else "apache-2.0")


def test_every_artifact_is_listed_and_has_a_policy_of_its_name() -> None:
    assert NAMES
    assert (SHIPPED / EXPERTS).read_text() == experts_text(SHIPPED)
    config = load_config(SERVED)
    assert SHIPPED / EXPERTS in config.experts
    assert set(config.policies) == {"default", AGGREGATE, *NAMES}
    for name in NAMES:
        policy, architecture = config.policies[name], Artifact.read(SHIPPED / name).composed.architecture
        assert policy.expert == name or (
            policy.composition.kind == "latent"
            and architecture in STAGED_ARCHITECTURES
            and policy.composition.settings == {"expert": name}
        )


def test_the_service_is_that_of_the_zoo_with_policies_that_compose() -> None:
    config, plain = load_config(SERVED), load_config(ZOO / "config.yaml")
    assert config.policies["default"] == plain.policies["default"]
    assert (config.engines, config.host, config.serve, config.batch) == (
        plain.engines,
        plain.host,
        plain.serve,
        plain.batch,
    )
    text = config.policies[AGGREGATE]
    assert build_composition(text.composition.kind, text.composition.settings) == Aggregate(AGGREGATOR.name)
    assert COMPOSITION in config.policies


@pytest.mark.integration
def test_every_policy_answers_a_query_of_two_skills(
    zoo_bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_HOME", str(tmp_path))
    (tmp_path / "models").symlink_to(zoo_bases)
    snapshot = open_snapshot(load_config(ZOO / "config.yaml"))
    table = shipped_outcomes(snapshot.experts)
    assert table is not None
    train_routers(table, snapshot)
    findings = check_config(SERVED)
    assert (findings.problems, findings.notes) == ([], [])

    question = next(each for each in fresh_two_skill_questions(N_TWO_SKILLS, 7) if each.family.name == "bookings")
    request = replace(question.request(), max_tokens=4)  # who answers is of interest, not what
    first, second = TWO_SKILLS[question.family.name].experts

    async def answered() -> None:
        async with open_local(SERVED) as system:
            for name in (AGGREGATE, *NAMES):
                reply = system.answer(request, model=f"coe/{name}")
                assert (await reply.text()).strip()
                assert reply.answer is not None
                if reply.decision.experts != (name,):
                    assert set(reply.decision.experts) == {first, second}
                if name != AGGREGATE and Artifact.read(SHIPPED / name).composed.architecture in STAGED_ARCHITECTURES:
                    left = [line for line in reply.answer.notes if " left notes (" in line]
                    assert {line.split()[0] for line in left} == {first, second}

    asyncio.run(answered())
