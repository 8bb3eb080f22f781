"""An expert whose loads fail in a row is left alone for a while, and its neighbours with it; the reason can be read."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest
from virtual_time import in_virtual_time

from coe.engines.fake import FakeEngine, FakeExpert
from coe.errors import EngineError, LoadFailing, OutOfMemory, WeightsError
from coe.host import Host
from coe.memory.failures import FIRST_S, IN_A_ROW, MOST_S, Failures
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

ASK = GenerateRequest((Message("user", "who"),))


class Breaking(FakeEngine):
    """Experts of `broken` fail half-way, after the slot has lost its former expert."""

    def __init__(self, **options: object) -> None:
        super().__init__(slots=1, **options)  # type: ignore[arg-type]
        self.broken: set[str] = set()
        self.tries: list[str] = []

    def made(self, spec: ExpertSpec, fails_at: str) -> FakeExpert:
        """Fails at the switch."""
        if fails_at == "switch":
            self.tries.append(spec.name)
            if spec.name in self.broken:
                raise WeightsError(f"{spec.name!r}: /models/b is damaged", public="its files are damaged")
        return super().made(spec, fails_at)


def make(engine: FakeEngine, budget: int = 8, sizes: dict[str, int] | None = None, **options: object) -> Host:
    sizes = sizes or {"a": 4, "b": 4}
    specs = {
        name: ExpertSpec(
            name=name,
            kind=Kind.MODEL,
            source=f"fake://script?default={name}",
            version=1,
            size_bytes=size,
            architecture="Llama",
        )
        for name, size in sizes.items()
    }
    clock = asyncio.get_running_loop().time
    return Host(
        Snapshot(1, specs), {"fake": engine}, budget_bytes=budget, locate=lambda spec: Path(), clock=clock, **options
    )  # type: ignore[arg-type]


async def ask(host: Host, name: str) -> str:
    return "".join([chunk.text async for chunk in host.ask(name, ASK)])


@in_virtual_time
async def test_after_three_failures_in_a_row_an_expert_is_not_tried_for_a_while_and_its_neighbour_keeps_the_slot() -> (
    None
):
    engine = Breaking(load_delay_s=1.0)
    engine.broken = {"b"}
    host = make(engine)
    for _ in range(IN_A_ROW):
        assert await ask(host, "a") == "a"
        with pytest.raises(WeightsError, match="damaged"):
            await ask(host, "b")
    assert await ask(host, "a") == "a" and not host.cache.failing.keys() - {"b@1"}
    before = list(engine.tries)
    for _ in range(5):
        with pytest.raises(
            LoadFailing, match=r"'b@1' cannot be loaded: 3 loads in a row failed; .* /models/b"
        ) as caught:
            await ask(host, "b")
        assert not host.prefetch("b")
    assert await ask(host, "a") == "a" and engine.tries == before and host.busy == 0
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.status, error.retryable) == (503, True) and 0 < error.retry_after_s <= FIRST_S
    assert "its files are damaged" in error.client_text and "/models" not in error.client_text
    assert type(error.last) is WeightsError and str(error.last) == "'b': /models/b is damaged"
    assert (error.last.code, error.last.status, error.last.client_text) == (
        "invalid_weights",
        500,
        "its files are damaged",
    )
    assert caught.value.last.__traceback__ is None  # its frames would keep what they loaded
    [resident, failing] = host.in_memory()
    assert (resident.name, resident.state, failing.name, failing.state) == ("a", "resident", "b", "failing")
    assert "/models/b is damaged" in str(failing.document()["reason"]) and "/models" not in host.unhealthy()["b"]
    await asyncio.sleep(FIRST_S)
    engine.broken = set()
    assert await ask(host, "b") == "b" and not host.cache.failing and not host.unhealthy()
    await host.aclose()


@in_virtual_time
async def test_a_load_by_hand_is_tried_at_once_and_a_failure_after_the_while_counts_on() -> None:
    engine = Breaking()
    engine.broken = {"b"}
    host = make(engine)
    for _ in range(IN_A_ROW):
        with pytest.raises(WeightsError):
            await ask(host, "b")
    await asyncio.sleep(FIRST_S)
    with pytest.raises(WeightsError):
        await ask(host, "b")
    [failing] = host.cache.failing.values()
    assert failing.count == IN_A_ROW + 1 and failing.retry_in_s == 2 * FIRST_S
    engine.broken = set()
    assert await host.load("b") == ("b",) and await ask(host, "b") == "b"
    await host.aclose()


def test_a_cancelled_load_is_no_failure_and_waits_are_bounded() -> None:
    now = 0.0
    failures = Failures(lambda: now)
    for count in range(1, 100):
        failures.note("b", EngineError("line one\nline two " + "x" * 9999))
        failing = failures.of("b")
        assert (failing is None) == (count < IN_A_ROW)
    assert failing is not None and failing.retry_in_s == MOST_S
    assert "\n" not in failing.reason and len(failing.reason) < 1000
    failures.clear("b")
    assert failures.now() == {}


@in_virtual_time
async def test_a_cancelled_load_does_not_count() -> None:
    host = make(Breaking(load_delay_s=5.0))
    for _ in range(IN_A_ROW):
        host.prefetch("b")
        await asyncio.sleep(1)
        await host.aclose()
    assert not host.cache.failing
    await host.aclose()


@in_virtual_time
async def test_an_expert_larger_than_the_budget_is_refused_at_once_while_others_answer() -> None:
    engine = Breaking(token_delay_s=1.0)
    host = make(engine, sizes={"a": 4, "huge": 9})
    answers = [asyncio.ensure_future(ask(host, "a")) for _ in range(3)]
    await asyncio.sleep(0.1)
    started = asyncio.get_running_loop().time()
    with pytest.raises(OutOfMemory, match=r"'huge@1' need .* raise `host.budget`") as caught:
        await ask(host, "huge")
    assert asyncio.get_running_loop().time() == started and caught.value.status == 503
    assert await asyncio.gather(*answers) == ["a"] * 3 and engine.tries == ["a"]
    await host.aclose()


@in_virtual_time
async def test_without_any_budget_every_expert_with_weights_is_refused_and_those_without_answer() -> None:
    host = make(Breaking(), budget=0, sizes={"a": 4, "light": 0})
    with pytest.raises(OutOfMemory, match="the budget is 0 MiB"):
        await ask(host, "a")
    assert not host.prefetch("a") and await ask(host, "light") == "light"
    await host.aclose()


@in_virtual_time
async def test_without_a_budget_for_copies_none_is_read() -> None:
    engine = Breaking(load_delay_s=1.0)
    host = make(engine, budget=4)
    assert [await ask(host, name) for name in "abab"] == list("abab")
    assert not engine.copies and host.cache.copied_bytes == 0
    await host.aclose()
