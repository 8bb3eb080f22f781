"""A configuration opened in process: experts from a file, policies by name, a real answer."""

from pathlib import Path

import numpy as np
import pytest

from coe.config import Config, HostConfig
from coe.errors import ConfigError
from coe.local import open_local
from coe.types import GenerateRequest
from registry.errors import InvalidSpec
from routers.artifacts import save
from routers.base import Message
from routers.encoders.build import build_encoder
from routers.errors import InvalidArtifact
from routers.factory import build
from routers.outcomes.table import OutcomeTable

EXPERTS = """
experts:
  - {name: capital, kind: model, source: "fake://script?france=Paris&japan=Tokyo", context_length: 4096}
  - {name: loud, kind: model, source: "fake://upper", context_length: 4096}
"""


def config(folder: Path, policies: str) -> Path:
    (folder / "experts.yaml").write_text(EXPERTS)
    path = folder / "service.yaml"
    path.write_text(f"experts: [experts.yaml]\nhost: {{budget: 1GiB}}\npolicies: {policies}\n")
    return path


def train(folder: Path, experts: tuple[str, ...] = ("capital", "loud"), cost_weight: float | None = None) -> None:
    """Questions on capitals are right with the first expert, shouting with the second."""
    encoder = build_encoder("hashing:256")
    countries = "Spain Italy Peru Chad Cuba Iran Mali Oman Fiji Laos Togo Malta Nepal Qatar Samoa Syria".split()
    words = "dog cat sun moon tree sea rain wind bread milk house road stone river cloud grass".split()
    prompts = [f"What is the capital city of {country}?" for country in countries]
    prompts += [f"please shout this word: {word}" for word in words]
    right = np.repeat([[1.0, 0.0], [0.0, 1.0]], 16, axis=0)
    table = OutcomeTable(
        query_ids=tuple(map(str, range(32))),
        prompts=tuple(prompts),
        experts=experts,
        scores=right,
        domains=("capitals",) * 16 + ("shouting",) * 16,
    )
    router = build("category", encoder, {"max_abstain": 0.0}).fit(table)
    save(
        router,
        folder,
        table=table,
        encoder=encoder,
        solved=None if cost_weight is None else {"cost_weight": cost_weight},
    )


async def test_auto_routes_each_question_to_the_expert_that_was_measured_best(tmp_path: Path) -> None:
    train(tmp_path / "router")
    async with open_local(config(tmp_path, "{default: {router: router}}")) as system:
        assert await system.ask("What is the capital city of France?") == "Paris"
        assert await system.ask("please shout this word: hello") == "PLEASE SHOUT THIS WORD: HELLO"
        reply = system.answer(GenerateRequest(messages=(Message("user", "What is the capital city of Japan?"),)))
        assert (reply.decision.experts, reply.decision.label) == (("capital",), "capitals")
        assert await reply.text() == "Tokyo" and reply.expert == "capital"


async def test_a_policy_takes_the_cost_weight_that_training_solved_unless_it_states_its_own(tmp_path: Path) -> None:
    train(tmp_path / "solved", cost_weight=12.5)
    train(tmp_path / "plain")
    policies = "{default: {router: solved}, own: {router: solved, cost_weight: 0}, plain: {router: plain}}"
    async with open_local(config(tmp_path, policies)) as system:
        cost_weights = {name: policy.utility.cost_weight for name, policy in system.orchestrator.policies.items()}
    assert cost_weights == {"default": 12.5, "own": 0.0, "plain": 0.0}


async def test_a_policy_of_one_expert_needs_no_router(tmp_path: Path) -> None:
    async with open_local(config(tmp_path, "{default: {expert: loud}}")) as system:
        assert await system.ask("hello") == "HELLO"
        assert await system.ask("france", model="capital") == "Paris"


async def test_a_policy_that_names_an_unknown_expert_is_refused_when_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expert of policy 'default': 'luod' is not in .*did you mean 'loud'"):
        async with open_local(config(tmp_path, "{default: {expert: luod}}")):
            pass


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        (
            "{kind: aggregate, aggregator: luod}",
            "aggregate of policy 'default': 'luod' is not in .*did you mean 'loud'",
        ),
        (
            "{kind: aggregate, aggregator: {a: loud, default: coe/default}}",
            "aggregate .* 'coe/default' is not in the reg",
        ),
        ("{kind: aggregate, aggregator: vectors}", "'vectors' cannot chat, so it cannot answer"),
        ("{kind: chain, experts: [loud, captal]}", "chain of policy 'default': 'captal' is not in .*mean 'capital'"),
        ("aggregate", "policy 'default': composition 'aggregate' needs the setting aggregator"),
    ],
)
async def test_a_composition_that_names_an_expert_it_cannot_call_is_refused_when_opened(
    tmp_path: Path, composition: str, message: str
) -> None:
    path = config(tmp_path, f"{{default: {{expert: loud, composition: {composition}}}}}")
    with (tmp_path / "experts.yaml").open("a") as file:
        file.write("  - {name: vectors, kind: embedding, source: 'fake://echo', capabilities: [embed]}\n")
    with pytest.raises(ConfigError, match=message):
        async with open_local(path):
            pass


async def test_a_router_that_names_an_expert_that_is_gone_is_refused_when_opened(tmp_path: Path) -> None:
    train(tmp_path / "router", experts=("capital", "loudly"))
    with pytest.raises(InvalidArtifact, match="loudly"):
        async with open_local(config(tmp_path, "{default: {router: router}}")):
            pass


async def test_a_wrong_experts_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = config(tmp_path, "{}")
    (tmp_path / "experts.yaml").write_text("experts:\n  - {name: auto, kind: model, source: 'fake://echo'}\n")
    with pytest.raises(InvalidSpec, match=r"experts.yaml:2.*'auto' is reserved"):
        async with open_local(path):
            pass


def test_every_engine_takes_its_section_of_the_configuration() -> None:
    from coe.engines import ENGINES, create_engine
    from coe.hosting import engine_options

    for kind in ENGINES:
        assert create_engine(kind, **engine_options(Config(), kind))


async def test_a_remote_expert_without_its_key_is_refused_by_the_name_of_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    path = config(tmp_path, "{default: {expert: far}}")
    (tmp_path / "experts.yaml").write_text(
        "experts:\n  - {name: far, kind: remote, source: 'http://127.0.0.1:9/v1', api_key_env: FAR_KEY, "
        "context_length: 100, price: {input_usd_per_mtok: 1, output_usd_per_mtok: 1}}\n"
    )
    async with open_local(path) as system:
        with pytest.raises(ConfigError, match="FAR_KEY"):
            await system.ask("hello")


def test_without_a_stated_budget_most_of_the_free_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from coe.hosting import budget_bytes

    monkeypatch.setattr("coe.engines.hf.load.free_bytes", lambda device: 1000)
    assert budget_bytes(Config(), {"hf", "remote"}) == 800
    assert budget_bytes(Config(host=HostConfig(budget=123)), {"hf"}) == 123
    assert budget_bytes(Config(), {"remote"}) == 0
