"""Weights in memory: unloaded when idle or on demand, loaded on demand, and evicted in the order of priorities."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from virtual_time import in_virtual_time

from coe.config import Config
from coe.engines.fake import FakeEngine, FakeExpert
from coe.errors import BudgetExceeded, InUse, UnknownModel, WeightsError
from coe.host import Host
from coe.hosting import open_host
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

MIB = 2**20
REQUEST = GenerateRequest(messages=(Message("user", "one two three"),))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def model(name: str, **fields: Any) -> ExpertSpec:
    return ExpertSpec(**{"name": name, "kind": Kind.MODEL, "source": "fake://upper", "size_bytes": 4 * MIB, **fields})


def adapter(name: str, base: str, **fields: Any) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.ADAPTER, base=base, source="fake://echo", **fields)


def snapshot(*specs: ExpertSpec) -> Snapshot:
    return Snapshot(1, {spec.name: spec for spec in specs})


def make(*specs: ExpertSpec, engine: Any = None, budget: int = 10 * MIB, **options: Any) -> Host:
    engine = engine or FakeEngine()
    return Host(snapshot(*specs), {"fake": engine}, budget_bytes=budget, locate=lambda spec: Path(), **options)


async def ask(host: Host, name: str) -> str:
    return "".join([chunk.text async for chunk in host.ask(name, REQUEST)])


async def settled(host: Host) -> None:
    """Wait until closed slots have freed their memory."""
    async with asyncio.timeout(10):
        while host.cache.used_bytes > sum(each.size_bytes for each in host.in_memory()):
            await host.cache.changed()


async def test_weights_are_unloaded_after_their_own_ttl_or_the_default() -> None:
    clock, engine = Clock(), FakeEngine()
    specs = (model("own", ttl_s=5), model("default"), model("never", ttl_s=0))
    host = make(*specs, engine=engine, budget=20 * MIB, clock=clock, ttl_s=60)
    for name in ("own", "default", "never"):
        await ask(host, name)
    clock.now_s = 4.9
    assert host.unload_idle() == ()
    clock.now_s = 5.0
    assert host.unload_idle() == ("own",)
    await settled(host)
    assert engine.tally.unloads == {"own": 1} and host.cache.used_bytes == 8 * MIB
    clock.now_s = 1e6
    assert host.unload_idle() == ("default",) and host.resident == {"never"}
    assert await ask(host, "own") == "ONE TWO THREE", "it loads again"
    assert engine.tally.loads["own"] == 2


async def test_without_any_ttl_nothing_is_unloaded() -> None:
    clock = Clock()
    host = make(model("a"), clock=clock)
    await ask(host, "a")
    clock.now_s = 1e9
    assert host.unload_idle() == () and host.resident == {"a"}


async def test_a_request_to_an_adapter_or_a_composed_expert_counts_for_the_weights_it_uses() -> None:
    clock = Clock()
    host = make(model("base", ttl_s=10), adapter("x", "base"), clock=clock)
    await ask(host, "base")
    clock.now_s = 9
    await ask(host, "x")
    clock.now_s = 18
    assert host.unload_idle() == ()
    [weights] = host.in_memory()
    assert (weights.idle_s, weights.unload_in_s, weights.state) == (9, 1, "resident")
    clock.now_s = 19
    assert host.unload_idle() == ("base",)


@pytest.mark.parametrize("spec", [{"kind": "adapter", "base": "b"}, {"kind": "composed", "members": ("a", "b")}])
def test_a_ttl_belongs_to_weights(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`ttl_s` is for experts with weights of their own.*state it there"):
        ExpertSpec(name="x", source="" if spec["kind"] == "composed" else "fake://echo", ttl_s=1, **spec)


async def test_leased_and_pinned_weights_and_those_of_waiting_requests_are_never_unloaded() -> None:
    clock = Clock()
    specs = (model("used", ttl_s=1), model("pinned", ttl_s=1))
    host = make(*specs, clock=clock, pins=("pinned",))
    await ask(host, "pinned")
    async with aclosing(host.ask("used", REQUEST)) as chunks:
        await anext(chunks)
        clock.now_s = 100
        assert host.unload_idle() == ()
        assert [each.idle_s for each in host.in_memory() if each.name == "used"] == [0]
        with pytest.raises(InUse, match=r"used is used by 1 request\(s\): not unloaded after 0 s"):
            await host.unload("used")
    with pytest.raises(InUse, match=r"pinned: pinned, so it stays in memory; take it out of `pins`"):
        await host.unload("pinned", wait_s=10)
    assert host.unload_idle() == (), "its request has just ended"
    clock.now_s = 101
    assert host.unload_idle() == ("used",) and host.resident == {"pinned"}


@in_virtual_time
async def test_the_timer_unloads_while_nothing_happens_and_ends_with_the_host() -> None:
    config = Config.model_validate({"host": {"budget": 10 * MIB, "ttl_s": 30}})
    loop = asyncio.get_running_loop()
    async with open_host(config, snapshot(model("a")), clock=loop.time) as host:
        await ask(host, "a")
        await asyncio.sleep(29)
        assert host.resident == {"a"}
        await asyncio.sleep(2)
        assert not host.resident
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_unload_waits_for_the_requests_that_use_the_weights_and_frees_the_memory() -> None:
    engine = FakeEngine(token_delay_s=0.01)
    host = make(model("base"), adapter("x", "base"), engine=engine)
    answer = asyncio.create_task(ask(host, "x"))
    while not engine.tally.in_flight["x"]:  # it has no event  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await host.unload("x", wait_s=30) == ("base",), "an adapter's weights are its base's"
    assert await answer == "[x] one two three", "the answer was not cut"
    assert host.cache.used_bytes == 0 and engine.tally.unloads == {"base": 1}
    assert await host.unload("base") == (), "it is not in memory"


async def test_unload_also_frees_an_earlier_version() -> None:
    host = make(model("a", version=1))
    await ask(host, "a")
    host.update(snapshot(model("a", version=2)))
    assert await host.unload("a") == ("a",) and host.cache.used_bytes == 0


async def test_several_are_loaded_together_or_refused_with_the_bytes_that_are_missing() -> None:
    host = make(model("a"), adapter("x", "a"), model("b"), model("c"))
    assert await host.load("x", "b") == ("a", "b") and host.resident == {"a", "b"}
    assert await host.load("c") == ("c",) and len(host.resident) == 2
    with pytest.raises(BudgetExceeded, match=r"'a', 'b', 'c' need 12 MiB, the budget is 10 MiB"):
        await host.load("a", "b", "c")
    for call in (host.load, host.unload):
        with pytest.raises(UnknownModel, match="did you mean 'b'"):
            await call("bb")


async def test_a_load_that_fails_raises_and_holds_nothing() -> None:
    host = make(model("bad", source="fake://fail?at=load"), model("good"))
    with pytest.raises(WeightsError):
        await host.load("bad", "good")
    assert host.busy == 0 and await host.load("good") == ("good",)


async def test_a_load_waits_for_its_turn_and_never_breaks_an_answer() -> None:
    engine = FakeEngine(token_delay_s=0.005)
    host = make(model("big", size_bytes=8 * MIB), model("other", size_bytes=8 * MIB), engine=engine)
    answer = asyncio.create_task(ask(host, "big"))
    while not engine.tally.in_flight["big"]:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await host.load("other") == ("other",)
    assert answer.done() and await answer == "ONE TWO THREE" and host.resident == {"other"}


async def test_weights_of_lower_priority_are_evicted_first_whatever_was_used_last() -> None:
    host = make(model("dear", priority=2), adapter("vital", "base", priority=5), model("base"), model("cheap"))
    for name in ("base", "dear"):
        await ask(host, name)
    assert await host.load("cheap") == ("cheap",)
    assert host.resident == {"base", "cheap"}, "`dear` has the lowest priority of those in memory"
    assert {each.name: each.priority for each in host.in_memory()} == {"base": 5, "cheap": 0}
    await ask(host, "dear")
    assert host.resident == {"base", "dear"}, "`cheap` was used last"
    host.update(snapshot(model("dear"), model("base", priority=2), model("cheap", priority=1)))
    await ask(host, "base")
    await ask(host, "cheap")
    assert host.resident == {"base", "cheap"}, "new priorities hold from now on"


class Measured(FakeExpert):
    bytes_now = 0

    def memory_bytes(self) -> int | None:
        return self.bytes_now or None


class Measuring(FakeEngine):
    async def load(self, spec: ExpertSpec, path: Path) -> FakeExpert:
        await super().load(spec, path)
        return Measured(spec, self)


async def test_the_budget_counts_what_an_engine_measures() -> None:
    host = make(model("a"), model("b"), engine=Measuring())
    await host.load("a", "b")
    assert host.cache.used_bytes == 8 * MIB
    a = host.cache.peek("a")
    assert isinstance(a, Measured)
    a.bytes_now = 7 * MIB
    host.unload_idle()
    assert host.cache.used_bytes == 11 * MIB, "more than the budget of 10 MiB: the next load makes room"
    await ask(host, "b")
    assert host.resident == {"b"}, "a lease beside it was refused until the room was made"
