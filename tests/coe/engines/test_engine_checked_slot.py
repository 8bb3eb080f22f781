"""The seam of slots: whatever an engine raises or returns, a failure is one of its expert, and nothing else stops."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from coe.engines.base import Expert, ShapeKey, SlotEngine
from coe.engines.checked_slot import CheckedSlot, shape_of
from coe.engines.fake import FakeEngine
from coe.errors import CoeError, EngineError, OutOfMemory
from coe.host import Host
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

SPECS = {
    f"{name}@1": ExpertSpec(name=name, kind=Kind.MODEL, source=f"fake://script?default={name}", version=1)
    for name in ("a", "b")
}
ASK = GenerateRequest((Message("user", "who"),))


class OddSlot:
    """A slot of the fake engine that fails at a place of choice."""

    def __init__(self, inner: Any, engine: OddEngine) -> None:
        self.shape, self._inner, self._engine = inner.shape, inner, engine

    @property
    def expert(self) -> Expert | None:
        """Fails at `expert`."""
        self._engine.fail("expert")
        served: Expert | None = self._inner.expert
        return served

    async def switch(self, spec: ExpertSpec, path: Path) -> Any:
        """Fails at `before` and `after`; returns no expert at `nothing`."""
        self._engine.fail("before")
        expert = await self._inner.switch(spec, path)
        self._engine.fail("after")
        return None if self._engine.at == "nothing" else expert

    async def park(self) -> Any:
        """Fails at `park`; says something odd at `asleep`."""
        self._engine.fail("park")
        return "yes" if self._engine.at == "asleep" else await self._inner.park()

    async def close(self) -> None:
        """Fails at `close`, after it has closed."""
        await self._inner.close()
        self._engine.fail("close")


class OddEngine(FakeEngine):
    """Raises an error at a place of choice, once `at` is set."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__(slots=1)
        self.at, self.error = "", error or ZeroDivisionError("odd")

    def fail(self, place: str) -> None:
        """Raise the error at this place."""
        if self.at == place:
            raise self.error

    async def open_slot(self, shape: ShapeKey) -> Any:
        """An odd slot; fails at `open`."""
        self.fail("open")
        return OddSlot(await super().open_slot(shape), self)

    def slot_bytes(self, shape: ShapeKey) -> Any:
        """No number at `bytes`."""
        return None if self.at == "bytes" else 0

    def shape(self, spec: ExpertSpec) -> Any:
        """No shape at `shape`."""
        return "a shape" if self.at == "shape" else super().shape(spec)


def make(engine: SlotEngine) -> Host:
    snapshot = Snapshot(1, {spec.name: spec for spec in SPECS.values()})
    return Host(snapshot, {"fake": engine}, budget_bytes=10, locate=lambda spec: Path("/nowhere"))


async def ask(host: Host, name: str) -> str:
    return "".join([chunk.text async for chunk in host.ask(name, ASK)])


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("odd"), SystemExit(3), asyncio.CancelledError(), OutOfMemory("no")]
)
@pytest.mark.parametrize("place", ["open", "before", "after", "nothing", "bytes", "shape"])
async def test_whatever_fails_is_an_error_of_the_expert_and_the_next_request_is_answered(
    place: str, error: BaseException
) -> None:
    engine = OddEngine(error)
    host = make(engine)
    engine.at = place
    with pytest.raises(CoeError, match="'a'|no"):
        await ask(host, "a")
    assert not engine.open_slots and not host.in_flight["a@1"] and host.cache.used_bytes == 0
    engine.at = ""
    assert [await ask(host, name) for name in "aba"] == ["a", "b", "a"] and len(engine.open_slots) == 1
    await host.aclose()
    assert not engine.open_slots


async def test_a_slot_that_cannot_state_its_expert_has_none() -> None:
    engine = OddEngine()
    host = make(engine)
    assert await ask(host, "a") == "a"
    slot = host.cache._places.by_name["a@1"].slot
    assert isinstance(slot, CheckedSlot) and slot.expert is not None
    engine.at = "before"
    with pytest.raises(EngineError, match="'b' failed: ZeroDivisionError"):
        await ask(host, "b")
    assert host.resident == {"a"}, "the switch failed before anything was replaced"
    engine.at, former = "expert", slot.expert
    assert not slot._serves(former)
    engine.at = ""
    assert slot._serves(former)
    await host.aclose()


async def test_a_failing_close_is_logged_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = OddEngine()
    host = make(engine)
    assert await ask(host, "a") == "a"
    engine.at = "close"
    await host.aclose()
    assert "a slot of fake: closing failed: odd" in caplog.text and host.cache.used_bytes == 0


@pytest.mark.parametrize("place", ["park", "asleep"])
async def test_a_slot_that_does_not_park_is_closed(place: str) -> None:
    engine = OddEngine()
    host = make(engine)
    assert await ask(host, "a") == "a"
    slot = host.cache._places.by_name["a@1"].slot
    engine.at = place
    assert await slot.park() is False
    assert not engine.open_slots and slot.expert is None


def test_a_shape_is_a_shape_key() -> None:
    engine = OddEngine()
    assert shape_of(engine, SPECS["a@1"]) == ShapeKey("fake")
    engine.at = "shape"
    with pytest.raises(EngineError, match="'a' cannot be loaded: its engine states no ShapeKey, but str"):
        shape_of(engine, SPECS["a@1"])
