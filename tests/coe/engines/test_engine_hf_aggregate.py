"""Compositions over a real engine: its tokenizer decides what fits, and its seeds make samples reproducible."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from engine_models import adapter_spec, model_spec

from coe.compose import Aggregate, Composition, SelfConsistency
from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.host import Host
from coe.orchestrator import Orchestrator, Reply
from coe.policy import Policy
from coe.types import Answer, GenerateRequest
from registry.store import Snapshot
from routers.base import Estimate, Message, Query
from routers.selectors import TopK


class Same:
    """A router with the same estimate for every query."""

    requires: frozenset[str] = frozenset()

    def estimate(self, queries: list[Query]) -> Estimate:
        import numpy as np

        return Estimate(("a0", "a1"), np.tile([0.6, 0.5], (len(queries), 1)))


@pytest.fixture
async def host(engine: HFEngine, tiny: Path, adapters: list[Adapter]) -> AsyncIterator[Host]:
    """A base whose context holds 320 tokens, and two adapters."""
    specs = [
        model_spec(tiny, context_length=320, size_bytes=2**20),
        *(adapter_spec(adapter.path) for adapter in adapters[:2]),
    ]
    snapshot = Snapshot(1, {spec.name: spec for spec in specs})
    served = Host(snapshot, {"hf": engine}, budget_bytes=2**30, locate=lambda spec: Path(spec.source))
    yield served
    await served.aclose()


async def answered(host: Host, composition: Composition, request: GenerateRequest) -> tuple[Reply, Answer]:
    policy = Policy("default", Same(), composition=composition, select=TopK(2))
    reply = Orchestrator(host.snapshot, {"default": policy}, ask=host.ask).answer(request)
    text = await reply.text()
    assert reply.answer is not None and reply.answer.text == text
    return reply, reply.answer


async def test_answers_that_a_real_context_cannot_hold_are_cut_until_they_fit(host: Host) -> None:
    request = GenerateRequest(messages=(Message("user", "the capital of france"),), max_tokens=40)
    reply, answer = await answered(host, Aggregate("tiny", max_answer_tokens=200), request)
    assert answer.expert == "tiny" and answer.notes[0].startswith("the aggregator saw the first ")
    assert answer.notes[0].endswith("the context of tiny holds 320 tokens")
    last = [name for name in reply.done if name.endswith("aggregator")][-1]
    final = reply.done[last]
    assert isinstance(final, Answer) and final.usage.prompt_tokens + 40 <= 320 and final.text == answer.text
    taken = [outcome.usage.prompt_tokens for outcome in reply.done.values() if isinstance(outcome, Answer)]
    assert answer.usage.prompt_tokens == sum(taken) and len(taken) == 3


async def test_samples_differ_among_each_other_and_repeat(host: Host) -> None:
    request = GenerateRequest(messages=(Message("user", "the end"),), max_tokens=8)
    composition = SelfConsistency(n=3, temperature=1.5)
    (first, one), (second, two) = [await answered(host, composition, request) for _ in range(2)]
    said = [[o.text for o in reply.done.values() if isinstance(o, Answer)] for reply in (first, second)]
    assert said[0] == said[1] and len(set(said[0])) == 3 and one.text == two.text
