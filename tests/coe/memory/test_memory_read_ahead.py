"""Weights that wait for their room are read ahead by an open slot of their shape; loads are predicted by their way."""

import asyncio

from coe.memory import ExpertCache, Need


class Reading:
    """Slots of one shape for two experts at a time; every load takes `load_s` on the clock."""

    def __init__(self, budget: int = 2) -> None:
        self.now, self.load_s = 0.0, {"open": 8.0, "switch": 0.5}
        self.ahead: list[str] = []
        self.go = asyncio.Event()
        self.cache: ExpertCache[str] = ExpertCache(
            budget,
            new_slot=lambda name: ReadingSlot(self),
            need=lambda name: Need("shape", 1, slots=9),
            clock=lambda: self.now,
        )


class ReadingSlot:
    def __init__(self, reading: Reading) -> None:
        self.expert: str | None = None
        self._reading = reading

    async def switch(self, name: str) -> str:
        self._reading.now += self._reading.load_s["open" if self.expert is None else "switch"]
        self.expert = name
        return name

    async def prefetch(self, name: str) -> None:
        self._reading.ahead.append(name)
        await self._reading.go.wait()

    async def close(self) -> None:
        self.expert = None


async def test_one_absent_expert_at_a_time_is_read_ahead() -> None:
    reading = Reading()
    cache = reading.cache
    cache.read_ahead("c")
    await asyncio.sleep(0)
    assert reading.ahead == []  # no slot is open that could read it
    async with cache.lease("a", "b"):
        assert not cache.prefetch("c")
        cache.read_ahead("a", "c")
        cache.read_ahead("d")
        await asyncio.sleep(0)
        assert reading.ahead == ["c"]
        reading.go.set()
        await asyncio.sleep(0.01)
        cache.read_ahead("d")
        await asyncio.sleep(0)
        assert reading.ahead == ["c", "d"]
        assert cache.resident == {"a", "b"}
    await cache.aclose()


async def test_closing_ends_what_is_read_ahead() -> None:
    reading = Reading()
    async with reading.cache.lease("a"):
        reading.cache.read_ahead("c")
        await asyncio.sleep(0)
    await asyncio.wait_for(reading.cache.aclose(), 5)
    assert len(asyncio.all_tasks()) == 1


async def test_a_load_is_predicted_by_the_way_that_it_would_take() -> None:
    reading = Reading()
    cache = reading.cache
    async with cache.lease("a"):
        pass
    assert cache.expected_load_s("b") == 8.0  # there is room for another slot
    async with cache.lease("b"):
        pass
    async with cache.lease("c"):
        pass
    assert cache.stats.switches == 1
    assert cache.expected_load_s("d") == 0.5
    await cache.aclose()
