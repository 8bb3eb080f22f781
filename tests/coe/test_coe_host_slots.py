"""The host over slots that experts take turns in: right answers, no switch under a generation, nothing leaks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import VirtualTimeLoop, in_virtual_time

from coe.engines.base import ComposedEngine, Expert, Member, ShapeKey, Slot
from coe.engines.fake import FakeEngine, FakeExpert, FakeSlot
from coe.errors import CoeError, OutOfMemory, WeightsError
from coe.host import Host
from coe.types import GenerateRequest
from registry.errors import DigestMismatch
from registry.spec import COMPOSED_ARCHITECTURES, ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

LLAMA, OTHER, OWN = ("a", "b", "c", "d"), ("o", "p"), ("x", "y")
ASK = GenerateRequest((Message("user", "who are you"),))


def expert(name: str, size: int = 4, source: str | None = None, **fields: Any) -> ExpertSpec:
    """An expert whose answer names it, token by token."""
    source = source or f"fake://script?default=I am {name}"
    architecture = "Llama" if name in LLAMA else "Other"
    return ExpertSpec(
        name=name, kind=Kind.MODEL, source=source, size_bytes=size, architecture=architecture, version=1, **fields
    )


class WatchedSlot(FakeSlot):
    """Counts a switch or a closing while a request holds a lease, whether it generates already or not."""

    engine: WatchedEngine

    def _leave(self) -> None:
        if self.expert is not None and self.engine.leased(self.expert):
            self.engine.broken_leases[self.expert.spec.name] += 1
        super()._leave()


class WatchedEngine(FakeEngine):
    """Fails as its plan states: for each load in turn, at which step ("" is none). Records the most that it holds."""

    def __init__(self, plan: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.plan, self.broken_leases = list(plan), Counter[str]()
        self.most_slots, self.most_bytes, self.most_copied = Counter[ShapeKey](), 0, 0
        self.entered: list[str] = []
        self.host: Host | None = None
        self._now: dict[str, str] = {}

    def leased(self, served: Expert) -> bool:
        """Whether the host has a lease on the expert."""
        assert self.host is not None
        places = self.host.cache._places.by_name.values()
        return any(place.expert is served and place.leases for place in places)

    async def open_slot(self, shape: ShapeKey) -> Slot:
        """A watched one."""
        await self.sleep(self.load_delay_s)
        slot = WatchedSlot(shape, self)
        slot.engine = self
        count = sum(each.shape == shape for each in self.open_slots)
        self.most_slots[shape] = max(self.most_slots[shape], count)
        return slot

    def made(self, spec: ExpertSpec, fails_at: str) -> FakeExpert:
        """Fails as planned."""
        if "load" in fails_at:
            self._now[spec.ref] = self.plan.pop(0) if self.plan else ""
        if self._now[spec.ref] and self._now[spec.ref] in fails_at:
            raise WeightsError(f"{spec.name!r} fails at {self._now[spec.ref]}, as planned")
        return super().made(spec, fails_at)

    def enter(self, served: Expert) -> None:
        """Count the bytes of slots and experts."""
        super().enter(served)
        self.entered.append(served.spec.name)
        held = [slot.expert.spec.size_bytes or 0 for slot in self.open_slots if slot.expert]
        asleep = sum(slot.is_parked for slot in self.open_slots)
        slots = (len(self.open_slots) - asleep) * self._slot_bytes + asleep * self._parked_bytes
        self.most_bytes = max(self.most_bytes, slots + sum(held))

    def keep_copy(self, spec: ExpertSpec) -> int:
        """Record the most bytes of copies, the engine's own bound left out."""
        n_bytes = self.copy_bytes(spec) if self._host_bytes else 0
        self.copies |= {spec.ref: n_bytes} if n_bytes else {}
        self.most_copied = max(self.most_copied, sum(self.copies.values()))
        return n_bytes


def make(*specs: ExpertSpec, engine: FakeEngine, budget: int = 20, **options: Any) -> Host:
    snapshot = Snapshot(version=1, experts={spec.name: spec for spec in specs})
    engines = {"fake": engine, "own": FakeEngine(load_delay_s=engine.load_delay_s, sleep=engine.sleep)}
    host = Host(snapshot, engines, budget_bytes=budget, **{"locate": lambda spec: Path("/nowhere"), **options})
    if isinstance(engine, WatchedEngine):
        engine.host = host
    return host


async def ask(host: Host, name: str) -> str:
    return "".join([chunk.text async for chunk in host.ask(name, ASK)])


@in_virtual_time
async def test_experts_of_a_shape_take_turns_in_one_slot_each_loaded_once_for_its_batch() -> None:
    engine = WatchedEngine(slots=1, slot_bytes=3, token_delay_s=0.01)
    host = make(*map(expert, LLAMA[:3]), engine=engine, budget=1000, aging_s=60.0)
    answers = await asyncio.gather(*(ask(host, name) for _ in range(10) for name in "abc"))
    assert answers == [f"I am {name}" for _ in range(10) for name in "abc"]
    assert engine.tally.loads == {"a": 1, "b": 1, "c": 1} and engine.most_slots == {ShapeKey("Llama"): 1}
    stats = host.cache.stats
    assert (stats.loads, stats.switches, stats.evictions, stats.bytes_loaded) == (3, 2, 2, 12)
    assert host.cache.used_bytes == 7 and host.footprint("a", "b") == 14
    assert not host.fits_free("a") and host.fits_free("c")
    await host.aclose()
    assert not engine.open_slots and host.cache.used_bytes == 0


@in_virtual_time
async def test_a_failed_switch_leaves_the_former_expert_and_an_empty_slot_serves_again() -> None:
    engine = WatchedEngine(slots=1, plan=["", "load", "switch", "", "switch", "switch", ""])
    host = make(expert("a"), expert("b"), engine=engine)
    assert await ask(host, "a") == "I am a"
    [slot] = engine.open_slots
    with pytest.raises(WeightsError, match="fails at load"):
        await ask(host, "b")
    assert host.resident == {"a"} and host.cache.stats.evictions == 0
    with pytest.raises(WeightsError, match="fails at switch"):
        await ask(host, "b")
    assert not host.resident and engine.open_slots == [slot] and host.cache.used_bytes == 4
    assert await ask(host, "a") == "I am a" and engine.open_slots == [slot]
    host.cache.retry("b@1")  # else the next failure is the third in a row
    for _ in range(2):
        with pytest.raises(WeightsError, match="fails at switch"):
            await ask(host, "b")
    assert engine.open_slots == [] and host.cache.used_bytes == 0, "an empty slot that fails is closed"
    assert await ask(host, "b") == "I am b" and engine.open_slots != [slot]
    await host.aclose()
    assert not engine.open_slots


@in_virtual_time
async def test_files_that_are_wrong_leave_the_former_expert_and_those_that_change_are_not_served() -> None:
    looks = Counter[str]()

    def locate(spec: ExpertSpec) -> Path:
        looks[spec.name] += 1
        if spec.name == "b" or (spec.name == "c" and looks["c"] == 2):
            raise DigestMismatch(spec.name, ["model.safetensors changed"])
        return Path("/nowhere")

    engine = WatchedEngine(slots=1)
    host = make(*map(expert, "abc"), engine=engine, locate=locate)
    assert await ask(host, "a") == "I am a"
    with pytest.raises(WeightsError, match="'b' cannot be loaded"):
        await ask(host, "b")
    assert host.resident == {"a"} and engine.tally.loads == {"a": 1}
    with pytest.raises(WeightsError, match="'c' cannot be loaded"):
        await ask(host, "c")
    assert not host.resident, "the slot has files that were not verified"
    assert await ask(host, "c") == "I am c" and len(engine.open_slots) == 1
    await host.aclose()


class Together:
    """Serves a composed expert by its first member."""

    def compose(self, spec: ExpertSpec, members: dict[str, Member], path: Path | None) -> Expert:
        """The member itself."""
        return next(iter(members.values())).expert


class ComposedFake(WatchedEngine, Together):
    """A watched engine that serves composed experts, too."""


@in_virtual_time
async def test_members_of_one_shape_need_a_slot_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPOSED_ARCHITECTURES, "logits", "fake")
    both = ExpertSpec(name="both", kind=Kind.COMPOSED, members=("a", "b"), architecture="logits")
    few, enough = ComposedFake(slots=1), ComposedFake(slots=2)
    assert isinstance(few, ComposedEngine)
    with pytest.raises(
        OutOfMemory, match=r"'a@1', 'b@1' need 2 slots of one shape .* engine opens 1: raise its `slots"
    ):
        await ask(make(expert("a"), expert("b"), both, engine=few), "both")
    host = make(expert("a"), expert("b"), expert("c"), both, engine=enough)
    assert [await ask(host, name) for name in ("both", "c", "both")] == ["I am a", "I am c", "I am a"]
    assert enough.most_slots == {ShapeKey("Llama"): 2} and host.cache.stats.switches == 2
    await host.aclose()


@in_virtual_time
async def test_a_pinned_expert_keeps_its_slot() -> None:
    engine = WatchedEngine(slots=1)
    host = make(*map(expert, "ab"), engine=engine, pins=("a",))
    assert await ask(host, "b") == "I am b" and await ask(host, "a") == "I am a"
    with pytest.raises(OutOfMemory, match="'b@1' need 1 slots of one shape .* of which pinned experts hold 1"):
        await ask(host, "b")
    assert host.resident == {"a"}
    await host.aclose()


@in_virtual_time
async def test_the_process_of_an_expert_that_leaves_for_one_of_another_shape_stays_for_the_next_of_its_own() -> None:
    engine = WatchedEngine(slots=1, slot_bytes=5, parked_bytes=2)
    host = make(*map(expert, "abop"), engine=engine, budget=12, most_parked=1)
    assert [await ask(host, name) for name in "aobp"] == [f"I am {name}" for name in "aobp"]
    llama, other = engine.open_slots
    assert (llama.is_parked, other.is_parked) == (True, False) and host.cache.used_bytes == 11
    assert (host.cache.stats.parked, host.cache.stats.switches, host.cache.slots) == (3, 2, 2)
    assert host.resident == {"p"} and host.cache.room(["a@1"]) == {"p@1"}
    engine.capabilities = replace(engine.capabilities, sleep=False)  # such as a process that does not sleep after all
    assert await ask(host, "a") == "I am a"
    assert engine.open_slots == [llama] and host.cache.used_bytes == 9
    await host.aclose()
    assert not engine.open_slots and host.cache.used_bytes == 0


@in_virtual_time
async def test_an_expert_that_has_a_copy_in_host_memory_returns_from_there() -> None:
    engine = WatchedEngine(slots=1, load_delay_s=3.0, host_bytes=8)
    host = make(*map(expert, "abc"), engine=engine, budget=4)
    clock, times = asyncio.get_running_loop().time, []
    for name in "abcbac":
        started = clock()
        assert await ask(host, name) == f"I am {name}"
        times.append(round(clock() - started))
    # The first one is built from its files, `b` and `c` are copied, then `b` comes from its copy; `a` takes the copy of
    # the one that is needed last.
    assert times[:4] == [3 + 3, 3, 3, 0] and times[4] == 3
    assert host.cache.copied == engine.copies.keys() and host.cache.copied_bytes == 8
    await host.aclose()


@dataclass(frozen=True)
class Event:
    """A request: when it comes, for which expert, and after how many seconds its client leaves; or a prefetch."""

    at_s: float
    name: str
    leaves_s: float | None
    prefetch: bool


def events() -> st.SearchStrategy[list[Event]]:
    """Requests within two seconds; answers of three tokens take 0.3 s, loads 0.5 s."""
    moments = st.integers(0, 40).map(lambda tick: tick / 20)
    waits = st.none() | st.integers(0, 30).map(lambda tick: tick / 20)
    names, prefetches = st.sampled_from((*LLAMA, *OTHER, *OWN)), st.integers(0, 4).map(lambda n: n == 0)
    return st.lists(st.builds(Event, moments, names, waits, prefetches), max_size=25)


failures = st.lists(st.sampled_from(("", "", "", "load", "switch")), max_size=20)


async def one(host: Host, event: Event) -> str | None:
    """The answer; None for a prefetch, or if the client left or the expert failed to load."""
    await asyncio.sleep(event.at_s)
    if event.prefetch:
        host.prefetch(event.name)
        return None
    try:
        async with asyncio.timeout(event.leaves_s):
            return await ask(host, event.name)
    except (TimeoutError, CoeError) as error:
        assert isinstance(error, TimeoutError) or "as planned" in str(error), error
        return None


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(work)


@settings(max_examples=50, deadline=None)
@given(
    events(),
    failures,
    st.integers(1, 2),
    st.sampled_from((18, 26, 1000)),
    st.sampled_from(((None, 0), (2, 0), (None, 11), (2, 11))),
    st.randoms(use_true_random=False),
)
def test_after_any_requests_failures_and_cancellations_answers_are_right_and_nothing_leaks(
    wanted: list[Event], plan: list[str], slots: int, budget: int, kept: tuple[int | None, int], rng: Any
) -> None:
    sizes = {name: rng.randint(3, 6) for name in (*LLAMA, *OTHER, *OWN)}
    logs: list[list[str]] = []

    async def work() -> None:
        options: dict[str, Any] = {"slots": slots, "slot_bytes": 5, "parked_bytes": kept[0], "host_bytes": kept[1]}
        engine = WatchedEngine(plan, **options, token_delay_s=0.1, load_delay_s=0.5, capacity=2)
        logs.append(engine.entered)
        specs = [expert(name, sizes[name], engine="own" if name in OWN else None) for name in sizes]
        host = make(*specs, engine=engine, budget=budget, aging_s=2.0, most_parked=1)
        async with asyncio.timeout(1000):
            answers = await asyncio.gather(*(one(host, event) for event in wanted))
        for event, answer in zip(wanted, answers, strict=True):
            assert answer in (None, f"I am {event.name}")
            waits = event.leaves_s is None and not event.prefetch
            assert plan or answer or not waits, "without failures, everybody who waits is answered"
        await still(host, engine)
        assert not engine.tally.drains and not engine.broken_leases
        assert engine.most_bytes <= budget and engine.most_copied <= kept[1]
        assert all(count <= slots for count in engine.most_slots.values())
        await host.aclose()
        assert not engine.open_slots and not engine.resident and host.cache.used_bytes == 0 == host.cache.slots

    for _ in range(2):
        run(work())
    assert logs[0] == logs[1], "the same requests give the same loads"


async def still(host: Host, engine: WatchedEngine) -> None:
    """Once loads that no client waits for have ended: no place is taken, and memory is counted as it is."""
    await asyncio.sleep(100)
    assert not host.cache.loading
    assert host.busy == 0 and not +host.in_flight
    own = host._engines.by_kind["own"]
    assert isinstance(own, FakeEngine)
    assert host.cache.resident == engine.resident | own.resident
    assert not any(place.leases for place in host.cache._places.by_name.values())
    serving = [slot for slot in engine.open_slots if slot.expert is not None]
    assert len(engine.open_slots) + len(own.resident) == host.cache.slots and len(serving) == len(engine.resident)
    assert host.cache.used_bytes <= host.cache.budget_bytes
    assert host.cache.copied == engine.copies.keys() and host.cache.copied_bytes == sum(engine.copies.values())
    assert sum(slot.is_parked for slot in engine.open_slots) <= 1
