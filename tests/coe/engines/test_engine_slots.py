"""Slots of engines that load and unload, and the shapes of experts."""

from __future__ import annotations

import asyncio
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from coe.engines import Capabilities, LoadingEngine, ShapeKey, Slot, SlotEngine, create_engine
from coe.engines.fake import FakeEngine
from coe.engines.hf.engine import HFEngine
from coe.engines.remote.engine import RemoteEngine
from coe.engines.slots import LoadingSlot, with_slots
from coe.errors import ConfigError, EngineError, InvalidRequest, WeightsError
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

NOWHERE = Path()


def spec_of(name: str = "e", source: str = "fake://echo", **fields: Any) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source=source, version=1, **fields)


class Shared(FakeEngine):
    """An engine with slots, which could load as well."""

    slots_per_shape = 2

    def shape(self, spec: ExpertSpec) -> ShapeKey:
        return ShapeKey(spec.architecture or "any")

    def slot_bytes(self, shape: ShapeKey) -> int:
        return 5

    async def open_slot(self, shape: ShapeKey) -> Slot:
        raise EngineError("nothing opens here")


class OnlySlots:
    """Has all that an engine with slots needs, and no more."""

    capabilities = Capabilities()
    slots_per_shape = 1
    footprint = shape = slot_bytes = open_slot = None


class HalfSlots:
    """Is neither sort of engine."""

    capabilities = Capabilities()
    footprint = load = open_slot = None


def test_a_plug_in_with_slots_needs_no_load() -> None:
    engine = create_engine(f"{__name__}:Shared")
    assert isinstance(engine, Shared) and with_slots(engine) is engine
    assert isinstance(create_engine(f"{__name__}:OnlySlots"), OnlySlots)
    with pytest.raises(ConfigError, match="HalfSlots has no unload; it needs .*, load, unload, or .*, open_slot"):
        create_engine(f"{__name__}:HalfSlots")


def test_a_shape_is_a_value_that_people_can_read() -> None:
    def shape(**fields: Any) -> ShapeKey:
        return ShapeKey("Llama", (("hidden_size", 64), ("layers", 2)), vocabulary=300, dtype="bfloat16", **fields)

    assert shape() == shape() and hash(shape()) == hash(shape()) and shape() != shape(quantization="awq")
    assert str(shape()) == "Llama hidden_size=64 layers=2 vocabulary=300 bfloat16"
    full = shape(quantization="awq", max_adapters=4, max_adapter_rank=16)
    assert str(full) == "Llama hidden_size=64 layers=2 vocabulary=300 bfloat16 awq adapters=4 rank=16"
    assert str(ShapeKey.only(spec_of(architecture="Llama"))) == "Llama only e@1"
    with pytest.raises(FrozenInstanceError):
        shape().dtype = "float32"  # type: ignore[misc]


@pytest.mark.parametrize("engine", [FakeEngine(), HFEngine(), RemoteEngine()])
def test_experts_of_engines_that_load_have_a_slot_of_their_own(engine: LoadingEngine) -> None:
    slots = with_slots(engine)
    assert isinstance(slots, SlotEngine) and with_slots(slots) is slots
    shapes = {slots.shape(spec_of("a")), slots.shape(spec_of("b"))}
    assert len(shapes) == 2 and {shape.expert for shape in shapes} == {"a@1", "b@1"}
    assert {slots.slot_bytes(shape) for shape in shapes} == {0}
    sized = spec_of(size_bytes=8, parameters_total=4)
    assert (slots.footprint(sized), slots.capabilities) == (engine.footprint(sized), engine.capabilities)


async def test_a_slot_loads_switches_and_closes() -> None:
    engine = FakeEngine()
    slot = LoadingSlot(ShapeKey(), engine)
    assert slot.expert is None and not engine.resident
    a = await slot.switch(spec_of("a"), NOWHERE)
    assert slot.expert is a and engine.resident == {"a@1"}
    await slot.prefetch(spec_of("b"), NOWHERE)
    assert engine.resident == {"a@1"}
    b = await slot.switch(spec_of("b", "fake://upper"), NOWHERE)
    assert slot.expert is b and b.spec.name == "b" and engine.resident == {"b@1"}
    request = GenerateRequest((Message("user", "hi"),))
    assert "".join([chunk.text async for chunk in b.generate(request)]) == "HI"
    await slot.park()
    assert slot.expert is None and not engine.resident
    await slot.unpark()
    await slot.switch(spec_of("a"), NOWHERE)
    for _ in range(2):
        await slot.close()
    assert slot.expert is None and not engine.resident
    assert engine.tally.loads == engine.tally.unloads == {"a": 2, "b": 1}


async def test_a_failed_load_leaves_the_slot_empty_and_a_failed_unload_too() -> None:
    engine = FakeEngine()
    slot = LoadingSlot(ShapeKey(), engine)
    a = await slot.switch(spec_of("a"), NOWHERE)
    with pytest.raises(WeightsError):
        await slot.switch(spec_of("bad", "fake://fail?at=load"), NOWHERE)
    assert slot.expert is None and not engine.resident
    a = await slot.switch(spec_of("a"), NOWHERE)
    answer = a.generate(GenerateRequest((Message("user", "one two"),)))
    await anext(answer)
    with pytest.raises(EngineError, match="is generating"):
        await slot.close()
    assert slot.expert is None


async def test_the_fake_engine_shares_slots_among_the_experts_of_an_architecture() -> None:
    engine = FakeEngine(slots=2, slot_bytes=7, load_delay_s=0.001)
    llama, other = spec_of("a", architecture="Llama"), spec_of("o", architecture="Other")
    shape = engine.shape(llama)
    assert shape == engine.shape(spec_of("b", architecture="Llama")) != engine.shape(other)
    assert (engine.slots_per_shape, engine.slot_bytes(shape), engine.footprint(llama)) == (2, 7, 0)
    slot = await engine.open_slot(shape)
    assert engine.open_slots == [slot] and slot.expert is None
    a = await slot.switch(llama, NOWHERE)
    with pytest.raises(WeightsError, match="'o' has the shape Other, the slot Llama"):
        await slot.switch(other, NOWHERE)
    with pytest.raises(WeightsError, match="failed to load"):
        await slot.switch(spec_of("bad", "fake://fail?at=load", architecture="Llama"), NOWHERE)
    assert slot.expert is a and engine.resident == {"a@1"}, "the former expert goes on"
    with pytest.raises(WeightsError, match="failed to load"):
        await slot.switch(spec_of("bad", "fake://fail?at=switch", architecture="Llama"), NOWHERE)
    assert slot.expert is None and not engine.resident, "the slot is empty"
    with pytest.raises(EngineError, match="is not loaded"):
        await anext(a.generate(GenerateRequest((Message("user", "hi"),))))
    await slot.close()
    with pytest.raises(EngineError, match="a slot of Llama is closed"):
        await slot.switch(llama, NOWHERE)
    assert not engine.open_slots and not engine.tally.drains


async def test_a_switch_waits_for_the_generations_of_the_former_expert() -> None:
    engine = FakeEngine(slots=1)
    slot = await engine.open_slot(engine.shape(spec_of()))
    answer = (await slot.switch(spec_of("a"), NOWHERE)).generate(GenerateRequest((Message("user", "one two"),)))
    await anext(answer)
    switch = asyncio.create_task(slot.switch(spec_of("b"), NOWHERE))
    await asyncio.sleep(0.01)
    assert not switch.done() and engine.resident == {"a@1"}
    assert [chunk.text async for chunk in answer] == [" two", ""]
    assert (await switch).spec.name == "b" and engine.resident == {"b@1"} and engine.tally.drains == {"a": 1}


async def test_a_prefetched_expert_switches_without_its_load_time() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    engine = FakeEngine(slots=1, load_delay_s=3.0, sleep=sleep)
    slot = await engine.open_slot(engine.shape(spec_of()))
    await slot.prefetch(spec_of("a"), NOWHERE)
    assert slept == [3.0] and not engine.resident
    await slot.switch(spec_of("a"), NOWHERE)
    assert slept == [3.0] and engine.resident == {"a@1"}


@pytest.mark.parametrize("options", [{"slots": 0}, {"slot_bytes": -1}])
def test_the_fake_engine_checks_its_options(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="slots must be at least 1"):
        FakeEngine(**options)  # type: ignore[arg-type]
