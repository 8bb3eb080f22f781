"""The guarantees of the cache: the budget holds, leases are never broken, no deadlocks, failures leave no state."""

import asyncio
import random
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from coe.errors import EngineError, OutOfMemory
from coe.memory import ExpertCache, Need
from coe.memory.eviction import Resident, lru, victims

SIZES = {"a": 4, "b": 4, "c": 4, "big": 8, "huge": 13}


class Shelf:
    """Loads and unloads by name, and checks the budget at every step."""

    def __init__(self, budget: int = 10, **options: object) -> None:
        self.resident: set[str] = set()
        self.loads: list[str] = []
        self.fail: set[str] = set()
        self.delay_s = 0.0
        self.clock = 0.0
        self.cache: ExpertCache[str] = ExpertCache(
            budget,
            new_slot=lambda name: ShelfSlot(self),
            need=lambda name: Need(name, SIZES[name]),
            clock=self.tick,
            **options,  # type: ignore[arg-type]
        )

    def tick(self) -> float:
        self.clock += 1
        return self.clock

    async def load(self, name: str) -> str:
        await asyncio.sleep(self.delay_s)
        if name in self.fail:
            raise EngineError(f"{name} is broken")
        self.resident.add(name)
        self.loads.append(name)
        assert sum(SIZES[n] for n in self.resident) <= self.cache.budget_bytes
        return name.upper()

    async def unload(self, expert: str) -> None:
        await asyncio.sleep(self.delay_s)
        self.resident.remove(expert.lower())


class ShelfSlot:
    """A slot of one expert."""

    def __init__(self, shelf: Shelf) -> None:
        self.expert: str | None = None
        self._shelf = shelf

    async def switch(self, name: str) -> str:
        self.expert = await self._shelf.load(name)
        return self.expert

    async def close(self) -> None:
        if self.expert is not None:
            await self._shelf.unload(self.expert)


async def use(shelf: Shelf, *names: str) -> None:
    async with shelf.cache.lease(*names) as experts:
        assert dict(experts) == {name: name.upper() for name in names}


async def test_a_second_lease_of_a_resident_expert_does_not_load_again() -> None:
    shelf = Shelf()
    await use(shelf, "a")
    await use(shelf, "a")
    assert shelf.loads == ["a"] and shelf.cache.stats.loads == 1 and shelf.cache.stats.bytes_loaded == 4


async def test_the_least_recently_used_goes_first() -> None:
    shelf = Shelf()
    for name in ("a", "b", "a", "c"):
        await use(shelf, name)
    assert shelf.resident == {"a", "c"} and shelf.cache.stats.evictions == 1


async def test_a_pinned_expert_stays_and_an_expert_beside_it_that_cannot_fit_is_refused() -> None:
    shelf = Shelf(pins=["a"])
    await use(shelf, "a")
    for name in ("b", "c", "b"):
        await use(shelf, name)
    assert "a" in shelf.resident
    with pytest.raises(OutOfMemory, match="'big' need.*pinned"):
        await use(shelf, "big")


async def test_what_never_fits_is_refused_at_once_with_both_numbers() -> None:
    shelf = Shelf(budget=8)
    with pytest.raises(OutOfMemory, match="'huge' need .* MiB, the budget is"):
        await use(shelf, "huge")
    assert shelf.loads == []


async def test_a_leased_expert_is_not_evicted_and_the_waiter_gets_its_turn_after() -> None:
    shelf = Shelf()
    async with shelf.cache.lease("a", "b"):
        waiter = asyncio.create_task(use(shelf, "big"))
        await asyncio.sleep(0.01)
        assert not waiter.done() and shelf.resident == {"a", "b"}
        assert shelf.cache.room("c") is None
    await waiter
    assert shelf.resident == {"big"}


async def test_leases_are_granted_in_order_so_that_small_ones_do_not_starve_a_large_one() -> None:
    shelf, order = Shelf(), []

    async def hold(*names: str) -> None:
        async with shelf.cache.lease(*names):
            order.append(names)
            await asyncio.sleep(0.005)

    async with shelf.cache.lease("a"):
        large = asyncio.create_task(hold("big"))
        await asyncio.sleep(0)
        small = asyncio.create_task(hold("a"))
        await asyncio.sleep(0.01)
        assert order == []
    await asyncio.gather(large, small)
    assert order == [("big",), ("a",)]


async def test_a_waiting_lease_that_new_pins_leave_no_room_is_refused_at_once_and_the_others_go_on() -> None:
    shelf = Shelf(budget=8)
    async with shelf.cache.lease("a"):
        never = asyncio.create_task(use(shelf, "big"))
        await asyncio.sleep(0)
        behind = [asyncio.create_task(use(shelf, name)) for name in ("a", "b")]
        await asyncio.sleep(0)
        shelf.cache.pins = frozenset({"a"})
        with pytest.raises(OutOfMemory, match="'big' need.*pinned"):
            await asyncio.wait_for(never, 1)
        await asyncio.wait_for(asyncio.gather(*behind), 1)
    assert shelf.loads == ["a", "b"]


async def test_a_waiting_lease_that_a_smaller_budget_cannot_hold_is_refused_and_the_others_go_on() -> None:
    shelf = Shelf()
    async with shelf.cache.lease("a"):
        waiters = [asyncio.create_task(use(shelf, name)) for name in ("big", "b")]
        await asyncio.sleep(0)
        shelf.cache.budget_bytes = 7
    never, behind = await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), 1)
    assert isinstance(never, OutOfMemory) and behind is None and shelf.loads == ["a", "b"]


async def test_a_lease_that_waits_is_granted_when_an_idle_expert_is_unpinned() -> None:
    shelf = Shelf(pins=["a"])
    await use(shelf, "a")
    async with shelf.cache.lease("b"):
        waiter = asyncio.create_task(use(shelf, "c"))
        await asyncio.sleep(0)
        shelf.cache.pins = frozenset()
        await asyncio.wait_for(waiter, 1)
    assert shelf.resident == {"b", "c"}


async def test_what_a_pinned_expert_takes_only_while_it_loads_refuses_no_lease() -> None:
    """`small` is read into the slot of `large`, whose bytes count until then."""
    needs, read = {"large": Need("s", 8), "small": Need("s", 2), "other": Need("o", 4)}, asyncio.Event()

    class Slow(ShelfSlot):
        async def switch(self, name: str) -> str:
            if name == "small":
                await read.wait()
            self.expert = name.upper()
            return self.expert

    cache = ExpertCache(10, new_slot=lambda name: Slow(Shelf()), need=needs.__getitem__, pins=["small"])
    async with cache.lease("large"):
        pass
    assert cache.prefetch("small") and cache.used_bytes == 8
    waiter = asyncio.create_task(use(SimpleNamespace(cache=cache), "other"))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert not waiter.done()
    read.set()
    await asyncio.wait_for(waiter, 1)
    assert cache.used_bytes == 6


async def test_two_leases_of_the_same_pair_in_other_order_do_not_deadlock() -> None:
    shelf = Shelf(budget=8)
    shelf.delay_s = 0.001
    pairs = [("a", "b"), ("b", "c"), ("c", "a"), ("b", "a")] * 10
    await asyncio.wait_for(asyncio.gather(*(use(shelf, *pair) for pair in pairs)), 10)


async def test_a_failed_load_reaches_everyone_who_waits_frees_the_room_and_is_tried_again() -> None:
    shelf = Shelf()
    shelf.delay_s, shelf.fail = 0.01, {"a"}
    outcomes = await asyncio.gather(use(shelf, "a"), use(shelf, "a"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineError, EngineError]
    assert shelf.cache.used_bytes == 0
    shelf.fail = set()
    await use(shelf, "a")
    assert shelf.loads == ["a"]


async def test_a_cancelled_waiter_leaves_the_line_and_a_cancelled_loader_leaves_the_expert_to_others() -> None:
    shelf = Shelf()
    shelf.delay_s = 0.01
    async with shelf.cache.lease("big"):
        waiter = asyncio.create_task(use(shelf, "a"))
        await asyncio.sleep(0.01)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
    loader = asyncio.create_task(use(shelf, "b"))
    await asyncio.sleep(0.001)
    loader.cancel()
    await asyncio.gather(loader, return_exceptions=True)
    await use(shelf, "b")
    assert shelf.loads.count("b") == 1 and "a" not in shelf.loads


async def test_room_names_what_would_leave_and_respects_what_to_keep() -> None:
    shelf = Shelf()
    await use(shelf, "a")
    await use(shelf, "b")
    assert shelf.cache.room(["c"]) == {"a"} and shelf.cache.room(["c"], keep=["a"]) == {"b"}
    assert shelf.cache.room(["a"]) == frozenset() and shelf.cache.room(["c"], keep=["a", "b"]) is None
    async with shelf.cache.lease("a"), shelf.cache.lease("b"):
        assert shelf.cache.room(["c"]) is None and shelf.cache.room(["c"], drain=True) == {"a"}
        assert shelf.cache.room(["c"], keep=["a"], drain=True) == {"b"}
    assert shelf.cache.peek("a") == "A" and shelf.cache.peek("c") is None


async def test_the_room_of_what_is_unloaded_is_counted_once() -> None:
    shelf = Shelf()
    await use(shelf, "a")
    await use(shelf, "b")
    shelf.delay_s = 0.01
    await asyncio.gather(use(shelf, "c"), use(shelf, "c"), use(shelf, "c"))  # in the memory of `a`, one after the other
    assert shelf.resident == {"b", "c"} and shelf.cache.stats.evictions == 1


async def test_a_prefetch_loads_next_to_kept_weights_and_no_request_waits_for_it() -> None:
    shelf = Shelf()
    shelf.delay_s = 0.01
    async with shelf.cache.lease("a"):
        assert shelf.cache.prefetch("b", keep=["a"]) and shelf.cache.loading == {"b"}
        assert shelf.cache.prefetch("b")  # loading already: not a second time
        await asyncio.wait_for(use(shelf, "a"), 0.005)
        assert not shelf.cache.prefetch("c", keep=["a"])  # a loading expert is not evicted
    await use(shelf, "b")
    assert shelf.loads == ["a", "b"]


async def test_a_prefetch_evicts_only_weights_that_no_request_needs() -> None:
    shelf = Shelf()
    await use(shelf, "a")
    await use(shelf, "b")
    assert not shelf.cache.prefetch("c", keep=["a", "b"]) and not shelf.cache.prefetch("huge")
    assert shelf.cache.prefetch("c", keep=["a"])  # the older one, which plain LRU would take
    await use(shelf, "c")
    assert shelf.resident == {"a", "c"} and shelf.cache.used_bytes == 8


async def test_a_prefetch_never_stands_in_line() -> None:
    shelf = Shelf()
    async with shelf.cache.lease("a"):
        waiter = asyncio.create_task(use(shelf, "big"))
        await asyncio.sleep(0)
        assert not shelf.cache.prefetch("b") and shelf.cache.prefetch("a")
    await waiter
    assert shelf.loads == ["a", "big"]


async def test_a_lease_takes_the_room_of_a_prefetch_that_was_in_vain() -> None:
    shelf = Shelf()
    shelf.delay_s = 0.005
    assert shelf.cache.prefetch("a")
    await asyncio.wait_for(use(shelf, "big"), 1)
    assert shelf.resident == {"big"}


async def test_a_prefetch_that_fails_or_is_cut_short_leaves_nothing_behind() -> None:
    shelf = Shelf()
    shelf.fail = {"a"}
    assert shelf.cache.prefetch("a")
    await asyncio.sleep(0.005)
    assert shelf.cache.used_bytes == 0
    shelf.fail, shelf.delay_s = set(), 10
    assert shelf.cache.prefetch("a")
    await asyncio.sleep(0.001)
    shelf.delay_s = 0
    await shelf.cache.aclose()
    assert shelf.resident == set() and shelf.cache.used_bytes == 0


async def test_close_unloads_everything_also_what_was_still_loading() -> None:
    shelf = Shelf()
    await use(shelf, "a")
    shelf.delay_s = 10
    loading = asyncio.create_task(use(shelf, "b"))
    await asyncio.sleep(0.001)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    shelf.delay_s = 0
    await shelf.cache.aclose()
    assert shelf.resident == set() and shelf.cache.used_bytes == 0


@pytest.mark.parametrize("seed", range(20))
async def test_random_leases_cancellations_and_failures_never_break_the_promises(seed: int) -> None:
    rng = random.Random(seed)
    shelf = Shelf(budget=12)
    shelf.delay_s = 0.0005
    held: dict[str, int] = dict.fromkeys(SIZES, 0)

    async def client() -> None:
        names = rng.sample(["a", "b", "c"], rng.randint(1, 2)) if rng.random() < 0.7 else ["big"]
        shelf.fail = {"c"} if rng.random() < 0.1 else set()
        async with shelf.cache.lease(*names):
            for name in names:
                held[name] += 1
            await asyncio.sleep(rng.random() * 0.002)
            assert all(name in shelf.resident for name in names)
            for name in names:
                held[name] -= 1

    async with AsyncExitStack():
        tasks = [asyncio.create_task(client()) for _ in range(40)]
        for task in rng.sample(tasks, 8):
            await asyncio.sleep(0.0005)
            task.cancel()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    wrong = [o for o in outcomes if o is not None and not isinstance(o, asyncio.CancelledError | EngineError)]
    assert wrong == []
    await shelf.cache.aclose()
    assert shelf.cache.used_bytes == 0 and shelf.resident == set()


def test_lru_orders_by_use_and_then_by_name() -> None:
    experts = [Resident("b", 1, 5.0, 1), Resident("a", 1, 5.0, 9), Resident("c", 1, 2.0, 3)]
    assert [resident.name for resident in lru(experts)] == ["c", "a", "b"]


def test_victims_are_few_a_large_one_spares_the_small_ones_before_it() -> None:
    experts = [Resident("small", 2, 1.0, 1), Resident("large", 8, 2.0, 1)]
    assert [v.name for v in victims(experts, 8, lru) or ()] == ["large"]
    assert [v.name for v in victims(experts, 1, lru) or ()] == ["small"]
    assert victims(experts, 11, lru) is None
