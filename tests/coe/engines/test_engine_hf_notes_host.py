"""Composed experts on a host: real peers of two architectures and an adapter leave notes, the first member reads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_models import make_tokenizer, save_adapter
from latent_experts import Composition, asked, composition, interactions, left, loaded, noted, said
from latent_models import save_tiny

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.host import Host
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

MIB = 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with an adapter, a Gemma of the same width, and two compositions of them."""
    root, tokenizer = tmp_path_factory.mktemp("host"), make_tokenizer()
    llama = save_tiny(root / "tiny", "LlamaForCausalLM", tokenizer)
    return {
        "tiny": llama,
        "gemma": save_tiny(root / "gemma", "Gemma3ForCausalLM", tokenizer, seed=1),
        "tuned": save_adapter(root / "tuned", llama),
        "both": composition(root / "both", ("gemma", "tuned"), interactions(("gemma", "tuned"))).folder,
        "merged": composition(root / "merged", ("tuned",), architecture="cache").folder,
    }


def _specs(folders: dict[str, Path], **settings: Any) -> list[ExpertSpec]:
    def spec(name: str, kind: Kind, **fields: Any) -> ExpertSpec:
        return ExpertSpec(name=name, kind=kind, source=str(folders[name]), **fields)

    both = {"interaction": interactions(("gemma", "tuned")).shape.document()} | settings
    return [
        spec("tiny", Kind.MODEL, size_bytes=MIB),
        spec("gemma", Kind.MODEL, size_bytes=MIB),
        spec("tuned", Kind.ADAPTER, base="tiny", size_bytes=1),
        spec("both", Kind.COMPOSED, architecture="notes", members=("tiny", "gemma", "tuned"), settings=both),
        spec("merged", Kind.COMPOSED, architecture="cache", members=("tiny", "tuned"), settings=settings),
    ]


@pytest.fixture
async def host(folders: dict[str, Path]) -> AsyncIterator[Host]:
    specs = _specs(folders, max_answer_tokens=5)
    snapshot = Snapshot(version=1, experts={each.name: each for each in specs})
    engine = HFEngine(device="cpu", dtype="float32")
    host = Host(snapshot, {"hf": engine}, budget_bytes=5 * MIB, locate=lambda spec: folders[spec.name])
    yield host
    await host.aclose()


async def _by_hand(
    folders: dict[str, Path], request: GenerateRequest, name: str, peers: Sequence[str], **wanted: Any
) -> tuple[str, int]:
    """Each peer asked in an engine of its own, then the first member with their notes: text, and tokens of all."""
    notes, tokens = [], 0
    for peer in peers:
        base = "tiny" if peer == "tuned" else peer
        async with loaded(folders[base], name=base) as model:
            adapter = None
            if peer == "tuned":
                own = ExpertSpec(name=peer, kind=Kind.ADAPTER, source=str(folders[peer]), base="tiny")
                adapter = Adapter(own, folders[peer])
            answer, each = await noted(model, replace(request, max_tokens=5), adapter, **wanted)
            notes.append(left(each))
            assert answer.usage is not None
            tokens += answer.usage.prompt_tokens + answer.usage.completion_tokens
    specs = {spec.name: spec for spec in _specs(folders)}
    async with loaded(folders["tiny"]) as model:
        composed = Composition(specs[name], folders[name]).on(model)
        answer = await said(composed.generate(replace(request, notes=tuple(notes))))
        bare = await said(model.generate(request))
    assert answer.usage is not None
    assert answer.text != bare.text
    return answer.text, tokens + answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    ("name", "peers", "channel"), [("both", ("gemma", "tuned"), "states"), ("merged", ("tuned",), "cache")]
)
async def test_a_host_answers_as_its_members_one_after_the_other(
    host: Host, folders: dict[str, Path], name: str, peers: tuple[str, ...], channel: str
) -> None:
    request = asked("the capital of france is", 16)
    answer = await said(host.ask(name, request))
    text, tokens = await _by_hand(folders, request, name, peers, channel=channel)
    assert answer.text == text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == tokens
    assert answer.reason == "length"


async def test_a_peer_that_cannot_answer_is_left_out_and_named(host: Host, folders: dict[str, Path]) -> None:
    """Gemma's files are damaged: the other peer's notes are read."""
    weights = folders["gemma"] / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:100])
    request = asked("the capital of france is", 16)
    try:
        answer = await said(host.ask("both", request))
    finally:
        weights.write_bytes(kept)
    text, _ = await _by_hand(folders, request, "both", ("tuned",))
    assert answer.text == text
    assert any("gemma" in note for note in answer.chunks[-1].notes)
