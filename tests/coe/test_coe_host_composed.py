"""A composed expert whose peers are called before it, on one host."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coe.engines.base import Adapter, Expert, Member
from coe.engines.fake import FakeEngine
from coe.errors import DeadlineExceeded, EngineError, Rejected
from coe.host import Host
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import COMPOSED_ARCHITECTURES, ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

MIB = 2**20


def model(name: str) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source="fake://upper", size_bytes=4 * MIB)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", "hello there"),), **fields)


class NotingEngine(FakeEngine):
    """Its experts leave their names as notes; composed ones answer with the notes that they read."""

    capabilities = replace(FakeEngine.capabilities, latent=True)

    async def load(self, spec: ExpertSpec, path: Path) -> Noting:
        return Noting(await super().load(spec, path))

    def compose(self, spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> Reader:
        assert list(members) == [spec.members[0]], "peers are not in memory with it"
        return Reader(spec)


class Noting:
    def __init__(self, expert: Expert) -> None:
        self.spec, self.capacity, self._expert = expert.spec, expert.capacity, expert

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        if request.wants == "latent" and self.spec.name == "b":
            raise EngineError("b is down")
        value = self.spec.name.encode() if request.wants == "latent" else None
        async for chunk in self._expert.generate(request, adapter):
            yield replace(chunk, value=value) if chunk.finish_reason else chunk


class Reader:
    def __init__(self, spec: ExpertSpec) -> None:
        self.spec, self.capacity = spec, 8

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        yield Chunk("+".join(note.data.decode() for note in request.notes or ()), "stop", Usage(1, 1))


async def test_a_staged_expert_calls_its_peers_one_at_a_time_where_memory_is_short(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMPOSED_ARCHITECTURES, "notes", "fake")
    trio = ExpertSpec(
        name="trio", kind=Kind.COMPOSED, members=("a", "b", "c"), architecture="notes", source=str(Path.cwd())
    )
    engine = NotingEngine()
    experts = (model("a"), model("b"), model("c"), trio)
    snapshot = Snapshot(version=1, experts={spec.name: spec for spec in experts})
    host = Host(snapshot, {"fake": engine}, budget_bytes=5 * MIB, locate=lambda spec: Path("/nowhere"))
    assert host.footprint("trio") == 4 * MIB
    chunks = [chunk async for chunk in host.ask("trio", request())]
    assert "".join(chunk.text for chunk in chunks) == "c", "its own weights need no room beside those of a peer"
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens > 1, "the peer's tokens count"
    assert chunks[-1].notes == ("b left no notes: EngineError: b is down",)
    assert "trio answers without the notes of b: b is down" in caplog.text
    with pytest.raises(Rejected, match="'a' reads no notes: only experts of cache, notes do"):
        await anext(host.ask("a", request(notes=())))
    with pytest.raises(DeadlineExceeded):
        await anext(host.ask("trio", request(deadline_s=0.000001)))
