"""The simulator and a real Host decide alike on the same events: admissions, loads and evictions."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import VirtualTimeLoop

from coe.engines.base import Adapter
from coe.engines.fake import FakeEngine
from coe.host import Host
from coe.memory import POLICIES
from coe.scheduler import Scheduler
from coe.simulation.device import Device
from coe.simulation.run import Simulation
from coe.simulation.workload import Machine, Workload
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

LOAD_S, SIZE, PLACES, AGING_S = 0.25, 2**20, 32, 1.0


class Timed:
    """An expert whose answer takes the seconds that are its prompt."""

    def __init__(self, expert: Any) -> None:
        self.spec, self.capacity = expert.spec, expert.capacity

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        await asyncio.sleep(float(request.messages[0].content))
        yield Chunk("", finish_reason="stop", usage=Usage(1, 1))


class TimedEngine(FakeEngine):
    """Logs the time and the expert of each load and unload."""

    def __init__(self) -> None:
        super().__init__(load_delay_s=LOAD_S, capacity=PLACES)
        self.started: list[tuple[float, str]] = []
        self.unloaded: list[tuple[float, str]] = []

    async def load(self, spec: ExpertSpec, path: Path) -> Any:
        self.started.append((asyncio.get_running_loop().time(), spec.name))
        return Timed(await super().load(spec, path))

    async def unload(self, expert: Any) -> None:
        self.unloaded.append((asyncio.get_running_loop().time(), expert.spec.name))


async def _hosted(workload: Workload, answers_s: list[float], room: int, policy: str) -> tuple[Any, Any, list[float]]:
    engine, clock = TimedEngine(), asyncio.get_running_loop().time
    specs = [ExpertSpec(name=n, kind=Kind.MODEL, source="fake://echo", size_bytes=SIZE) for n in workload.bytes_of]
    host = Host(
        Snapshot(version=1, experts={spec.name: spec for spec in specs}),
        {"fake": engine},
        budget_bytes=room * SIZE,
        locate=lambda spec: Path("/nowhere"),
        aging_s=AGING_S,
        eviction=POLICIES[policy],
        clock=clock,
    )
    waits_s = [0.0] * len(workload)

    async def ask(index: int) -> None:
        await asyncio.sleep(workload.at_s[index])
        name = workload.residencies[workload.wants[index]][0]
        request = GenerateRequest(messages=(Message("user", repr(answers_s[index])),))
        async for chunk in host.ask(name, request):
            assert chunk.timing is not None
            waits_s[index] = chunk.timing.queue_s

    await asyncio.gather(*map(ask, range(len(workload))))
    loads, evictions = list(engine.started), list(engine.unloaded)
    await host.aclose()
    return loads, evictions, waits_s


def _seconds(moves: list[tuple[float, str]]) -> list[float]:
    return [at_s for at_s, _ in moves]


def _names(moves: list[tuple[float, str]]) -> list[str]:
    return [name for _, name in moves]


@settings(max_examples=60, deadline=None)
@given(
    wants=st.lists(st.integers(0, 5), min_size=1, max_size=90),
    seed=st.integers(0, 2**32 - 1),
    room=st.integers(1, 4),
    span_s=st.sampled_from([0.5, 4.0, 30.0]),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_the_simulator_decides_as_the_host_does(
    wants: list[int], seed: int, room: int, span_s: float, policy: str
) -> None:
    names = [f"e{number}" for number in range(6)]
    # Times that do not coincide: which of two simultaneous events is first has no meaning.
    rng = random.Random(seed)
    at_s = sorted(rng.uniform(0, span_s) for _ in wants)
    tokens = [rng.randrange(1, 3_000_000) for _ in wants]  # millionths of a second
    workload = Workload([(n,) for n in names], dict.fromkeys(names, SIZE), at_s, wants, [0] * len(wants), tokens)
    machine = Machine(room * SIZE, SIZE / LOAD_S, new_tokens_per_s=1e6, places=PLACES, shared=False)
    device = Device(machine.device_bytes, workload.bytes_of, load_s=machine.load_s, policy=POLICIES[policy])
    rule = Scheduler(device, capacity=lambda name: PLACES, aging_s=AGING_S)
    found = Simulation(workload, machine, device, rule).run()
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        answers_s = [count / 1e6 for count in tokens]
        loads, evictions, waits_s = runner.run(_hosted(workload, answers_s, room, policy))
    assert _names(loads) == _names(found.moves.loads)
    assert _seconds(loads) == pytest.approx(_seconds(found.moves.loads), abs=1e-6)
    assert _names(evictions) == _names(found.moves.evictions)
    assert waits_s == pytest.approx(found.wait_s, abs=1e-6)
